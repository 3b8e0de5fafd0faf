"""The run directory: made, held, and protected from a run with another meaning."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mssr.config import Config, flatten, to_dict
from mssr.config.loading import config_yaml, file_layers, from_dict, merge
from mssr.config.options import FORM, LISTED, REFUSED, describe, nearest
from mssr.config.secrets import redact
from mssr.errors import UserError
from mssr.models.files import replace_text
from mssr.runs.manifest import read_manifest

RECIPE, MACHINE = "recipe.json", "machine.json"
"""What the last start was made from, and where; for the report."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How a config differs from that of the run so far; each entry is "key: old -> new"."""

    refused: list[str]
    """What the saved state would mean something else under."""
    listed: list[str]
    """What may change, and changes the course of the run."""


@contextlib.contextmanager
def prepare_run_directory(config: Config, file: Path | None = None) -> Iterator[tuple[str, ...]]:
    """Make the directory, hold it, and write config.yaml; yields lines for the user.

    Args:
        file: that the config was read from, for recipe.json.

    Raises:
        UserError: the directory cannot be written, another process holds it, or it holds a run that this
            config does not continue.
    """
    run_dir = config.run_dir
    saved = run_dir / "config.yaml"
    with hold_directory(run_dir, "trainer.run_dir") as notes:
        if saved.is_file() and _has_begun(run_dir):
            notes += _check_same_run(config, saved)
        try:
            for part in ("samples", "checkpoints"):
                (run_dir / part).mkdir(exist_ok=True)
            replace_text(saved, config_yaml(config))
            if file is not None:
                replace_text(run_dir / RECIPE, json.dumps(_recipe(config, file), default=str))
        except OSError as error:
            raise UserError(f"trainer.run_dir: {run_dir} cannot be written ({error.strerror})") from error
        yield notes


@contextlib.contextmanager
def hold_directory(path: Path, key: str) -> Iterator[tuple[str, ...]]:
    """Make a directory with ``logs`` in it and hold it; yields lines for the user.

    The kernel lets go when the process ends, be it by kill -9: the library sees to it that no child keeps the
    open file.

    Args:
        key: the option that names the directory, for messages.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """
    file = path / ".lock"
    notes: tuple[str, ...] = ()
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be made ({error.strerror})") from error
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        pid, _, host = file.read_text(errors="replace").strip().partition(" ")
        holder = f"process {pid} on {host}" if host else "another process"
        raise UserError(
            f"{key}: {path} is in use by {holder}; let it end or stop it, or choose another {key}"
        ) from None
    except OSError as error:
        # The file system knows no locks.
        reason = error.strerror
        notes = (f"{file} cannot be locked ({reason}): see to it that no second run writes to {path}",)
    else:
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            file.write_text(f"{os.getpid()} {socket.gethostname()}\n")
    try:
        yield notes
    finally:
        lock.release()


def compare_configs(old: dict[str, Any], new: dict[str, Any]) -> Drift:
    """What changed between two configs, as nested dicts, that the state or the user should know of.

    An option that one of them lacks, for example because it is newer than the run, counts as its default, and
    null is no other value than the one that it means. Secrets are not shown.
    """
    before, now = _complete(redact(old)), _complete(redact(new))
    drift = Drift([], [])
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if a == b or (None in (a, b) and _means_the_same(key, old, new)):
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


def _means_the_same(key: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether it is an option whose null means as much as the other value."""
    with contextlib.suppress(OmegaConfBaseException, ValueError, KeyError):
        return bool(from_dict(old).meant[key] == from_dict(new).meant[key])
    return False


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


def _recipe(config: Config, file: Path) -> dict[str, Any]:
    """What a config does otherwise than its file says: ``{"file": path, "changed": {key: [there, here]}}``.

    ``changed`` is null where the file alone makes no config.
    """
    here = flatten(redact(to_dict(config)))
    try:
        there = flatten(redact(to_dict(merge(file_layers(file), (), lambda line: None))))
    except UserError:
        return {"file": str(file), "changed": None}
    keys = [key for key in here | there if there.get(key) != here.get(key)]
    return {"file": str(file), "changed": {key: [there.get(key), here.get(key)] for key in keys}}


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
