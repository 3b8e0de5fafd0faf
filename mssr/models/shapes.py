"""The shape of a Qwen2.5-VL, from its config.json alone: sizes, and how many parameters each part has.

Needs neither torch nor transformers, so that `mssr plan` answers at once. Names are those of config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mssr.config import ModelConfig
from mssr.errors import UserError, first_line

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TextShape:
    """The language model; the defaults are those of transformers."""

    vocab_size: int = 152064
    hidden_size: int = 8192
    intermediate_size: int = 29568
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_width(self) -> int:
        """Values of a token's keys in a layer; its values are as many."""
        return self.num_key_value_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The vision tower."""

    depth: int = 32
    hidden_size: int = 3584
    intermediate_size: int = 3420
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window_size: int = 112
    out_hidden_size: int = 3584
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)

    @property
    def patch_values(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole model, as `mssr.models.cost.CostModel` takes it, too."""

    text_config: TextShape
    vision_config: VisionShape
    tie_word_embeddings: bool = False
    image_token_id: int = 151655

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of a decoder layer."""
        t = self.text_config
        d, kv, f = t.hidden_size, t.kv_width, t.intermediate_size
        attention = {"q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (d, d)}
        return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}

    @property
    def text_layer(self) -> int:
        """Parameters of a decoder layer: linear, of which q, k and v have biases, and two norms."""
        t = self.text_config
        return sum(i * o for i, o in self.linear.values()) + 3 * t.hidden_size + 2 * t.kv_width

    @property
    def embedding(self) -> int:
        """Of the embedding; an untied head has as many."""
        return self.text_config.vocab_size * self.text_config.hidden_size

    @property
    def vision_block(self) -> int:
        c, k = self.vision_config.hidden_size, self.vision_config.intermediate_size
        return 4 * c * c + 4 * c + 3 * c * k + 2 * k + c + 2 * c

    @property
    def vision_ends(self) -> int:
        """Of patch embedding and merger, which are in no block."""
        v = self.vision_config
        wide = v.merged * v.hidden_size
        merger = v.hidden_size + wide * wide + wide + wide * v.out_hidden_size + v.out_hidden_size
        return v.patch_values * v.hidden_size + merger

    @property
    def vision(self) -> int:
        return self.vision_config.depth * self.vision_block + self.vision_ends

    @property
    def text(self) -> int:
        """Of the language model: layers, final norm, embedding and, if it is one of its own, head."""
        t = self.text_config
        ends = self.embedding * (1 if self.tie_word_embeddings else 2) + t.hidden_size
        return t.num_hidden_layers * self.text_layer + ends

    @property
    def parameters(self) -> int:
        return self.text + self.vision

    def matrices(self, vision: bool) -> list[int]:
        """Elements of each weight that is not a vector, with those of the tower or without."""
        v, layers = self.vision_config, self.text_config.num_hidden_layers
        found = [i * o for i, o in self.linear.values()] * layers
        found += [self.embedding] * (1 if self.tie_word_embeddings else 2)
        if vision:
            c, wide = v.hidden_size, v.merged * v.hidden_size
            found += ([3 * c * c, c * c] + [c * v.intermediate_size] * 3) * v.depth
            found += [v.patch_values * c, wide * wide, wide * v.out_hidden_size]
        return found

    def adapters(self, rank: int, targets: list[str]) -> list[int]:
        """Elements of the adapters' matrices; no targets means all linear layers."""
        adapted = [self.linear[name] for name in targets or self.linear if name in self.linear]
        return [rank * width for pair in adapted for width in pair] * self.text_config.num_hidden_layers


def _published(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> ModelShape:
    text = TextShape(vocabulary, hidden, mlp, layers, heads, kv_heads)
    tied = hidden == 2048
    return ModelShape(text, VisionShape(hidden_size=1280, out_hidden_size=hidden), tied)


KNOWN = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _published(2048, 11008, 36, 16, 2, 151936),
    "Qwen/Qwen2.5-VL-7B-Instruct": _published(3584, 18944, 28, 28, 4, 152064),
}
"""By hub name, so that these can be planned for where the hub cannot be reached."""


def read_shape(model: ModelConfig) -> ModelShape:
    """Of a directory, of a name in `KNOWN`, or from the hub or its cache.

    Raises:
        UserError: there is no config.json to be read.
    """
    if (shape := KNOWN.get(model.path)) and not Path(model.path).exists():
        return shape
    file = Path(model.path) / "config.json"
    try:
        if not Path(model.path).exists():
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(model.path, "config.json"))
        return shape_of(json.loads(file.read_text()))
    except Exception as error:  # the hub's client raises many types
        raise UserError(
            f"model.path: the config.json of {model.path} cannot be read ({first_line(error)}); give a "
            "directory with it, or one of " + ", ".join(KNOWN)
        ) from error


def shape_of(tree: dict[str, Any]) -> ModelShape:
    """From the content of config.json; the hub's have the language model's keys at the top level."""
    text, vision = tree.get("text_config") or tree, tree.get("vision_config") or {}
    tied = tree.get("tie_word_embeddings") or text.get("tie_word_embeddings") or False
    return ModelShape(
        _take(TextShape, text), _take(VisionShape, vision), tied, tree.get("image_token_id", 151655)
    )


def _take(kind: type[_T], tree: dict[str, Any]) -> _T:
    known = {f.name: tree[f.name] for f in fields(kind) if tree.get(f.name) is not None}  # type: ignore[arg-type]
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})
