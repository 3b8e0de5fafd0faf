"""The shape of a model: its sizes, and how many parameters each part has.

Needs neither torch nor transformers, so that `mssr plan` answers at once. Fields have the names of
config.json where they come from there; the rest says what layers are like, see `mssr.models.families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from mssr.errors import UserError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StateLayers:
    """Decoder layers that carry a state along in place of attention."""

    count: int
    linear: Mapping[str, tuple[int, int]]
    """Inputs and outputs of the linear layers of one, without its MLP."""
    vectors: int
    """Parameters of one that are in none of these, nor a norm of every decoder layer."""
    multiplied: int
    """Multiplications of a token in one, without those in these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShape:
    """The language model: n layers of an attention and an MLP, or experts of which a token passes some."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    """0: of the width as many parts as there are heads."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """Norms of queries and keys, over a head."""
    num_experts: int = 0
    """Of a layer; 0: an MLP."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    dense_layers: int = 0
    """Layers with an MLP in a model of experts."""
    gated_queries: bool = False
    """A gate for each value of attention's output comes with the queries."""
    states: StateLayers | None = None
    """The layers that have no attention, where there are such."""

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @property
    def q_width(self) -> int:
        """Values of a token's queries in a layer."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Values of a token's keys in a layer; its values are as many."""
        return self.num_key_value_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Inner values that a token has in the widest layer."""
        if self.num_experts:
            return self.num_experts_per_tok * self.moe_intermediate_size
        return self.intermediate_size

    @property
    def attending(self) -> int:
        """Layers with attention."""
        return self.num_hidden_layers - (self.states.count if self.states else 0)

    @property
    def kinds(self) -> list[tuple[int, dict[str, tuple[int, int]], int]]:
        """Decoder layers of a kind, of one the inputs and outputs of its linear layers, and what other
        parameters it has. Experts and their router are in neither."""
        d, q, kv, f = self.hidden_size, self.q_width, self.kv_width, self.intermediate_size
        queries = 2 * q if self.gated_queries else q
        attention = {"q_proj": (d, queries), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
        mlp = {} if self.num_experts else {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
        vectors = (q + 2 * kv if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        found = [(self.attending, attention | mlp, vectors + 2 * d)]
        if self.states:
            found.append((self.states.count, {**self.states.linear, **mlp}, self.states.vectors + 2 * d))
        return found

    @property
    def _experts(self) -> list[int]:
        """Elements of the experts of a layer, and of their router."""
        if not self.num_experts:
            return []
        one = self.hidden_size * self.moe_intermediate_size
        return [self.num_experts * 2 * one, self.num_experts * one, self.num_experts * self.hidden_size]

    @property
    def layer(self) -> int:
        """Parameters of the largest decoder layer."""
        return max(size for _, size in self._sizes)

    @property
    def _sizes(self) -> list[tuple[int, int]]:
        """Decoder layers of a kind, and parameters of one."""
        experts = sum(self._experts)
        return [(n, sum(i * o for i, o in linear.values()) + own + experts) for n, linear, own in self.kinds]

    @property
    def layers(self) -> int:
        """Parameters of all of them."""
        dense = 3 * self.hidden_size * self.intermediate_size - sum(self._experts)
        return sum(n * size for n, size in self._sizes) + self.dense_layers * dense

    @property
    def embedding(self) -> int:
        """Of the embedding; an untied head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def matrices(self) -> list[int]:
        """Elements of each weight of the layers that is not a vector."""
        dense = [self.hidden_size * self.intermediate_size] * 3 * self.dense_layers
        experts = self._experts * (self.num_hidden_layers - self.dense_layers)
        found = [i * o for n, linear, _ in self.kinds for i, o in linear.values() for _ in range(n)]
        return found + experts + dense

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with on its way through all layers."""
        d = self.hidden_size
        found = sum(n * i * o for n, linear, _ in self.kinds for i, o in linear.values())
        found += self.states.count * self.states.multiplied if self.states else 0
        if self.num_experts:
            sparse = self.num_hidden_layers - self.dense_layers
            found += sparse * d * (3 * self.mlp_width + self.num_experts)
            found += self.dense_layers * 3 * d * self.intermediate_size
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionShape:
    """The vision tower."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int = 3
    patch_size: int
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    window: int = 0
    """Patches of an attention window; 0: blocks see the whole image."""
    full_blocks: int = 0
    """Blocks that do so beside others that see a window."""
    gated: bool = False
    """Whether the MLP has three matrices or two."""
    norm_bias: bool = True
    patch_bias: bool = False
    num_position_embeddings: int = 0
    levels: int = 0
    """Decoder layers that get features of their own, by a merger each (DeepStack)."""

    @property
    def patch_values(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def token_pixels(self) -> int:
        """Pixels of an image that become one token."""
        return self.merged * self.patch_size**2

    @property
    def _norm(self) -> int:
        """Parameters of a norm, for each of its values."""
        return 2 if self.norm_bias else 1

    @property
    def block(self) -> int:
        c, k = self.hidden_size, self.intermediate_size
        mlp = (3 * c * k + 2 * k + c) if self.gated else (2 * c * k + k + c)
        return 4 * c * c + 4 * c + mlp + 2 * self._norm * c

    @property
    def parameters(self) -> int:
        """Of patch embedding, positions, blocks and mergers."""
        c, wide = self.hidden_size, self.merged * self.hidden_size
        merger = wide * wide + wide + wide * self.out_hidden_size + self.out_hidden_size
        ends = self.patch_values * c + (c if self.patch_bias else 0) + self.num_position_embeddings * c
        mergers = (1 + self.levels) * merger + self._norm * (c + self.levels * wide)
        return ends + self.depth * self.block + mergers

    @property
    def matrices(self) -> list[int]:
        """Elements of each weight that is not a vector."""
        c, wide = self.hidden_size, self.merged * self.hidden_size
        found = ([3 * c * c, c * c] + [c * self.intermediate_size] * (3 if self.gated else 2)) * self.depth
        found += [self.patch_values * c] + [wide * wide, wide * self.out_hidden_size] * (1 + self.levels)
        return found + ([self.num_position_embeddings * c] if self.num_position_embeddings else [])

    @property
    def multiplied(self) -> int:
        """Weights that a patch is multiplied with on its way through the tower."""
        c, m = self.hidden_size, self.merged
        block = 4 * c * c + (3 if self.gated else 2) * c * self.intermediate_size
        merger = m * c * c + c * self.out_hidden_size
        return self.patch_values * c + self.depth * block + (1 + self.levels) * merger


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A whole model."""

    text_config: TextShape
    vision_config: VisionShape | None = None
    """None of a model that takes text only."""
    tie_word_embeddings: bool = False
    image_token_id: int = -1

    @property
    def vision(self) -> int:
        """Parameters of the tower."""
        return self.vision_config.parameters if self.vision_config else 0

    @property
    def text(self) -> int:
        """Of the language model: layers, final norm, embedding and, if it is one of its own, head."""
        t = self.text_config
        return t.layers + t.embedding * (1 if self.tie_word_embeddings else 2) + t.hidden_size

    @property
    def parameters(self) -> int:
        return self.text + self.vision

    def matrices(self, vision: bool) -> list[int]:
        """Elements of each weight that is not a vector, with those of the tower or without."""
        found = self.text_config.matrices
        found += [self.text_config.embedding] * (1 if self.tie_word_embeddings else 2)
        return found + (self.vision_config.matrices if vision and self.vision_config else [])

    def adapters(self, rank: int, targets: list[str]) -> list[int]:
        """Elements of the adapters' matrices; no targets means all linear layers."""
        return [
            rank * width
            for n, linear, _ in self.text_config.kinds
            for name, pair in linear.items()
            if not targets or name in targets
            for width in pair * n
        ]


def take(kind: type[_T], tree: Mapping[str, Any], **known: Any) -> _T:
    """A shape from the part of config.json that has its fields by their names, and what is known besides.

    Raises:
        UserError: a field without default is not there.
    """
    sizes = fields(kind)  # type: ignore[arg-type]
    found = {f.name: tree[f.name] for f in sizes if tree.get(f.name) is not None} | known
    if missing := [f.name for f in sizes if f.default is MISSING and f.name not in found]:
        raise UserError(f"model.path: its config.json does not say {', '.join(missing)}")
    return kind(**found)
