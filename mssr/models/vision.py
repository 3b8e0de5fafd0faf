"""Two parts of a transformers Qwen2.5-VL's vision tower, done faster, with the same results."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mssr.device import to_device

Grid = tuple[int, int, int]
"""Patches of an image in time, height and width."""


def use_linear_patch_embed(model: Any) -> None:
    """Make a model embed its patches with the one matrix product that it is.

    A patch fills the kernel of its convolution, so each gives one value a channel, and patches come as rows
    in the order of the kernel's weights. conv3d takes several times as long for that.
    """
    embed = model.model.visual.patch_embed
    embed.forward = functools.partial(_embed, embed)


def _embed(embed: Any, patches: torch.Tensor) -> torch.Tensor:
    """(V, channels * temporal_patch * patch * patch) -> (V, width)."""
    weight = embed.proj.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1), embed.proj.bias)


def vision_positions(visual: Any, grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
    """Where the patches of images are, worked out once for each size of an image.

    The tower's forward pass takes it in place of working it out, image by image, with dozens of small
    operations on the device for each, between which it waits for the device.

    Args:
        grids: of the images in the pass, at least one.
    """
    sizes = visual.spatial_merge_size, visual.window_size, visual.patch_size
    positions, indices, windows = zip(*(_of_image(grid, *sizes) for grid in grids), strict=True)
    tokens = [len(index) for index in indices]
    starts = torch.tensor([0, *tokens[:-1]]).cumsum(0).repeat_interleave(torch.tensor(tokens))
    frames = torch.tensor([height * width for time, height, width in grids for _ in range(time)])
    window_lengths = torch.cat(windows)
    tensors = {
        "position_ids": torch.cat(positions),
        "window_index": torch.cat(indices) + starts,
        "cu_window_seqlens": _cumulative(window_lengths),
        "cu_seqlens": _cumulative(frames),
    }
    longest = {"max_seqlen": int(frames.max()), "max_window_seqlen": int(window_lengths.max())}
    return {name: to_device(tensor, device) for name, tensor in tensors.items()} | longest


@functools.lru_cache(maxsize=512)
def _of_image(
    grid: Grid, merge: int, window: int, patch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(V, 2) rows and columns of the patches, (V / merge^2,) the order of merged patches by windows, and
    the patches of each window, all int64."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    one = torch.tensor([grid])
    index, bounds = get_vision_window_index(one, merge, window, patch)
    return get_vision_position_ids(one, merge), index, bounds.diff().long()


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    """(n,) lengths -> (n + 1,) int32 where each begins, and the end."""
    return F.pad(lengths.cumsum(0), (1, 0)).int()
