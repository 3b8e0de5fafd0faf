"""The run directory: made, claimed, and protected from a run with another meaning."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mssr.config import Config, flatten, to_dict
from mssr.config_loading import save_config
from mssr.errors import UserError

FREE_TO_CHANGE = (
    "experiment_name",
    "trainer.",
    "cluster.",
    "rollout.workers",
    "rollout.max_num_seqs",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "rollout.enforce_eager",
    "rollout.engine_options",
    "actor.num_ranks",
    "actor.micro_batch_tokens",
    "actor.keep_gathered",
    "actor.head_chunk_tokens",
    "actor.activation_checkpointing",
    "actor.max_nonfinite_updates",
    "data.max_bad_fraction",
    "data.cache_dir",
    "reward.workers",
)
"""Keys (or their beginnings) that say how a run is computed and not what it computes."""


def prepare_run_directory(config: Config) -> Path:
    """Create the directory and write config.yaml.

    Raises:
        UserError: the directory holds a run that this config does not continue.
    """
    run_dir = config.run_dir
    saved = run_dir / "config.yaml"
    if saved.is_file() and _has_begun(run_dir):
        _check_same_run(config, saved)
    try:
        for part in ("logs", "samples", "checkpoints"):
            (run_dir / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"trainer.run_dir: {run_dir} cannot be made ({error.strerror})") from error
    partial = saved.with_suffix(".yaml.partial")
    save_config(config, partial)
    os.replace(partial, saved)
    return run_dir


def _has_begun(run_dir: Path) -> bool:
    """A start that failed on bad input leaves no result to protect; it may be repeated, corrected."""
    metrics = run_dir / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (run_dir / "checkpoints/latest").is_file()


def _check_same_run(config: Config, saved: Path) -> None:
    trainer = config.trainer
    if trainer.resume == "never":
        raise UserError(
            f"trainer.run_dir: {saved.parent} already holds a run; choose another trainer.run_dir, or "
            "trainer.resume=auto to continue it"
        )
    old: dict[str, Any] = flatten(OmegaConf.to_container(OmegaConf.load(saved)))  # type: ignore[arg-type]
    new = flatten(to_dict(config))
    changed = [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if changed and not trainer.resume_force:
        raise UserError(
            f"trainer.run_dir: {saved.parent} holds a run with another config ({'; '.join(changed)}); choose "
            "another trainer.run_dir, or trainer.resume_force=true to go on from its state"
        )


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
