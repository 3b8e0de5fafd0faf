"""A run as `mssr compare` sees it: its metrics over steps, rollouts and hours, and when it got how far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from mssr.config.run import flatten
from mssr.errors import UserError
from mssr.runs.jsonl import read_records
from mssr.runs.plot import read_metrics
from mssr.runs.verdict import judge
from mssr.trainer.initial_values import FILE as INIT_ROLLOUTS

AXES: Mapping[str, str] = {"step": "steps", "rollouts": "rollouts", "hours": "hours"}
"""Axis -> what is counted on it."""


@dataclass(frozen=True, slots=True)
class Point:
    """A measurement. Example: ``Point(step=10, rollouts=20480, hours=1.2, value=0.43)``"""

    step: int
    rollouts: int
    """Generated until then: those that dynamic sampling left out and those of first values included."""
    hours: float
    """Of training steps, without start, validation and checkpoints."""
    value: float


@dataclass(frozen=True, slots=True)
class RunCurves:
    """The curves of a run."""

    path: Path
    config: Mapping[str, Any]
    """Its options by dotted key."""
    verdict: str
    """See `mssr.runs.verdict`."""
    method: str
    """algorithm.name."""
    validation: list[Point]
    """Accuracy on the validation set."""
    training: list[Point]
    """Accuracy of the sampled responses."""
    entropy: list[Point]
    """Of the policy, nats per token."""
    last: Point
    """The last step; the value is its number."""

    @property
    def best(self) -> Point:
        """The first of the best validations."""
        return max(self.validation, key=lambda point: point.value)

    def reaches(self, accuracy: float) -> Point | None:
        """The first validation of at least this accuracy; None without one."""
        return next((point for point in self.validation if point.value >= accuracy), None)


def read_run(run_dir: Path, metric: str = "val/accuracy") -> RunCurves:
    """The curves of a run directory.

    Args:
        metric: key of the validation accuracy in metrics.jsonl.

    Raises:
        UserError: metrics or config are missing or damaged, or the run has no validation.
    """
    records = read_metrics(run_dir)
    config = _config(run_dir / "config.yaml")
    per_step = OmegaConf.select(config, "rollout.rollouts_per_step")
    if not isinstance(per_step, int) or isinstance(per_step, bool) or per_step < 1:
        raise UserError(
            f"{run_dir / 'config.yaml'}: rollout.rollouts_per_step is {per_step!r}, not a number above 0"
        )
    rollouts: float = _init_rollouts(run_dir / INIT_ROLLOUTS)
    hours = 0.0
    curves: dict[str, list[Point]] = {metric: [], "reward/accuracy": [], "policy/entropy": []}
    before: int | None = None
    for number, record in enumerate(records, 1):
        where = f"{run_dir / 'metrics.jsonl'} line {number}"
        step = record.get("step")
        if not isinstance(step, int):
            raise UserError(f"{where} has no step")
        if step not in ((0, 1) if before is None else (before + 1,)):
            raise UserError(
                f"{where}: step {step} follows {'nothing' if before is None else f'step {before}'}"
            )
        before = step
        if step > 0:
            # Dynamic sampling draws until rollouts_per_step are kept.
            rollouts += per_step / _number(record, "sampler/kept_fraction", where, 1.0)
            hours += _number(record, "timing/step_s", where, 0.0) / 3600
        for key, points in curves.items():
            value = record.get(key)
            # A step whose updates were skipped may have none, or NaN.
            if value is not None and not (isinstance(value, float) and math.isnan(value)):
                points.append(Point(step, round(rollouts), hours, _number(record, key, where, 0.0)))
    if not curves[metric]:
        raise UserError(
            f"{run_dir} has no {metric} in its metrics.jsonl: not validated (trainer.val_every, data.val)"
        )
    assert before is not None
    return RunCurves(
        path=run_dir,
        config=flatten(cast(dict[str, Any], OmegaConf.to_container(config))),
        verdict=judge(records).name,
        method=str(OmegaConf.select(config, "algorithm.name") or ""),
        validation=curves[metric],
        training=curves["reward/accuracy"],
        entropy=curves["policy/entropy"],
        last=Point(before, round(rollouts), hours, float(before)),
    )


def _config(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path} is missing: it says how many rollouts a step has")
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _init_rollouts(path: Path) -> int:
    """Responses that gave prompts their first values: the first line says what they depend on."""
    if not path.is_file():
        return 0
    count = 0
    for number, record in enumerate(read_records(path)[1:], 2):
        if not isinstance(record.get("scores"), list):
            raise UserError(f"{path} line {number} is damaged: it has no scores")
        count += len(record["scores"])
    return count


def _number(record: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = record.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: {key} is {value!r:.40}, not a number")
    if key == "sampler/kept_fraction" and not 0 < value <= 1:
        raise UserError(f"{where}: {key} is {value}, not between 0 and 1")
    return float(value)
