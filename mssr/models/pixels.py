"""Pixels of patches: kept as the bytes that they are, made numbers where a vision tower takes them.

Qwen2.5-VL sees the frame of an image twice. In bfloat16 that takes four times the memory of the bytes, in
float32 eight times: in the caches of the workers, between processes, and on the way to the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mssr.errors import UserError


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

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(V, C * patch * patch) uint8 -> (V, C * frames * patch * patch) float32, on the same device."""
        mean, std = (torch.tensor(v, device=pixels.device)[:, None] for v in (self.mean, self.std))
        values = pixels.unflatten(1, (len(self.mean), -1)).float().sub_(mean).div_(std)
        return values[:, :, None].expand(-1, -1, self.frames, -1).flatten(1)
