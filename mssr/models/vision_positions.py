"""Where the patches of images are, for the vision tower: worked out once for each size of an image.

transformers works it out in every pass, image by image, with dozens of small operations on the device for
each, and waits for the device in between.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

Grid = tuple[int, int, int]
"""Patches of an image in time, height and width."""


def vision_positions(visual: Any, grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
    """What the forward pass of a transformers Qwen2.5-VL's tower takes in place of working it out.

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
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()} | longest


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
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
