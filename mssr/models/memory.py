"""What a run keeps in memory, by part, process and phase, computed from shapes and config.

With c bytes a value of the forward pass, m of what is trained (`actor.master_dtype`) and s ranks that share a
copy (`actor.shard_size`):

- Of every trained parameter a rank holds (m + m + moments) / s bytes: itself, its gradient, its moments. What
  is not trained takes c / s, a frozen tower c, being whole on every rank.
- A layer is gathered (c) beside the next one that is on its way, and so are its gradient (c) and the float32
  copy of the one before, which is being summed over the ranks. Embedding and head stay from forward to
  backward, and so does the head's gradient.
- A decoder layer keeps of each token, for its backward pass, the float32 copy, normalised value and output of
  two norms, queries, keys, values and output of attention, and four values of the MLP's inner width; its
  backward pass holds two more of these. With activation checkpointing layers keep their inputs, and all
  that only of the layer whose turn it is. The vision tower does the same with patches.
- The head holds two chunks of float32 logits and a bit, and its gradient in float32.

scripts/bench/memory_plan.py compares this with what was allocated. What CUDA, NCCL and libraries take, and
how much is lost to fragmentation, are assumptions, and constants below.
"""

from __future__ import annotations

from dataclasses import dataclass

from mssr.config import Config
from mssr.models.published import read_shape
from mssr.models.shapes import ModelShape, VisionShape

GIB = 2**30
LARGE_GPU = 70 * GIB
"""Beyond, vLLM has larger defaults; not so on an A100, which memory does not tell."""
Parts = dict[str, float]
"""Bytes by what they are for."""
PHASES = ("generate", "update", "sync", "save")

RANK_CONTEXT = int(1.3 * GIB)
"""Of the CUDA context, cuBLAS and NCCL of a rank."""
ENGINE_CONTEXT = int(1.0 * GIB)
CUDA_GRAPHS = int(1.0 * GIB)
ASLEEP = 2 * GIB
"""What an engine that sleeps keeps: its context and the memory of its CUDA graphs."""
FRAGMENTATION = 0.1
"""Of what comes and goes in an update; shards, which stay, leave no holes."""
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

    def _block(self, d: int, kv: int, f: int, heads: int, trained: bool) -> tuple[float, float]:
        """Bytes that a layer keeps of a token for its backward pass, see the top of this file, and what that
        needs besides."""
        kept = 2 * _norm(self.c, trained) * d + self.c * (2 * d + 2 * kv + 4 * f) + 4 * heads
        if self.device == "cpu":
            kept += self.c * d  # the parts of attention's output, and the whole
        return kept, self.c * (2 * f + 2 * d)

    def _text_layer(self) -> tuple[float, float]:
        """As `_block`, of all tokens."""
        t, tokens = self.shape.text_config, self.largest.tokens
        widths = t.hidden_size, t.kv_width, t.intermediate_size, t.num_attention_heads
        kept, backward = self._block(*widths, trained=not self.adapters)
        return (kept + 7 * self.config.actor.lora.rank * self.c) * tokens, backward * tokens

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
        v, patches = self._tower, self.largest.patches
        kept, backward = self._block(v.hidden_size, v.hidden_size, v.intermediate_size, v.num_heads, True)
        # Values stay in one tensor with the queries and keys that are not needed any more.
        return (kept + 2 * self.c * v.hidden_size) * patches, backward * patches

    def _vision_kept(self) -> float:
        if not self.trains_vision:
            return 0.0
        v, patches = self._tower, self.largest.patches
        one, _ = self._vision_block()
        of_block = self.c * v.hidden_size * patches if self.config.actor.activation_checkpointing else one
        merger = (_norm(self.c, True) + 2 * self.c) * v.hidden_size
        ends = (self.c * v.patch_values + merger) * patches
        return v.depth * of_block + ends


def _norm(c: int, trained: bool) -> int:
    """Bytes that a norm keeps for each of its values: float32 input, what the weight scales, output."""
    return 4 + (c if trained else 0) + c


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Device memory of one device of an engine, on GPUs."""

    weights: float
    work: float
    """Of prefill, vision tower, logits, CUDA graphs and context."""
    cache: float
    """For keys and values; not positive where nothing is left for it."""
    token: float
    """Bytes of a token in it."""
    slots: int
    """Sequences that are decoded at a time, memory permitting."""

    @classmethod
    def of(cls, config: Config, shape: ModelShape, gpu_bytes: int, colocated: bool) -> EngineMemory:
        rollout, t, c = config.rollout, shape.text_config, value_bytes(config, "cuda")
        parallel = rollout.tensor_parallel
        taken = utilization(config, colocated) * gpu_bytes
        decoded = slots(config, gpu_bytes)
        batched = rollout.max_num_batched_tokens or (16384 if gpu_bytes > LARGE_GPU else 8192)
        # The text is split; the tower is whole on every device, and so is the work on it.
        weights = c * (shape.text / parallel + shape.vision)
        prefill = c * batched * (3 * t.intermediate_size / parallel + 6 * t.hidden_size)
        logits = 3 * 4 * decoded * t.vocab_size / parallel
        vision = 0.0
        if v := shape.vision_config:
            # As many tokens of images at a time as of text, and an image of any size.
            patches = max(config.data.max_pixels // v.patch_size**2, v.merged * batched)
            vision = c * patches * (3 * v.intermediate_size + 10 * v.hidden_size)
        graphs = 0 if rollout.enforce_eager else CUDA_GRAPHS
        work = max(prefill, vision) + logits + graphs + ENGINE_CONTEXT
        token = 2 * t.attending * max(t.kv_width / parallel, t.head_dim) * c
        return cls(weights, work, taken - weights - work, token, decoded)

    def sequences(self, length: float) -> float:
        """How many of so many tokens fit at a time."""
        return max(0.0, self.cache) / (self.token * length)


def slots(config: Config, gpu_bytes: int) -> int:
    """Sequences that an engine decodes at a time, as vLLM has it where nothing is said; 0 bytes: on CPU."""
    return config.rollout.max_num_seqs or (1024 if gpu_bytes > LARGE_GPU else 256)


def utilization(config: Config, colocated: bool) -> float:
    return config.rollout.gpu_memory_utilization or (0.65 if colocated else 0.9)


Table = dict[str, dict[str, float]]
"""Part -> phase -> bytes; a phase that is missing holds none."""


def rank_table(rank: RankMemory) -> Table:
    """What a rank holds in each phase on its GPU."""
    resident, update = rank.resident(), rank.update()
    table = {name: dict.fromkeys(PHASES, size) for name, size in resident.items()}
    for name, size in update.items():
        table.setdefault(name, {})["update"] = size
    table["optimizer states"]["save"] = 0.0 if rank.offload == "all" else rank.moments
    # The largest tensor, in the dtype of the pass: of this rank, twice, gathered, and in a bucket.
    table["weights to engines"] = {"sync": rank.c * rank.shape.text_config.embedding * (2 + 2 / rank.shards)}
    passing = sum(update.values()) - sum(resident.values()) - update["gradients"]
    table["fragmentation"] = {"update": FRAGMENTATION * passing}
    table["CUDA, NCCL"] = dict.fromkeys(PHASES, float(RANK_CONTEXT))
    return {name: row for name, row in table.items() if any(row.values())}


def engine_table(config: Config, engine: EngineMemory, colocated: bool) -> Table:
    """What an engine holds in each phase on a GPU: asleep where a rank needs its memory."""
    awake = list(PHASES)
    if colocated:
        awake.remove("update")
        if config.actor.offload == "optimizer":  # a checkpoint has all states on the device
            awake.remove("save")
    ready = [phase for phase in awake if not (colocated and phase == "sync")]
    return {
        "engine: weights": dict.fromkeys(awake, engine.weights),
        "engine: KV cache": dict.fromkeys(ready, max(0.0, engine.cache)),
        "engine: the rest": {phase: engine.work if phase in ready else ASLEEP for phase in PHASES},
    }


def totals(table: Table) -> Parts:
    """Bytes by phase."""
    return {phase: sum(row.get(phase, 0.0) for row in table.values()) for phase in PHASES}


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """What is on the GPUs of a run."""

    tables: dict[str, Table]
    """By kind of GPU: "rank + engine", or "rank" and "engine"."""
    engine: EngineMemory
    problems: list[str]
    """Why it does not fit, a line each."""

    @classmethod
    def of(
        cls, config: Config, shape: ModelShape, gpu_bytes: int, colocated: bool, work: Workload | None = None
    ) -> GpuMemory:
        largest = Pass.largest(config, shape, work or assumed_workload(config, shape))
        engine = EngineMemory.of(config, shape, gpu_bytes, colocated)
        rank = rank_table(RankMemory(config, shape, "cuda", largest))
        other = engine_table(config, engine, colocated)
        tables = {"rank + engine": rank | other} if colocated else {"rank": rank, "engine": other}
        found = []
        for kind, table in tables.items():
            phase, most = max(totals(table).items(), key=lambda x: x[1])
            if most > gpu_bytes:
                found.append(f"{kind}: {phase} takes {most / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB")
        if engine.sequences(length := longest(config)) < 1:
            found.append(
                f"engine: {max(0.0, engine.cache) / GIB:.1f} GiB are left for keys and values, and one "
                f"sequence of {length} tokens takes {engine.token * length / GIB:.1f}"
            )
        return cls(tables, engine, found)


def longest(config: Config) -> int:
    """Tokens of the longest sequence."""
    return config.data.max_prompt_length + config.rollout.max_response_length


def colocated_fits(config: Config, gpu_bytes: int) -> tuple[bool, str]:
    """Whether a rank and (a device of) an engine fit on a GPU, taking turns; and why, or why not, in a line.

    Raises:
        UserError: the model's config.json cannot be read.
    """
    memory = GpuMemory.of(config, read_shape(config.model), gpu_bytes, colocated=True)
    if memory.problems:
        return False, "; ".join(memory.problems)
    phase, most = max(totals(memory.tables["rank + engine"]).items(), key=lambda x: x[1])
    return True, f"{phase} takes most, {most / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB"
