"""What went wrong and was mended: events.jsonl, and a line each on the screen."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from mssr.config.secrets import redact
from mssr.errors import TrainingError
from mssr.runs.jsonl import append_record

FILE = "events.jsonl"


class EventLog:
    """Records events of a run and counts those that cost a restart.

    Args:
        announce: shows a line to the user.
        max_restarts: so many are allowed until `progress` is called.
    """

    def __init__(self, run_dir: Path, announce: Callable[[str], None], max_restarts: int) -> None:
        self.step = 0
        """Last step that is done; the owner keeps it up to date."""
        self._path = run_dir / FILE
        self._announce = announce
        self._max = max_restarts
        self._restarts = 0

    def record(self, event: str, detail: str) -> None:
        """Something worth knowing happened: ``record("checkpoint_failed", "No space left on device")``."""
        detail, time = redact(detail), datetime.now(UTC).isoformat(timespec="seconds")
        self._announce(f"step {self.step}: {event.replace('_', ' ')}: {detail}")
        append_record(self._path, {"time": time, "step": self.step, "event": event, "detail": detail})

    def restart(self, event: str, detail: str) -> None:
        """Something was lost and is about to be replaced.

        Raises:
            TrainingError: that happened too often since the last checkpoint.
        """
        self.record(event, detail)
        self._restarts += 1
        if self._restarts > self._max:
            raise TrainingError(
                f"{detail}; this was failure {self._restarts} without a new checkpoint between them, and "
                f"trainer.max_restarts={self._max}"
            )

    def progress(self) -> None:
        """A checkpoint was written: what comes after it is counted afresh."""
        self._restarts = 0
