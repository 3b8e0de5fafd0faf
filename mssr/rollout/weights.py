"""Weights on their way from actor to engine: how they are packed, and where an engine finds them.

They travel in buckets, a few large pieces of memory with many tensors in each.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

BUCKET_BYTES = 2**28
_ALIGNMENT = 16
"""Of tensors in a bucket, bytes."""


class WeightSource(Protocol):
    """Where an engine finds weights. Can be pickled: every process of the engine opens it by itself."""

    def tensors(
        self, device: torch.device, process: int, kept: dict[str, Any]
    ) -> Generator[tuple[str, torch.Tensor]]:
        """All weights by their Hugging Face names, whole, once. A tensor stays as it is while somebody holds
        it: vLLM collects those of a layer before it takes any.

        Args:
            device: where the process wants them; they may come on the CPU all the same.
            process: its number within the engine.
            kept: what the process keeps for the next time, such as its place in a group.

        Raises:
            TransferInterruptedError: no more will come.
        """


@dataclass(frozen=True)
class InMemory:
    """Weights that this process has."""

    weights: dict[str, torch.Tensor]

    def tensors(
        self, device: torch.device, process: int, kept: dict[str, Any]
    ) -> Generator[tuple[str, torch.Tensor]]:
        yield from self.weights.items()


class Place(NamedTuple):
    """Where in a bucket a tensor lies, from which byte on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


Layout = list[Place]


def bucket_bytes(sizes: Iterable[int]) -> int:
    """Of a bucket for tensors of so many bytes, each of which must fit."""
    aligned = [_aligned(size) for size in sizes]
    return min(sum(aligned), max(BUCKET_BYTES, *aligned))


def pack(weights: Iterable[tuple[str, torch.Tensor]], bucket: torch.Tensor) -> Iterator[tuple[Layout, int]]:
    """Copy weights into a bucket until it is full, and again; yields what is in it, and to which byte.

    Args:
        bucket: uint8, on the device of the weights; who gets a layout is done with it before the next.
    """
    layout: Layout = []
    used = 0
    for name, tensor in weights:
        if used + tensor.nbytes > len(bucket):
            yield layout, used
            layout, used = [], 0
        place = Place(name, tensor.dtype, tuple(tensor.shape), used)
        _view(bucket, place).copy_(tensor)
        layout.append(place)
        used += _aligned(tensor.nbytes)
    yield layout, used


def unpack(bucket: torch.Tensor, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """What `pack` put into a bucket, without a copy."""
    return ((place.name, _view(bucket, place)) for place in layout)


def _view(bucket: torch.Tensor, place: Place) -> torch.Tensor:
    size = math.prod(place.shape) * place.dtype.itemsize
    return bucket[place.start : place.start + size].view(place.dtype).view(place.shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Stored:
    """Buckets in Ray's object store, which processes on one machine share.

    Args:
        buckets: references to uint8 arrays, with what is in them.
        get: `ray.get`, which this room does not know.
    """

    buckets: Sequence[tuple[Any, Layout]]
    get: Callable[[Any], npt.NDArray[np.uint8]]

    def tensors(
        self, device: torch.device, process: int, kept: dict[str, Any]
    ) -> Generator[tuple[str, torch.Tensor]]:
        with warnings.catch_warnings():
            # Ray hands out read-only memory, and nobody writes to it.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            arrays = [torch.from_numpy(self.get(data)) for data, _ in self.buckets]
        for array, (_, layout) in zip(arrays, self.buckets, strict=True):
            yield from unpack(array, layout)
