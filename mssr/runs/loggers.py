"""Where metrics go: metrics.jsonl always, wandb and tensorboard where asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mssr.config import Config, to_dict
from mssr.config.secrets import redact
from mssr.errors import UserError
from mssr.models.files import replace_text
from mssr.runs.jsonl import append_record


class Logger(Protocol):
    """A place that takes numbers by step."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """All sinks of one run.

    Raises:
        UserError: a logger in ``trainer.loggers`` is not installed.
    """

    def __init__(self, config: Config, resume_step: int | None) -> None:
        self.run_dir = config.run_dir
        makers: dict[str, Callable[[Config], Logger]] = {"wandb": _Wandb, "tensorboard": _Tensorboard}
        self._loggers: list[Logger] = []
        for name in config.trainer.loggers:
            try:
                self._loggers.append(makers[name](config))
            except ImportError as error:
                raise UserError(
                    f"trainer.loggers: {name} is not installed; pip install mssr[tracking]"
                ) from error
        self._path = self.run_dir / "metrics.jsonl"
        self.written = 0
        self.rewind(resume_step)

    def rewind(self, resume_step: int | None) -> None:
        """Go on after this step, None at the beginning; see `discard_after`."""
        discard_after(self._path, resume_step)

    def write(self, record: dict[str, Any]) -> None:
        """One step. NaN, which JSON does not know, becomes null in the file."""
        self.written += 1
        append_record(self._path, {k: v if _is_finite(v) else None for k, v in record.items()})
        for logger in self._loggers:
            logger.write(record["step"], {k: v for k, v in record.items() if k != "step"})

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


def discard_after(path: Path, step: int | None) -> None:
    """Make metrics.jsonl, or make it end with a step, None with nothing.

    On resume the steps after the checkpoint are computed again; their old lines move to
    metrics.discarded.jsonl, so that the file has neither gap nor duplicate and nothing is lost.
    """
    path.touch()
    lines = path.read_text().splitlines(keepends=True)
    stands = [step is not None and _step_of(line) <= step for line in lines]
    if not all(stands):
        with path.with_suffix(".discarded.jsonl").open("a") as file:
            file.writelines(line for line, keep in zip(lines, stands, strict=True) if not keep)
        replace_text(path, "".join(line for line, keep in zip(lines, stands, strict=True) if keep))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a crash


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


class _Wandb:
    """One wandb run per run directory, continued on resume."""

    def __init__(self, config: Config) -> None:
        import wandb

        id_file = Path(config.run_dir) / "wandb_run_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else None
        self._run = wandb.init(
            project="mssr",
            name=config.experiment_name,
            config=redact(to_dict(config)),
            dir=str(config.run_dir),
            id=run_id,
            resume="allow",
        )
        id_file.write_text(self._run.id)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


class _Tensorboard:
    def __init__(self, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path(config.run_dir) / "tensorboard"))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()
