"""Qwen3-VL: features of several depths of the tower go to as many decoder layers (DeepStack, 2406.04334)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mssr.models.families.base import Grid
from mssr.models.families.qwen2_vl import Qwen2VL, tiny_parts
from mssr.models.shapes import TextShape, VisionShape, take

if TYPE_CHECKING:
    import torch

    from mssr.models.packing import PackedBatch
    from mssr.models.tiny import TinySize

_PUBLISHED: dict[str, Any] = {
    **{"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 3584},
    **{"patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24)},
}
"""What config.json may leave out."""


class Qwen3VL(Qwen2VL):
    """``Qwen3VLForConditionalGeneration``"""

    model_type = "qwen3_vl"

    def text_shape(self, text: Mapping[str, Any]) -> TextShape:
        return take(TextShape, {"head_dim": 128} | dict(text), qk_norm=True)

    def vision_shape(self, vision: Mapping[str, Any]) -> VisionShape:
        v = _PUBLISHED | dict(vision)
        return take(VisionShape, v, patch_bias=True, levels=len(v["deepstack_visual_indexes"]))

    def adapt(self, model: Any, packed: bool) -> None:
        super().adapt(model, packed)
        if packed:
            self.language_model(model)._deepstack_process = _add_at

    def attention_inputs(self, config: Any, batch: PackedBatch, varlen: bool) -> dict[str, Any]:
        # With the first row, that of the text, transformers would look, on the device, for sequences.
        return {"position_ids": batch.position_ids[1:] if varlen else batch.position_ids}

    def tower_positions(self, tower: Any, grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
        import torch

        from mssr.models.vision import on_device, patch_positions

        sizes = tower.num_grid_per_side, tower.spatial_merge_size
        indices, weights = zip(*(_interpolation(grid, *sizes) for grid in grids), strict=True)
        learned = {"interp_indices": torch.cat(indices), "interp_weights": torch.cat(weights)}
        return on_device(patch_positions(grids, tower.spatial_merge_size) | learned, device)

    def features(self, output: Any) -> torch.Tensor:
        """(merged patches, D * (1 + levels))"""
        import torch

        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)

    def place(self, embeds: torch.Tensor, index: torch.Tensor, features: torch.Tensor) -> dict[str, Any]:
        first, *levels = features.split(embeds.shape[-1], dim=-1)
        deeper = {"visual_pos_masks": index, "deepstack_visual_embeds": levels}
        return super().place(embeds, index, first) | deeper

    def before_load(self, engine_model: Any) -> None:
        import torch

        with torch.inference_mode():
            # vLLM adds these to every token's states and takes them for zeros where no image is. As they are
            # no module's buffers, an engine that slept has anything there.
            for level in getattr(engine_model, "deepstack_input_embeds", ()):
                level.zero_()

    def tiny_config(self, ids: Mapping[str, int], size: TinySize) -> Any:
        from transformers import Qwen3VLConfig

        text = size.text(ids, interleaved=True) | {"head_dim": size.hidden // size.heads}
        return Qwen3VLConfig(**size.options(ids, text, self.tiny_vision(size)))

    def tiny_vision(self, size: TinySize) -> dict[str, Any]:
        return size.vision() | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}

    def tiny_processor(self, tokenizer: Any, pixels: Mapping[str, int]) -> Any:
        import transformers

        halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = transformers.Qwen2VLImageProcessor(size=pixels, patch_size=16, **halves)
        videos = transformers.Qwen3VLVideoProcessor(size=pixels)
        parts = tiny_parts(tokenizer, pixels) | {"image_processor": images, "video_processor": videos}
        return transformers.Qwen3VLProcessor(**parts)


def _add_at(hidden: torch.Tensor, index: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Features of a level (placeholders, D) added to hidden states (1, S, D). transformers finds the places
    by a mask, for which it waits for the device."""
    return hidden.index_add(1, index, features[None].to(hidden.dtype))


@functools.lru_cache(maxsize=512)
def _interpolation(grid: Grid, side: int, merge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, 4) the learned positions around each patch, and their weights."""
    import torch
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights as interpolation

    how = {"mode": "bilinear", "align_corners": True, "spatial_merge_size": merge}
    return interpolation(torch.tensor([grid]), num_grid_per_side=side, **how)
