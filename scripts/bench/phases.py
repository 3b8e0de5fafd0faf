"""What benchmarks of the update count: model operations of a batch, seconds and peak memory of phases."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from report import GIB, forget_peak, resident, synchronize

from mssr.models.cost import UNIT, CostModel
from mssr.types import TrainBatch


@dataclasses.dataclass(frozen=True)
class Operations:
    """Model operations of a batch, by the formulas of `gpu_update`."""

    matrices: float
    attention: float
    vision: float

    @classmethod
    def of(cls, batch: TrainBatch, model_config: Any) -> Operations:
        cost = CostModel(model_config, train_vision=False)  # so that images cost their forward pass
        work = cost.work(batch)
        attention = cost.per_square * float((batch.lengths.astype(np.float64) ** 2).sum())
        text = float(work.text_cost.sum()) * UNIT / 3
        return cls(text - attention, attention, float(work.image_cost.sum()) * UNIT)

    @property
    def forward(self) -> float:
        return self.matrices + self.attention + self.vision

    def training(self, frozen_weights: bool = False, frozen_tower: bool = False) -> float:
        """Forward and backward."""
        matrices, vision = 2 if frozen_weights else 3, 1 if frozen_tower else 3
        return matrices * self.matrices + 3 * self.attention + vision * self.vision


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
