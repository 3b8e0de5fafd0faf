"""Wall time of a step's phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseTimer:
    """``with timer("rollout"): ...`` adds to that phase; `take` hands over what was collected."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        key = f"timing/{phase}_s"
        self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by metric name, and start again."""
        seconds, self._seconds = self._seconds, {}
        return seconds
