"""What the vision towers of all families have in common: two parts done faster, with the same results."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mssr.device import to_device
from mssr.models.families.base import Grid


def use_linear_patch_embed(tower: Any) -> None:
    """Make a tower embed its patches with the one matrix product that it is.

    A patch fills the kernel of its convolution, so each gives one value a channel, and patches come as rows
    in the order of the kernel's weights. conv3d takes several times as long for that.
    """
    embed = tower.patch_embed
    embed.forward = functools.partial(_embed, embed)


def _embed(embed: Any, patches: torch.Tensor) -> torch.Tensor:
    """(V, channels * temporal_patch * patch * patch) -> (V, width)."""
    weight = embed.proj.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1), embed.proj.bias)


def patch_positions(grids: Sequence[Grid], merge_size: int) -> dict[str, Any]:
    """Where the patches of images are, in the arguments of a tower in which all of a frame see each other.

    The tower's forward pass takes it in place of working it out, image by image, with dozens of small
    operations on the device for each, between which it waits for the device.

    Args:
        grids: of the images in the pass, at least one.
    """
    frames = torch.tensor([height * width for time, height, width in grids for _ in range(time)])
    return {
        "position_ids": torch.cat([_rows_and_columns(grid, merge_size) for grid in grids]),
        "cu_seqlens": cumulative(frames),
        "max_seqlen": int(frames.max()),
    }


@functools.lru_cache(maxsize=512)
def _rows_and_columns(grid: Grid, merge_size: int) -> torch.Tensor:
    """(V, 2) int64 of the patches of an image."""
    from transformers.vision_utils import get_vision_position_ids

    return get_vision_position_ids(torch.tensor([grid]), merge_size)


def cumulative(lengths: torch.Tensor) -> torch.Tensor:
    """(n,) lengths -> (n + 1,) int32 where each begins, and the end."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def on_device(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The tensors among a tower's arguments where it is."""
    return {n: to_device(a, device) if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
