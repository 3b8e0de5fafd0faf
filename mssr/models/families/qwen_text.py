"""Qwen2, Qwen2.5 and Qwen3: text only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mssr.models.families.base import Family
from mssr.models.shapes import ModelShape, TextShape, take

if TYPE_CHECKING:
    import torch

    from mssr.models.encoded import EncodedPrompt
    from mssr.models.packing import PackedBatch
    from mssr.models.tiny import TinySize


class QwenText(Family):
    """What they have in common."""

    auto_class = "AutoModelForCausalLM"
    tower_name = None
    language_model_name = "model"

    def shape(self, tree: Mapping[str, Any]) -> ModelShape:
        return ModelShape(self.text_shape(tree), None, bool(tree.get("tie_word_embeddings")))

    def text_config(self, config: Any) -> Any:
        return config

    def merge_size(self, config: Any) -> int:
        return 1

    def placeholder_ids(self, config: Any) -> list[int]:
        return []  # their tokenizers have <|image_pad|>, which stands for nothing here

    def rope_positions(self, model: Any, prompt: EncodedPrompt) -> torch.Tensor:
        import torch

        return torch.arange(len(prompt.token_ids)).expand(3, -1)

    def attention_inputs(self, config: Any, batch: PackedBatch, varlen: bool) -> dict[str, Any]:
        return super().attention_inputs(config, batch, varlen) | {"position_ids": batch.position_ids[0]}

    def tiny_processor(self, tokenizer: Any, pixels: Mapping[str, int]) -> Any:
        tokenizer.chat_template = CHAT_TEMPLATE
        return tokenizer

    def _tiny_text(self, ids: Mapping[str, int], size: TinySize) -> dict[str, Any]:
        text = size.text(ids, interleaved=False)
        del text["rope_parameters"]["mrope_section"]
        return text | {"dtype": "float32"}


class Qwen2(QwenText):
    """``Qwen2ForCausalLM``: Qwen2 and Qwen2.5."""

    model_type = "qwen2"

    def text_shape(self, text: Mapping[str, Any]) -> TextShape:
        return take(TextShape, text, qkv_bias=True)

    def tiny_config(self, ids: Mapping[str, int], size: TinySize) -> Any:
        from transformers import Qwen2Config

        return Qwen2Config(**self._tiny_text(ids, size))


class Qwen3(QwenText):
    """``Qwen3ForCausalLM``"""

    model_type = "qwen3"

    def text_shape(self, text: Mapping[str, Any]) -> TextShape:
        return take(TextShape, {"head_dim": 128} | dict(text), qk_norm=True)

    def tiny_config(self, ids: Mapping[str, int], size: TinySize) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(**self._tiny_text(ids, size), head_dim=size.hidden // size.heads)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Structured as theirs: a content is text and no list of parts. The default system prompt is left out."""
