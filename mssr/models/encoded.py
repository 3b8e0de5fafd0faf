"""Prompts as a model takes them: what the encoder makes, engines are given and ranks pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from mssr.models.bounded_cache import BoundedCache
from mssr.models.pixels import PixelNormalizer

PromptArrays = tuple[list[npt.NDArray[Any] | None], tuple[bytes, ...], PixelNormalizer | None]
"""The fields of an `EncodedPrompt`: those that are tensors, then the others."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image cut into V patches."""

    pixels: torch.Tensor
    """(V, channels * patch * patch) uint8, see `mssr.models.pixels`."""
    grid_thw: torch.Tensor
    """(3,) int64, patches in time, height and width."""

    @property
    def nbytes(self) -> int:
        """About what it takes in memory."""
        return 1024 + self.pixels.nbytes


ImageCache = BoundedCache[Any, EncodedImage]
"""Images by their keys, see `EncodedPrompt.image_keys`."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as a model takes it. P tokens, V vision patches, I images."""

    token_ids: torch.Tensor
    """(P,) int64, one placeholder for every merged patch."""
    token_types: torch.Tensor
    """(P,) int32, 0 text and 1 image, as transformers' rope index wants them."""
    pixels: torch.Tensor | None
    """(V, channels * patch * patch) uint8, None without images; see `mssr.models.pixels`."""
    image_grid_thw: torch.Tensor | None
    """(I, 3) int64, patches in time, height and width, None without images."""
    image_keys: tuple[bytes, ...] = ()
    """(I,) hashes of the images as the data has them, so equal images have the same in whatever prompt."""
    normalizer: PixelNormalizer | None = None
    """Of the pixels, None without images."""

    @property
    def pixel_values(self) -> torch.Tensor | None:
        """(V, channels * temporal_patch * patch * patch) float32, worked out anew; None without images."""
        return None if self.pixels is None or self.normalizer is None else self.normalizer(self.pixels)

    @property
    def nbytes(self) -> int:
        """About what it takes in memory; without images it takes some, too."""
        return 4096 + self.token_ids.nbytes + (0 if self.pixels is None else self.pixels.nbytes)

    def arrays(self) -> PromptArrays:
        """The same for the way to another process; shares its memory."""
        tensors = self.token_ids, self.token_types, self.pixels, self.image_grid_thw
        arrays = [None if tensor is None else tensor.numpy() for tensor in tensors]
        return arrays, self.image_keys, self.normalizer

    @classmethod
    def from_arrays(cls, arrays: PromptArrays) -> EncodedPrompt:
        """What `arrays` was called on, in memory of its own."""
        values, image_keys, normalizer = arrays
        token_ids, token_types, pixels, grid = (None if v is None else torch.tensor(v) for v in values)
        assert token_ids is not None and token_types is not None
        return cls(token_ids, token_types, pixels, grid, image_keys, normalizer)


def join_pixels(images: Sequence[EncodedImage]) -> torch.Tensor:
    """(V, channels * patch * patch) uint8: the patches of one or more images; those of one are not copied."""
    return images[0].pixels if len(images) == 1 else torch.cat([image.pixels for image in images])
