"""What a run keeps on its GPUs, by part, kind of process and phase, and whether it fits.

What ranks hold is worked out in `mssr.models.rank_memory`. What CUDA, NCCL and libraries take, and how much
is lost to fragmentation, are assumptions, and constants below.
"""

from __future__ import annotations

from dataclasses import dataclass

from mssr.config import Config
from mssr.models.published import read_shape
from mssr.models.rank_memory import (
    GIB,
    Parts,
    Pass,
    RankMemory,
    Workload,
    assumed_workload,
    longest,
    value_bytes,
)
from mssr.models.shapes import ModelShape

LARGE_GPU = 70 * GIB
"""Beyond, vLLM has larger defaults; not so on an A100, which memory does not tell."""
PHASES = ("generate", "update", "sync", "save")

RANK_CONTEXT = int(1.3 * GIB)
"""Of the CUDA context, cuBLAS and NCCL of a rank."""
ENGINE_CONTEXT = int(1.0 * GIB)
CUDA_GRAPHS = int(1.0 * GIB)
ASLEEP = 2 * GIB
"""What an engine that sleeps keeps: its context and the memory of its CUDA graphs."""
FRAGMENTATION = 0.1
"""Of what comes and goes in an update; shards, which stay, leave no holes."""


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
        chosen = t.num_experts_per_tok * t.hidden_size
        prefill = c * batched * (3 * t.mlp_width / parallel + chosen + 6 * t.hidden_size)
        logits = 3 * 4 * decoded * t.vocab_size / parallel
        vision = deeper = 0.0
        if v := shape.vision_config:
            # As many tokens of images at a time as of text, and an image of any size.
            patches = max(config.data.max_pixels // v.patch_size**2, v.merged * batched)
            vision = c * patches * (3 * v.intermediate_size + 10 * v.hidden_size)
            deeper = c * batched * t.hidden_size * v.levels  # features for the layers that get some
        graphs = 0 if rollout.enforce_eager else CUDA_GRAPHS
        work = max(prefill, vision) + deeper + logits + graphs + ENGINE_CONTEXT
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
    largest = max(rank.shape.matrices(vision=False))
    table["weights to engines"] = {"sync": rank.c * largest * (2 + 2 / rank.shards)}
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
