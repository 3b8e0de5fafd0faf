"""Weights on their way from actor to engine: raw bytes, so that shared memory carries them uncopied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

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


def unpack_weights(packed: PackedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Bytes -> tensors one by one, without a copy where the memory is writable."""
    import torch

    for name, (data, dtype, shape) in packed.items():
        # Ray hands out read-only memory, of which torch makes no tensors.
        data = data if data.flags.writeable else data.copy()
        yield name, torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
