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

from collections.abc import Mapping
from dataclasses import dataclass

from mssr.config import Config
from mssr.models.shapes import ModelShape, read_shape

GIB = 2**30
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


def assumed_workload(config: Config, image: int | None = None, response: int | None = None) -> Workload:
    """Images of 640 tokens, questions of 160 and responses of 600, as far as the config's limits allow."""
    data, text = config.data, min(160, config.data.max_prompt_length // 4)
    if image is None:
        image = max(data.min_pixels // 28**2, min(640, data.max_pixels // 28**2))
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
        longest = config.data.max_prompt_length + config.rollout.max_response_length
        tokens = max(config.actor.micro_batch_tokens, longest)
        share = work.image_tokens / (work.tokens - work.response_tokens / 2)
        return cls(tokens, round(tokens * (1 - share)), round(tokens * share) * shape.vision_config.merged)


def value_bytes(config: Config, device: str) -> int:
    """Of a value in a forward pass."""
    name = config.model.dtype
    return 2 if name == "bfloat16" or (name == "auto" and device == "cuda") else 4


def moment_bytes(config: Config) -> float:
    """Of the optimizer's states, for each trained parameter; see docs/memory.md."""
    actor = config.actor
    if actor.optimizer == "adamw_8bit":
        return 2 + 8 / 256
    if actor.master_dtype == "float32":
        return 8
    return 8 if actor.rounding == "kahan" else 4


class RankMemory:
    """Device memory of an actor rank; of a CPU, that of its tensors.

    Args:
        device: "cpu" or "cuda".
        largest: the largest pass; by default that of `Pass.largest`.
    """

    def __init__(self, config: Config, shape: ModelShape, device: str, largest: Pass | None = None) -> None:
        self.config, self.shape, self.device = config, shape, device
        actor = config.actor
        self.largest = largest or Pass.largest(config, shape, assumed_workload(config))
        self.moves = device == "cuda"
        """Whether ``actor.offload`` means something."""
        self.c = value_bytes(config, device)
        self.m = 4 if actor.master_dtype == "float32" else 2
        self.shards = actor.shard_size or actor.num_ranks
        self.adapters = shape.lora(actor.lora.rank, actor.lora.targets)
        self.sharded = shape.text + (shape.vision if config.trains_vision else 0)
        """Parameters of the base model that are sharded; the others are a frozen tower's."""
        self.trained = self.adapters or self.sharded
        ends = shape.text - shape.text_config.num_hidden_layers * shape.text_layer
        self.root = ends + (shape.vision_ends if config.trains_vision else 0)
        """Parameters that are in no layer, and gathered from forward to backward."""
        self.layer = shape.text_layer + self.adapters // shape.text_config.num_hidden_layers

    def resident(self, states: bool = True) -> Parts:
        """What stays from step to step.

        Args:
            states: whether the optimizer's are on the device although ``actor.offload=optimizer``.
        """
        config, actor, c = self.config, self.config.actor, self.c
        frozen = c * self.sharded if self.adapters else 0
        tower = 0 if config.trains_vision else c * self.shape.vision
        parameters = (self.m * self.trained + frozen) / self.shards
        moments = moment_bytes(config) * self.trained / self.shards
        reference = 0.0
        if config.needs_reference and not self.adapters:
            reference = c * self.sharded * (1 / self.shards + (1 if actor.keep_gathered else 0))
        if self.moves and actor.offload == "all":
            parameters = moments = reference = 0.0
        if self.moves and actor.offload == "optimizer" and not states:
            moments = 0.0
        if self.moves and actor.offload_reference:
            reference = 0.0
        parts = {"parameters": parameters + tower, "optimizer states": moments, "reference": reference}
        if not config.trains_vision:
            parts["image features"] = actor.vision_cache_gib * GIB
        return parts

    def update(self) -> Parts:
        """The moment of an update at which most is held."""
        base = self.resident(states=False)
        moments = [self._end_of_forward(), self._backward(vision=False), self._ends_backward(), self._step()]
        if self.config.trains_vision:
            moments.append(self._backward(vision=True))
        parts = max(moments, key=lambda parts: sum(parts.values()))
        return base | {"gradients": self._gradients()} | parts

    def _gradients(self) -> float:
        """Those that wait for the step."""
        actor = self.config.actor
        if self.moves and actor.offload == "all":
            return 0.0
        return 4.0 * self.trained if actor.keep_gathered else self.m * self.trained / self.shards

    def _gathered(self, layer: float, buffers: int) -> float:
        """The ends, or everything, and a layer with so many copies of it on their way."""
        if self.config.actor.keep_gathered:
            return self.c * float(self.sharded + self.adapters)
        return self.c * (self.root + layer * (1 + (buffers if self.shards > 1 else 0)))

    def _head(self) -> tuple[float, float]:
        """Bytes of the head's work, and of the gradient of its weight."""
        actor, vocabulary = self.config.actor, self.shape.text_config.vocab_size
        rows = min(actor.head_chunk(self.device), self.largest.responses)
        logits = (8.0 * rows + 4.0 * min(rows, _MULTIPLIED)) * vocabulary
        hidden = 2 * self.c * self.largest.responses * self.shape.text_config.hidden_size
        gradient = 0 if self.adapters else self.c * self.shape.embedding
        in_float32 = 0 if self.adapters else 4 * self.shape.embedding
        # Converted in the end, when logits are gone.
        converted = gradient if self.c != 4 else 0
        return max(logits, converted) + in_float32 + hidden, gradient

    def _end_of_forward(self) -> Parts:
        work, _ = self._head()
        activations = self._text_kept() + self._vision_kept()
        return {"gathered": self._gathered(0, 0), "activations": activations, "head": work}

    def _backward(self, vision: bool) -> Parts:
        """Of the last layer of the language model, or of the tower, when nothing before it is done yet."""
        layer = self.shape.vision_block if vision else self.layer
        trained = 0 if self.adapters else layer
        kept = self._vision_kept() + (0 if vision else self._text_kept())
        one, backward = self._vision_block() if vision else self._text_layer()
        activations = kept + backward + (one if self.config.actor.activation_checkpointing else 0)
        # Of this layer in the dtype of the pass, and of the one before, being reduced.
        reduced = self.c * trained + (0 if self.config.actor.keep_gathered else 4 * trained)
        parts = {"gathered": self._gathered(layer, 1), "activations": activations}
        return parts | {"head": self._head()[1], "gradients on their way": reduced}

    def _ends_backward(self) -> Parts:
        """Embedding and head: gradients in the dtype of the pass, then in float32, whole and sharded."""
        if self.adapters:
            return {}
        return {"gradients on their way": self.root * (self.c + 4 + 4 / self.shards)}

    def _step(self) -> Parts:
        """What the optimizers that are ours work with."""
        if self.config.actor.optimizer == "adamw" and self.m == 4:
            return {}
        largest = min(_STEPPED, self.shape.embedding / self.shards)
        return {"optimizer's work": (52.0 if self.config.actor.optimizer == "adamw_8bit" else 24.0) * largest}

    def _text_layer(self) -> tuple[float, float]:
        """What a decoder layer keeps for its backward pass, and what that needs besides."""
        t = self.shape.text_config
        kept = _layer_values(t.hidden_size, t.kv_width, t.intermediate_size, self.c, not self.adapters)
        kept += 4 * t.num_attention_heads + 7 * self.config.actor.lora.rank * self.c
        if self.device == "cpu":
            kept += self.c * t.hidden_size  # the parts of attention's output, and the whole
        backward = self.c * (2 * t.intermediate_size + 2 * t.hidden_size)
        return kept * self.largest.tokens, backward * float(self.largest.tokens)

    def _text_kept(self) -> float:
        t, tokens = self.shape.text_config, self.largest.tokens
        one, _ = self._text_layer()
        of_layer = self.c * t.hidden_size * tokens if self.config.actor.activation_checkpointing else one
        ends = (_norm(self.c, True) + self.c) * t.hidden_size * tokens
        mask = 0.0
        if (how := self.config.model.attn_implementation) in ("sdpa", "eager"):
            mask = float(self.c * tokens**2)
            of_layer += (4 + self.c) * t.num_attention_heads * tokens**2 if how == "eager" else 0
        return t.num_hidden_layers * of_layer + ends + mask

    def _vision_block(self) -> tuple[float, float]:
        v, patches = self.shape.vision_config, self.largest.patches
        # Values stay in one tensor with the queries and keys that are not needed any more.
        kept = _layer_values(v.hidden_size, v.hidden_size, v.intermediate_size, self.c, True)
        kept += 2 * self.c * v.hidden_size + 4 * v.num_heads
        if self.device == "cpu":
            kept += self.c * v.hidden_size
        backward = self.c * (2 * v.intermediate_size + 2 * v.hidden_size)
        return kept * patches, float(backward * patches)

    def _vision_kept(self) -> float:
        if not self.config.trains_vision:
            return 0.0
        v, patches = self.shape.vision_config, self.largest.patches
        one, _ = self._vision_block()
        of_block = self.c * v.hidden_size * patches if self.config.actor.activation_checkpointing else one
        merger = (_norm(self.c, True) + 2 * self.c) * v.hidden_size
        ends = (self.c * v.patch_values + merger) * patches
        return v.depth * of_block + ends


def _norm(c: int, trained: bool) -> int:
    """Bytes that a norm keeps for each of its values: float32 input, what the weight scales, output."""
    return 4 + (c if trained else 0) + c


def _layer_values(d: int, kv: int, f: int, c: int, trained: bool) -> float:
    """Bytes that a transformer layer keeps of a token, see the top of this file."""
    return 2 * _norm(c, trained) * d + c * (2 * d + 2 * kv + 4 * f)


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

    @classmethod
    def of(cls, config: Config, shape: ModelShape, gpu_bytes: int, colocated: bool) -> EngineMemory:
        rollout, t, c = config.rollout, shape.text_config, value_bytes(config, "cuda")
        parallel = rollout.tensor_parallel
        taken = utilization(config, colocated) * gpu_bytes
        # The text is split; the tower is whole on every device, and so is the work on it.
        weights = c * (shape.text / parallel + shape.vision)
        batched = rollout.max_num_batched_tokens or (16384 if gpu_bytes > 70 * GIB else 8192)
        prefill = c * batched * (3 * t.intermediate_size / parallel + 6 * t.hidden_size)
        logits = 3 * 4 * slots(config, gpu_bytes) * t.vocab_size / parallel
        v = shape.vision_config
        # As many tokens of images at a time as of text, and an image of any size.
        patches = max(config.data.max_pixels // v.patch_size**2, v.merged * batched)
        vision = c * patches * (3 * v.intermediate_size + 10 * v.hidden_size)
        graphs = 0 if rollout.enforce_eager else CUDA_GRAPHS
        work = max(prefill, vision) + logits + graphs + ENGINE_CONTEXT
        token = 2 * t.num_hidden_layers * max(t.kv_width / parallel, t.head_dim) * c
        return cls(weights, work, taken - weights - work, token)

    def sequences(self, length: float) -> float:
        """How many of so many tokens fit at a time."""
        return max(0.0, self.cache) / (self.token * length)


def slots(config: Config, gpu_bytes: int) -> int:
    """Sequences that an engine decodes at a time, memory permitting; by default as vLLM has it."""
    return config.rollout.max_num_seqs or (1024 if gpu_bytes > 70 * GIB else 256)


def utilization(config: Config, colocated: bool) -> float:
    return config.rollout.gpu_memory_utilization or (0.65 if colocated else 0.9)


Table = dict[str, Mapping[str, float]]
"""Part -> phase -> bytes; a phase that is missing holds none."""


def rank_table(rank: RankMemory) -> Table:
    """What a rank holds in each phase on its GPU."""
    resident, update = rank.resident(states=False), rank.update()
    passing = sum(update.values()) - sum(resident.values()) - update["gradients"]
    # The largest tensor: gathered, converted, and in the bucket by which it travels.
    sent = float(rank.shape.embedding * (rank.m + 2 * rank.c))
    table: Table = {}
    for name in dict.fromkeys([*resident, *update]):
        everywhere = dict.fromkeys(PHASES, resident.get(name, 0.0))
        table[name] = everywhere | {"update": update.get(name, 0.0)}
    table["optimizer states"] = {**table["optimizer states"], "save": rank.resident()["optimizer states"]}
    table["weights to engines"] = {"sync": sent}
    table["fragmentation"] = {"update": FRAGMENTATION * passing}
    table["CUDA, NCCL"] = dict.fromkeys(PHASES, float(RANK_CONTEXT))
    return {name: row for name, row in table.items() if any(row.values())}


def engine_table(engine: EngineMemory, colocated: bool) -> Table:
    """What an engine holds in each phase on a GPU: asleep where a rank needs its memory."""
    # A checkpoint is begun after the weights are sent, when the engine is ready to generate.
    awake = ("generate", "sync", "save") if colocated else PHASES
    cached = ("generate", "save") if colocated else PHASES
    work = {phase: engine.work if phase in cached else ASLEEP for phase in PHASES}
    return {
        "engine: weights": dict.fromkeys(awake, engine.weights),
        "engine: KV cache": dict.fromkeys(cached, max(0.0, engine.cache)),
        "engine: the rest": work,
    }


def totals(table: Table) -> Parts:
    """Bytes by phase."""
    return {phase: sum(row.get(phase, 0.0) for row in table.values()) for phase in PHASES}


def problems(config: Config, tables: Mapping[str, Table], engine: EngineMemory, gpu_bytes: int) -> list[str]:
    """Why it does not fit on GPUs with so much memory, a line each; none where it does."""
    found = []
    for kind, table in tables.items():
        phase, most = max(totals(table).items(), key=lambda x: x[1])
        if most > gpu_bytes:
            found.append(f"{kind}: {phase} takes {most / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB")
    length = config.data.max_prompt_length + config.rollout.max_response_length
    if engine.sequences(length) < 1:
        found.append(
            f"engine: {max(0.0, engine.cache) / GIB:.1f} GiB are left for keys and values, and one sequence "
            f"of {length} tokens takes {engine.token * length / GIB:.1f}"
        )
    return found


def gpu_tables(
    config: Config, shape: ModelShape, gpu_bytes: int, colocated: bool, work: Workload | None = None
) -> tuple[dict[str, Table], EngineMemory]:
    """What is on each kind of GPU: "rank + engine", or "rank" and "engine"."""
    largest = Pass.largest(config, shape, work or assumed_workload(config))
    engine = EngineMemory.of(config, shape, gpu_bytes, colocated)
    rank = rank_table(RankMemory(config, shape, "cuda", largest))
    of_engine = engine_table(engine, colocated)
    if colocated:
        return {"rank + engine": rank | of_engine}, engine
    return {"rank": rank, "engine": of_engine}, engine


def colocated_fits(config: Config, gpu_bytes: int) -> tuple[bool, str]:
    """Whether a rank and (a device of) an engine fit on a GPU of so much memory, taking turns.

    Returns:
        And why, or why not, in a line.

    Raises:
        UserError: the model's config.json cannot be read.
    """
    tables, engine = gpu_tables(config, read_shape(config.model), gpu_bytes, colocated=True)
    if found := problems(config, tables, engine, gpu_bytes):
        return False, "; ".join(found)
    phase, most = max(totals(tables["rank + engine"]).items(), key=lambda x: x[1])
    return True, f"{phase} takes most, {most / GIB:.1f} of {gpu_bytes / GIB:.1f} GiB"
