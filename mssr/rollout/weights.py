"""Weights on their way from actor to engine.

Through Ray's object store they go as raw bytes, so that shared memory carries them uncopied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch


class WeightSource(Protocol):
    """Where an engine finds weights. Can be pickled: every process of the engine opens it by itself."""

    def tensors(self, device: torch.device, process: int) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights by their Hugging Face names, whole, once. A tensor may change when the next is asked
        for.

        Args:
            device: where the process wants them; they may come on the CPU all the same.
            process: its number within the engine.
        """


@dataclass(frozen=True)
class InMemory:
    """Weights that this process has."""

    weights: dict[str, torch.Tensor]

    def tensors(self, device: torch.device, process: int) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.weights.items())


PackedWeights = dict[str, tuple[npt.NDArray[np.uint8], str, tuple[int, ...]]]
"""Name -> (bytes, torch dtype, shape). NumPy has no bfloat16, hence bytes."""


def pack_weights(weights: dict[str, torch.Tensor]) -> PackedWeights:
    """CPU tensors -> bytes, without a copy."""
    import torch

    return {
        name: (
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy(),
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
        )
        for name, tensor in weights.items()
    }


@dataclass(frozen=True)
class Packed:
    """Weights as `pack_weights` made them."""

    weights: PackedWeights

    def tensors(self, device: torch.device, process: int) -> Iterator[tuple[str, torch.Tensor]]:
        import torch

        for name, (data, dtype, shape) in self.weights.items():
            # Ray hands out read-only memory, of which torch makes no tensors.
            data = data if data.flags.writeable else data.copy()
            yield name, torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
