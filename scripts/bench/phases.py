"""What benchmarks of the update count: seconds and peak memory of phases."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from report import GIB, forget_peak, resident, synchronize


class Phases:
    """Seconds and peak memory of what runs inside ``with phases(name)``, the device's work included.

    Phases may lie within others. Memory is that of torch's allocator, or on a CPU the resident set.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.running: list[str] = []
        """The phases that are open, the outermost first."""
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._fold_peak()
        self.running.append(name)
        with self.on_host(name):
            yield
            synchronize(self._cuda)
        self._fold_peak()
        self.running.remove(name)

    @contextlib.contextmanager
    def on_host(self, name: str) -> Iterator[None]:
        """Only the host's seconds; the device may work meanwhile."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _fold_peak(self) -> None:
        """The peak since the last call belongs to all phases that are open."""
        synchronize(self._cuda)
        if self._cuda:
            peak = torch.cuda.max_memory_allocated() / GIB
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = resident("VmHWM") / GIB
            forget_peak()
        for name in self.running:
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
