"""Qwen2-VL: every block of the tower sees the whole image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mssr.models.families.base import Family, Grid
from mssr.models.shapes import TextShape, VisionShape, take

if TYPE_CHECKING:
    import torch

    from mssr.models.tiny import TinySize


class Qwen2VL(Family):
    """``Qwen2VLForConditionalGeneration``"""

    model_type = "qwen2_vl"

    def text_shape(self, text: Mapping[str, Any]) -> TextShape:
        return take(TextShape, text, qkv_bias=True)

    def vision_shape(self, vision: Mapping[str, Any]) -> VisionShape:
        known = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16}
        v = known | {"patch_size": 14} | dict(vision)
        width = v["embed_dim"]
        sizes = {"hidden_size": width, "intermediate_size": int(width * v["mlp_ratio"])}
        return take(VisionShape, v, **sizes, out_hidden_size=v["hidden_size"])

    def adapt(self, model: Any, packed: bool) -> None:
        from mssr.models.vision import use_linear_patch_embed

        use_linear_patch_embed(self.tower(model))

    def tower_positions(self, tower: Any, grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
        from mssr.models.vision import on_device, patch_positions

        return on_device(patch_positions(grids, tower.spatial_merge_size), device)

    def tiny_config(self, ids: Mapping[str, int], size: TinySize) -> Any:
        from transformers import Qwen2VLConfig

        vision = {"depth": size.vision_depth, "embed_dim": size.vision_hidden, "hidden_size": size.hidden}
        ratio = {"mlp_ratio": size.vision_mlp // size.vision_hidden, "num_heads": size.vision_heads}
        return Qwen2VLConfig(**size.options(ids, size.text(ids, interleaved=False), vision | ratio))

    def tiny_processor(self, tokenizer: Any, pixels: Mapping[str, int]) -> Any:
        import transformers

        return transformers.Qwen2VLProcessor(**tiny_parts(tokenizer, pixels))


CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Structured as those of Qwen2-VL and Qwen2.5-VL; only the default system prompt is left out."""


def tiny_parts(tokenizer: Any, pixels: Mapping[str, int]) -> dict[str, Any]:
    """Of a processor."""
    import transformers

    return {
        "tokenizer": tokenizer,
        "image_processor": transformers.Qwen2VLImageProcessor(size=pixels),
        "video_processor": transformers.Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=True),
        "chat_template": CHAT_TEMPLATE,
    }
