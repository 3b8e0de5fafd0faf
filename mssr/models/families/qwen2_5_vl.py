"""Qwen2.5-VL: most blocks of the tower see a window of the image, some all of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mssr.models.families.base import Grid
from mssr.models.families.qwen2_vl import Qwen2VL, tiny_parts
from mssr.models.shapes import VisionShape, take

if TYPE_CHECKING:
    import torch

    from mssr.models.tiny import TinySize

_PUBLISHED: dict[str, Any] = {
    **{"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
    **{"patch_size": 14, "window_size": 112, "fullatt_block_indexes": (7, 15, 23, 31)},
}
"""What config.json may leave out."""


class Qwen25VL(Qwen2VL):
    """``Qwen2_5_VLForConditionalGeneration``"""

    model_type = "qwen2_5_vl"

    def vision_shape(self, vision: Mapping[str, Any]) -> VisionShape:
        v = _PUBLISHED | dict(vision)
        window, full = (v["window_size"] // v["patch_size"]) ** 2, len(v["fullatt_block_indexes"])
        return take(VisionShape, v, window=window, full_blocks=full, gated=True, norm_bias=False)

    def tower_positions(self, tower: Any, grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
        import torch

        from mssr.models.vision import cumulative, on_device, patch_positions

        sizes = tower.spatial_merge_size, tower.window_size, tower.patch_size
        indices, windows = zip(*(_windows(grid, *sizes) for grid in grids), strict=True)
        tokens = [len(index) for index in indices]
        starts = torch.tensor([0, *tokens[:-1]]).cumsum(0).repeat_interleave(torch.tensor(tokens))
        lengths = torch.cat(windows)
        of_windows = {
            "window_index": torch.cat(indices) + starts,
            "cu_window_seqlens": cumulative(lengths),
            "max_window_seqlen": int(lengths.max()),
        }
        return on_device(patch_positions(grids, tower.spatial_merge_size) | of_windows, device)

    def tiny_config(self, ids: Mapping[str, int], size: TinySize) -> Any:
        from transformers import Qwen2_5_VLConfig

        windows = {"window_size": size.window, "fullatt_block_indexes": list(size.full_attention_blocks)}
        vision = size.vision() | windows | {"tokens_per_second": 2}
        return Qwen2_5_VLConfig(**size.options(ids, size.text(ids, interleaved=False), vision))

    def tiny_processor(self, tokenizer: Any, pixels: Mapping[str, int]) -> Any:
        import transformers

        return transformers.Qwen2_5_VLProcessor(**tiny_parts(tokenizer, pixels))


@functools.lru_cache(maxsize=512)
def _windows(grid: Grid, merge: int, window: int, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(V / merge^2,) the order of merged patches by windows, and the patches of each window, int64."""
    import torch
    from transformers.vision_utils import get_vision_window_index

    index, bounds = get_vision_window_index(torch.tensor([grid]), merge, window, patch)
    return index, bounds.diff().long()
