"""Prompts as a model takes them: what the encoder makes, engines are given and ranks pack.

Pixels are kept as the bytes that they are, and made numbers where a vision tower takes them: the frame of
an image is seen twice, which in bfloat16 takes four times the memory of the bytes, in float32 eight
times, in the caches of the workers, between processes, and on the way to the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from mssr.device import to_device
from mssr.errors import UserError
from mssr.models.bounded_cache import BoundedCache

PromptArrays = list[Any]
"""The fields of an `EncodedPrompt`, tensors as arrays."""


@dataclass(frozen=True, slots=True)
class PixelNormalizer:
    """Bytes of patches -> the values that the image processor would have made of them, bit for bit."""

    mean: tuple[float, ...]
    """(C,) in units of a byte."""
    std: tuple[float, ...]
    """(C,) likewise."""
    frames: int
    """How often a vision tower wants to see the one frame of an image (its temporal patch)."""

    @classmethod
    def of(cls, image_processor: Any) -> PixelNormalizer:
        """That of a transformers image processor.

        Raises:
            UserError: it does not rescale and normalise.
        """
        if not (image_processor.do_rescale and image_processor.do_normalize):
            raise UserError("model.path: the model's image processor must rescale and normalise images")
        unit = 1.0 / image_processor.rescale_factor
        mean, std = (torch.tensor(v) * unit for v in (image_processor.image_mean, image_processor.image_std))
        return cls(tuple(mean.tolist()), tuple(std.tolist()), image_processor.temporal_patch_size)

    def __call__(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(V, C * patch * patch) uint8 -> (V, C * frames * patch * patch), on the same device; computed in
        float32 and rounded to ``dtype``."""
        mean, std = _per_channel(self.mean, pixels.device), _per_channel(self.std, pixels.device)
        values = pixels.unflatten(1, (len(self.mean), -1)).float().sub_(mean).div_(std).to(dtype)
        return values[:, :, None].expand(-1, -1, self.frames, -1).flatten(1)


@functools.lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """(C, 1) float32."""
    return to_device(torch.tensor(values)[:, None], device)


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image cut into V patches."""

    pixels: torch.Tensor
    """(V, channels * patch * patch) uint8."""
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
    """(V, channels * patch * patch) uint8, None without images."""
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
        values = [getattr(self, field.name) for field in fields(self)]
        return [value.numpy() if isinstance(value, torch.Tensor) else value for value in values]

    @classmethod
    def from_arrays(cls, arrays: PromptArrays) -> EncodedPrompt:
        """What `arrays` was called on, in memory of its own."""
        return cls(*(torch.tensor(v) if isinstance(v, np.ndarray) else v for v in arrays))


def join_pixels(images: Sequence[EncodedImage]) -> torch.Tensor:
    """(V, channels * patch * patch) uint8: the patches of one or more images; those of one are not copied."""
    return images[0].pixels if len(images) == 1 else torch.cat([image.pixels for image in images])
