"""Where metrics go: metrics.jsonl always, wandb and tensorboard where asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mssr.config import Config, to_dict
from mssr.config.secrets import redact
from mssr.errors import UserError
from mssr.models.files import replace_text
from mssr.runs.jsonl import append_record

Logger = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]
"""Takes the metrics of a step; and ends."""


class MetricsLog:
    """All sinks of one run.

    Raises:
        UserError: a logger in ``trainer.loggers`` is not installed.
    """

    def __init__(self, config: Config, resume_step: int | None) -> None:
        self.path = config.run_dir / "metrics.jsonl"
        self._loggers: list[Logger] = []
        for name in config.trainer.loggers:
            try:
                self._loggers.append({"wandb": _wandb, "tensorboard": _tensorboard}[name](config))
            except ImportError as error:
                raise UserError(
                    f"trainer.loggers: {name} is not installed; pip install mssr[tracking]"
                ) from error
        self.written = 0
        discard_after(self.path, resume_step)

    def write(self, record: dict[str, Any]) -> None:
        """One step. NaN, which JSON does not know, becomes null in the file."""
        self.written += 1
        nan = {k for k, v in record.items() if isinstance(v, float) and not math.isfinite(v)}
        append_record(self.path, record | dict.fromkeys(nan))
        for log, _ in self._loggers:
            log({k: v for k, v in record.items() if k != "step"}, record["step"])

    def close(self) -> None:
        for _, close in self._loggers:
            close()


def discard_after(path: Path, step: int | None) -> None:
    """Make metrics.jsonl, or make it end with a step, None with nothing.

    On resume the steps after the checkpoint are computed again; their old lines move to
    metrics.discarded.jsonl, so that the file has neither gap nor duplicate and nothing is lost.
    """
    path.touch()
    kept, dropped = "", ""
    for line in path.read_text().splitlines(keepends=True):
        if _step_of(line) <= (-1 if step is None else step):
            kept += line
        else:
            dropped += line
    if dropped:
        with path.with_suffix(".discarded.jsonl").open("a") as file:
            file.write(dropped)
        replace_text(path, kept)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a crash


def _wandb(config: Config) -> Logger:
    """One wandb run per run directory, continued on resume."""
    import wandb

    id_file = config.run_dir / "wandb_run_id"
    run = wandb.init(
        project="mssr",
        name=config.experiment_name,
        config=redact(to_dict(config)),
        dir=str(config.run_dir),
        id=id_file.read_text().strip() if id_file.is_file() else None,
        resume="allow",
    )
    id_file.write_text(run.id)
    return lambda metrics, step: run.log(metrics, step=step), run.finish


def _tensorboard(config: Config) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(config.run_dir / "tensorboard"))

    def log(metrics: dict[str, float], step: int) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)

    return log, writer.close
