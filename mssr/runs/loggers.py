"""Where metrics go: metrics.jsonl always, wandb and tensorboard where asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mssr.config import Config, to_dict
from mssr.config.secrets import redact
from mssr.errors import UserError
from mssr.runs.run_directory import MetricsFile


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
        self._file = MetricsFile(self.run_dir / "metrics.jsonl", resume_step)
        self.written = 0

    def rewind(self, resume_step: int | None) -> None:
        """Go on after this step; see `MetricsFile`."""
        self._file.close()
        self._file = MetricsFile(self.run_dir / "metrics.jsonl", resume_step)

    def write(self, record: dict[str, Any]) -> None:
        """One step. NaN, which JSON does not know, becomes null in the file."""
        self.written += 1
        self._file.write({k: v if _is_finite(v) else None for k, v in record.items()})
        for logger in self._loggers:
            logger.write(record["step"], {k: v for k, v in record.items() if k != "step"})

    def close(self) -> None:
        self._file.close()
        for logger in self._loggers:
            logger.close()


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
