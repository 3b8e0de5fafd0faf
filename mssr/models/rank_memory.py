"""What an actor rank keeps in memory, by part, computed from shapes and config.

With c bytes a value of the forward pass, m of what is trained (`actor.master_dtype`) and s ranks that share a
copy (`actor.shard_size`):

- Of every trained parameter a rank holds (m + m + moments) / s bytes: itself, its gradient, its moments. What
  is not trained takes c / s, a frozen tower c, being whole on every rank.
- A layer is gathered (c) beside the next one that is on its way, and so are its gradient (c) and the float32
  copy of the one before, which is being summed over the ranks. Embedding and head stay from forward to
  backward, and so does the head's gradient.
- A decoder layer keeps of each token, for its backward pass, the float32 copy, normalised value and output of
  its norms, queries, keys, values and output of attention, and four values of the MLP's inner width; its
  backward pass holds two more of these. Of experts those count that a token passes, and their inputs and
  outputs are kept too. With activation checkpointing layers keep their inputs, and all that only of the layer
  whose turn it is. The vision tower does the same with patches; an MLP without a gate keeps two values, not
  four.
- The head holds two chunks of float32 logits and a bit, and its gradient in float32.

scripts/bench/memory_plan.py compares this with what was allocated.
"""

from __future__ import annotations

from dataclasses import dataclass

from mssr.config import Config
from mssr.models.shapes import ModelShape, VisionShape

GIB = 2**30
Parts = dict[str, float]
"""Bytes by what they are for."""
_MULTIPLIED = 256
"""Tokens whose logits are multiplied, out of place, for the entropy, see `mssr.models.head`."""
_STEPPED = 2**24
"""Elements that the optimizers of `mssr.actor.adamw` step at a time; copies take 24 or 52 bytes each."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a prompt and a response are like, on average."""

    image_tokens: int
    text_tokens: int
    response_tokens: int

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens + self.response_tokens


def assumed_workload(
    config: Config, shape: ModelShape, image: int | None = None, response: int | None = None
) -> Workload:
    """Images of 640 tokens, questions of 160 and responses of 600, as far as the config's limits allow."""
    data, text = config.data, min(160, config.data.max_prompt_length // 4)
    if shape.vision_config is None:
        image = 0
    elif image is None:
        pixels = shape.vision_config.token_pixels
        image = max(data.min_pixels // pixels, min(640, data.max_pixels // pixels))
    image = min(image, data.max_prompt_length - text)
    return Workload(image, text, min(response or 600, config.rollout.max_response_length))


@dataclass(frozen=True, slots=True)
class Pass:
    """The largest forward and backward pass of a rank."""

    tokens: int
    responses: int
    """Response tokens among them."""
    patches: int
    """Of images."""

    @classmethod
    def largest(cls, config: Config, shape: ModelShape, work: Workload) -> Pass:
        """A full micro-batch, or one sequence that is longer; of responses half as long as usual, so that
        there are many images."""
        tokens = max(config.actor.micro_batch_tokens, longest(config))
        merged = shape.vision_config.merged if shape.vision_config else 1
        share = work.image_tokens / (work.tokens - work.response_tokens / 2)
        return cls(tokens, round(tokens * (1 - share)), round(tokens * share) * merged)


def longest(config: Config) -> int:
    """Tokens of the longest sequence."""
    return config.data.max_prompt_length + config.rollout.max_response_length


def value_bytes(config: Config, device: str) -> int:
    """Of a value in a forward pass."""
    return 2 if config.model.dtype in ("bfloat16", "auto" if device == "cuda" else "") else 4


def moment_bytes(config: Config) -> float:
    """Of the optimizer's states, for each trained parameter; see docs/memory.md."""
    actor = config.actor
    if actor.optimizer == "adamw_8bit":
        return 2 + 8 / 256
    return 4 if actor.master_dtype == "bfloat16" and actor.rounding == "stochastic" else 8


class RankMemory:
    """Device memory of an actor rank; of a CPU, that of its tensors.

    Args:
        device: "cpu" or "cuda".
        largest: the largest pass; by default that of `Pass.largest`.
    """

    def __init__(self, config: Config, shape: ModelShape, device: str, largest: Pass | None = None) -> None:
        self.config, self.shape, self.device = config, shape, device
        actor, text, vision = config.actor, shape.text_config, shape.vision_config
        self.trains_vision = config.trains_vision and vision is not None
        self.largest = largest or Pass.largest(config, shape, assumed_workload(config, shape))
        self.offload = actor.offload if device == "cuda" else "none"
        self.c = value_bytes(config, device)
        self.m = 4 if actor.master_dtype == "float32" else 2
        self.shards = actor.shard_size or actor.num_ranks
        adapters = shape.adapters(actor.lora.rank, actor.lora.targets) if actor.lora.rank else []
        self.adapters = sum(adapters)
        self.tensors = adapters or shape.matrices(config.trains_vision)
        """Elements of each trained tensor that is not small, before it is sharded."""
        self.sharded = shape.text + (shape.vision if config.trains_vision else 0)
        """Parameters of the base model that are sharded; the others are a frozen tower's."""
        self.trained = self.adapters or self.sharded
        self.moments = moment_bytes(config) * self.trained / self.shards
        """Bytes of them, wherever they are."""
        self.layers = text.layers
        blocks = vision.depth * vision.block if vision and config.trains_vision else 0
        self.root = self.sharded - self.layers - blocks
        """Parameters that are in no layer, and gathered from forward to backward."""
        self.layer = text.layer + self.adapters // text.num_hidden_layers

    def resident(self) -> Parts:
        """What stays from step to step."""
        config, actor, c = self.config, self.config.actor, self.c
        frozen = c * self.sharded if self.adapters else 0
        parts = {
            "parameters": (self.m * self.trained + frozen) / self.shards,
            "optimizer states": 0.0 if self.offload == "optimizer" else self.moments,
            "reference": 0.0,
        }
        away = self.device == "cuda" and actor.offload_reference
        if config.needs_reference and not self.adapters and not away:
            parts["reference"] = c * self.sharded * (1 / self.shards + (1 if actor.keep_gathered else 0))
        if self.offload == "all":
            parts = dict.fromkeys(parts, 0.0)
        if self.shape.vision_config and not self.trains_vision:
            parts["parameters"] += c * self.shape.vision
            parts["image features"] = actor.vision_cache_gib * GIB
        return parts

    def update(self) -> Parts:
        """The moment of an update at which most is held."""
        moments = [self._end_of_forward(), self._backward(vision=False), self._ends_backward(), self._step()]
        if self.trains_vision:
            moments.append(self._backward(vision=True))
        parts = max(moments, key=lambda parts: sum(parts.values()))
        return self.resident() | {"gradients": self._gradients()} | parts

    def _gradients(self) -> float:
        """Those that wait for the step."""
        if self.offload == "all":
            return 0.0
        if self.config.actor.keep_gathered:
            return 4.0 * self.trained
        # Sums over the ranks of one copy of several wait in float32, see `reduce_between_replicas`.
        layers = self.adapters or self.layers
        waiting = 4 if self.config.replicas > 1 else self.m
        return (waiting * layers + self.m * (self.trained - layers)) / self.shards

    def _gathered(self, layer: float) -> float:
        """The ends, or everything, and a layer beside the next one that is on its way."""
        if self.config.actor.keep_gathered:
            return self.c * float(self.sharded + self.adapters)
        return self.c * (self.root + layer * (2 if self.shards > 1 else 1))

    def _head(self) -> tuple[float, float]:
        """Bytes of the head's work, and of the gradient of its weight."""
        actor, vocabulary = self.config.actor, self.shape.text_config.vocab_size
        rows = min(actor.head_chunk(self.device), self.largest.responses)
        logits = (8.0 * rows + 4.0 * min(rows, _MULTIPLIED)) * vocabulary
        hidden = 2 * self.c * self.largest.responses * self.shape.text_config.hidden_size
        if self.adapters:
            return logits + hidden, 0.0
        # In float32, and converted in the end, when logits are gone.
        gradient = self.c * float(self.shape.text_config.embedding)
        converted = gradient if self.c != 4 else 0
        return max(logits, converted) + 4 * self.shape.text_config.embedding + hidden, gradient

    def _end_of_forward(self) -> Parts:
        work, _ = self._head()
        activations = self._text_kept() + self._vision_kept()
        if v := self.shape.vision_config:  # features of images, and those of each placeholder
            features = (1 + v.levels) * self.shape.text_config.hidden_size
            activations += 2 * self.c * features * (self.largest.patches // v.merged)
        return {"gathered": self._gathered(0), "activations": activations, "head": work}

    def _backward(self, vision: bool) -> Parts:
        """Of the last layer of the language model, or of the tower, when nothing before it is done yet."""
        layer = self._tower.block if vision else self.layer
        trained = 0 if self.adapters else layer
        kept = self._vision_kept() + (0 if vision else self._text_kept())
        one, backward = self._vision_block() if vision else self._text_layer()
        activations = kept + backward + (one if self.config.actor.activation_checkpointing else 0)
        # Of this layer in the dtype of the pass, and of the one before, being reduced.
        reduced = self.c * trained + (0 if self.config.actor.keep_gathered else 4 * trained)
        parts = {"gathered": self._gathered(layer), "activations": activations}
        return parts | {"head": self._head()[1], "gradients on their way": reduced}

    def _ends_backward(self) -> Parts:
        """Embedding and head: gradients in the dtype of the pass, then in float32, whole and sharded."""
        if self.adapters:
            return {}
        return {"gradients on their way": self.root * (self.c + 4 + 4 / self.shards)}

    def _step(self) -> Parts:
        """What the optimizers that are ours work with, and states that come for it."""
        largest, parts = max(self.tensors) / self.shards, {}
        if self.offload == "optimizer":
            parts["optimizer states"] = min(self.moments, max(GIB, moment_bytes(self.config) * largest))
        eight_bits = self.config.actor.optimizer == "adamw_8bit"
        if self.offload != "all" and (eight_bits or self.m == 2):
            parts["optimizer's work"] = (52.0 if eight_bits else 24.0) * min(_STEPPED, largest)
        return parts

    def _text_layer(self) -> tuple[float, float]:
        """Bytes that a layer keeps of all tokens for its backward pass, see the top of this file, and what
        that needs besides."""
        t, c, tokens = self.shape.text_config, self.c, self.largest.tokens
        d, q, f, norm = t.hidden_size, t.q_width, t.mlp_width, _norm(self.c, trained=not self.adapters)
        chosen = t.num_experts_per_tok * d  # inputs, and outputs, of a token's experts
        kept = 2 * norm * d + c * (2 * q + 2 * t.kv_width + 4 * f + 2 * chosen) + 4 * t.num_attention_heads
        if t.qk_norm:
            kept += (norm - c) * (q + t.kv_width)  # what they put out are queries and keys
        if self.device == "cpu":
            kept += c * q  # the parts of attention's output, and the whole
        kept += max(len(linear) for _, linear, _ in t.kinds) * self.config.actor.lora.rank * c
        return kept * tokens, c * (2 * f + 2 * max(d, chosen)) * tokens

    def _text_kept(self) -> float:
        t, tokens = self.shape.text_config, self.largest.tokens
        one, _ = self._text_layer()
        of_layer = self.c * t.hidden_size * tokens if self.config.actor.activation_checkpointing else one
        ends = (_norm(self.c, True) + self.c) * t.hidden_size * tokens
        how = self.config.model.attn_implementation
        if how == "eager":
            of_layer += (4 + self.c) * t.num_attention_heads * tokens**2
        mask = self.c * tokens**2 if how in ("sdpa", "eager") else 0
        return t.num_hidden_layers * of_layer + ends + mask

    @property
    def _tower(self) -> VisionShape:
        assert self.shape.vision_config is not None
        return self.shape.vision_config

    def _vision_block(self) -> tuple[float, float]:
        """As `_text_layer`, of a block of the tower and all patches."""
        v, c, patches = self._tower, self.c, self.largest.patches
        # Values stay in one tensor with the queries and keys that are not needed any more.
        kept = (2 * self._tower_norm + 6 * c) * v.hidden_size + 4 * v.num_heads
        kept += c * (4 if v.gated else 2) * v.intermediate_size
        if self.device == "cpu":
            kept += c * v.hidden_size
        return kept * patches, 2 * c * (v.intermediate_size + v.hidden_size) * patches

    @property
    def _tower_norm(self) -> int:
        """As `_norm`, of the tower's. Those with a bias are one operation: they keep input and output."""
        return 2 * self.c if self._tower.norm_bias else _norm(self.c, True)

    def _vision_kept(self) -> float:
        if not self.trains_vision:
            return 0.0
        v, patches = self._tower, self.largest.patches
        one, _ = self._vision_block()
        of_block = self.c * v.hidden_size * patches if self.config.actor.activation_checkpointing else one
        merger = (self._tower_norm + 2 * self.c) * v.hidden_size
        ends = (self.c * v.patch_values + (1 + v.levels) * merger) * patches
        return v.depth * of_block + ends


def _norm(c: int, trained: bool) -> int:
    """Bytes that a norm keeps for each of its values: float32 input, what the weight scales, output."""
    return 4 + (c if trained else 0) + c
