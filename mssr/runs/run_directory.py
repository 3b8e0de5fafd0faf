"""The run directory: made, held by one process, and protected from a run with another meaning."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mssr.config import Config, flatten, to_dict
from mssr.config.loading import save_config
from mssr.config.options import FORM, LISTED, REFUSED, describe, nearest
from mssr.config.secrets import redact
from mssr.errors import UserError
from mssr.runs.manifest import read_manifest

LOCK_FILE = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """A directory that this process holds, until `release`, the end of a ``with``, or its own end."""

    path: Path
    notes: tuple[str, ...]
    """Lines for the user."""
    lock: FileIO | None
    """The open lock file; None where the file system knows no locks."""

    def release(self) -> None:
        """Let another process have the directory."""
        if self.lock is not None:
            self.lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class Drift:
    """How a config differs from that of the run so far; each entry is "key: old -> new".

    Example: ``Drift(refused=["seed: 0 -> 1"], listed=["actor.lr: 1e-06 -> 2e-06"])``
    """

    refused: list[str]
    """What the saved state would mean something else under."""
    listed: list[str]
    """What may change, and changes the course of the run."""


def prepare_run_directory(config: Config) -> RunDirectory:
    """Make the directory, hold it, and write config.yaml.

    Raises:
        UserError: the directory cannot be written, another process holds it, or it holds a run that this
            config does not continue.
    """
    run_dir = config.run_dir
    saved = run_dir / "config.yaml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock, notes = _lock(run_dir)
    except OSError as error:
        raise UserError(f"trainer.run_dir: {run_dir} cannot be made ({error.strerror})") from error
    directory = RunDirectory(run_dir, notes, lock)
    try:
        if saved.is_file() and _has_begun(run_dir):
            notes += _check_same_run(config, saved)
        for part in ("logs", "samples", "checkpoints"):
            (run_dir / part).mkdir(exist_ok=True)
        partial = saved.with_suffix(".yaml.partial")
        save_config(config, partial)
        os.replace(partial, saved)
    except OSError as error:
        directory.release()
        raise UserError(f"trainer.run_dir: {run_dir} cannot be written ({error.strerror})") from error
    except BaseException:
        directory.release()
        raise
    return replace(directory, notes=notes)


def compare_configs(old: dict[str, Any], new: dict[str, Any]) -> Drift:
    """What changed between two configs, as nested dicts, that the state or the user should know of.

    An option that one of them lacks, for example because it is newer than the run, counts as its default.
    Secrets are not shown.
    """
    before, now = _complete(redact(old)), _complete(redact(new))
    drift = Drift([], [])
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        line = f"{key}: {a} -> {b}"
        if (verdict := _verdict(key)) in (REFUSED, FORM):
            drift.refused.append(line)
        elif verdict == LISTED or _decides_lr(key, before, now):
            drift.listed.append(line)
    return drift


def _complete(tree: dict[str, Any]) -> dict[str, Any]:
    """The flat config with its defaults. Empty sections of free keys say nothing and are left out."""
    flat = flatten(tree)
    for key, value in flatten(to_dict(Config())).items():
        if not any(k == key or k.startswith(f"{key}.") for k in flat):
            flat[key] = value
    return {key: value for key, value in flat.items() if value != {}}


def _decides_lr(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether it is the number of steps over which the learning rate decays."""
    schedule = "actor.lr_schedule"
    return key in ("trainer.steps", "trainer.epochs") and not before[schedule] == now[schedule] == "constant"


def _verdict(key: str) -> str:
    """What a resume thinks of a change of the key; one that only another version has is listed."""
    option = nearest(describe(Config), key)
    return option.resume if option else LISTED


def _has_begun(run_dir: Path) -> bool:
    """A start that failed on bad input leaves no result to protect; it may be repeated, corrected."""
    metrics = run_dir / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (run_dir / "checkpoints/latest").is_file()


def _check_same_run(config: Config, saved: Path) -> tuple[str, ...]:
    """Lines that tell the user what is different since the last start."""
    trainer = config.trainer
    if trainer.resume == "never":
        raise UserError(
            f"trainer.run_dir: {saved.parent} already holds a run; choose another trainer.run_dir, or "
            "trainer.resume=auto to continue it"
        )
    try:
        old: Any = OmegaConf.to_container(OmegaConf.load(saved))
    except Exception as error:  # yaml and omegaconf raise many types
        old = error
    if not isinstance(old, dict):
        raise UserError(
            f"trainer.run_dir: {saved} is damaged, so it is not known which run the directory holds; choose "
            "another trainer.run_dir, or remove the file to go on with this config"
        )
    return _describe(
        compare_configs(old, to_dict(config)),
        f"trainer.run_dir: {saved.parent} holds a run with another config",
        "choose another trainer.run_dir, or trainer.resume_force=true to go on from its state",
        force=trainer.resume_force,
    )


def check_checkpoint(config: Config, checkpoint: Path) -> tuple[str, ...]:
    """Lines that tell the user how a config differs from that of a checkpoint.

    Raises:
        UserError: its state would mean something else under this config.
    """
    return _describe(
        compare_configs(read_manifest(checkpoint).config, to_dict(config)),
        f"trainer.resume={config.trainer.resume}: {checkpoint} is of a run with another config",
        "trainer.resume_force=true goes on from its state all the same",
        force=config.trainer.resume_force,
    )


def _describe(drift: Drift, what: str, remedy: str, force: bool) -> tuple[str, ...]:
    if drift.refused and not force:
        raise UserError(f"{what} ({'; '.join(drift.refused)}); {remedy}")
    if unreadable := [line for line in drift.refused if _verdict(line.partition(":")[0]) == FORM]:
        raise UserError(
            f"{what} ({'; '.join(unreadable)}), whose state has another form, so trainer.resume_force=true "
            "cannot go on from it; start from an export of it in another trainer.run_dir"
        )
    return tuple(
        [f"changed by trainer.resume_force, against the saved state: {line}" for line in drift.refused]
        + [f"changed since the state was saved: {line}" for line in drift.listed]
    )


def hold_directory(path: Path, key: str) -> RunDirectory:
    """Make a directory with ``logs`` in it and hold it.

    Args:
        key: the option that names the directory, for messages.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        lock, notes = _lock(path, key)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be made ({error.strerror})") from error
    return RunDirectory(path, notes, lock)


def _lock(run_dir: Path, key: str = "trainer.run_dir") -> tuple[FileIO | None, tuple[str, ...]]:
    """Hold the directory; returns the open file, or None and a note where there are no locks.

    The kernel lets go when the last copy of the open file is closed, be it by kill -9. So no child may keep
    one: Python's files are closed on exec, and on a fork without exec by hand.
    """
    path = run_dir / LOCK_FILE
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid, _, host = file.read(1000).decode(errors="replace").strip().partition(" ")
        file.close()
        holder = f"process {pid} on {host}" if host else "another process"
        raise UserError(
            f"{key}: {run_dir} is in use by {holder}; let it end or stop it, or choose another {key}"
        ) from None
    except OSError as error:
        file.close()
        return None, (
            f"{path} cannot be locked ({error.strerror}): see to it that no second run writes to {run_dir}",
        )
    held = weakref.ref(file)

    def close_in_child() -> None:
        if (copy := held()) is not None:
            copy.close()

    os.register_at_fork(after_in_child=close_in_child)
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())
    return file, ()


class MetricsFile:
    """metrics.jsonl: one JSON object a step, appended.

    On resume the steps after the checkpoint are computed again; their old lines move to
    metrics.discarded.jsonl, so that the file has neither gap nor duplicate and nothing is lost.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        """``resume_step``: last step that stands, None for a fresh run."""
        if path.is_file():
            lines = path.read_text().splitlines(keepends=True)
            keep = [x for x in lines if resume_step is not None and _step_of(x) <= resume_step]
            dropped = [x for x in lines if resume_step is None or _step_of(x) > resume_step]
            if dropped:
                with path.with_suffix(".discarded.jsonl").open("a") as file:
                    file.writelines(dropped)
                partial = path.with_suffix(".partial")
                partial.write_text("".join(keep))
                os.replace(partial, path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a crash


def write_samples(path: Path, samples: Iterable[dict[str, Any]], split: str) -> None:
    """Put a split's questions, responses and scores into a step's file, beside the other split's."""
    lines = [json.dumps(s, ensure_ascii=False) + "\n" for s in samples]
    if path.is_file():
        # A step that is computed again after a resume replaces its own samples.
        # (Split at \n alone: a response may hold other characters that end a line for Python.)
        old = [x + "\n" for x in path.read_text().split("\n") if x]
        lines = [x for x in old if json.loads(x)["split"] != split] + lines
    path.write_text("".join(lines))
