"""Wall time of a step's phases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class PhaseTimer:
    """``with timer("rollout"): ...`` adds to that phase; `take` hands over what was collected."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By metric name, since they were taken last."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:  # a stop may end it, and the step be finished by the next start
            self.add({f"timing/{phase}_s": time.perf_counter() - start})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by metric name, for example those of another timer."""
        for key, value in seconds.items():
            self.seconds[key] = self.seconds.get(key, 0.0) + value

    def take(self) -> dict[str, float]:
        """Seconds by metric name, and start again."""
        seconds, self.seconds = self.seconds, {}
        return seconds
