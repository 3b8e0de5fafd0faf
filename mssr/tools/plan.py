"""`mssr plan`: whether a run fits on GPUs that need not be here, what to change, and how long it takes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mssr.cluster.machine import describe
from mssr.cluster.placement import Decision, decide
from mssr.cluster.turns import transport
from mssr.config import Config
from mssr.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from mssr.models import gpus
from mssr.models.host_memory import checkpoint_bytes, disk_bytes, host_memory
from mssr.models.loading import check_sight
from mssr.models.memory import PHASES, GpuMemory, totals, utilization
from mssr.models.published import read_shape
from mssr.models.rank_memory import GIB, Workload, assumed_workload, longest
from mssr.models.shapes import ModelShape
from mssr.models.step_time import DECODING, PREFILL, TRAINING, StepTime, step_time
from mssr.runs.config import load_config

DEFAULT_KIND = "H100-80GB"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is told."""

    config: Config
    shape: ModelShape
    kind: gpus.GpuKind
    nodes: int
    per_node: int
    """GPUs of each node."""
    work: Workload
    decision: Decision
    memory: GpuMemory
    problems: list[str]
    """Why the run does not fit, a line each."""

    @property
    def needed(self) -> int:
        """GPUs that ranks and engines take."""
        return _needed(self.config, self.decision.colocated)

    @property
    def missing(self) -> float:
        """Bytes by which phases exceed the GPUs, and what one sequence misses in the cache."""
        limit, engine = self.kind.memory_bytes, self.memory.engine
        sums = [size for table in self.memory.tables.values() for size in totals(table).values()]
        cache = engine.token * longest(self.config) - engine.cache
        return sum(max(0.0, size - limit) for size in sums) + max(0.0, cache)

    @property
    def transport(self) -> str:
        """By which engines get weights."""
        return transport(self.config, "cuda", self.decision.colocated)

    def time(self) -> StepTime:
        """Raises UserError where there is no estimate."""
        colocated = self.decision.colocated
        return step_time(self.config, self.shape, self.kind, colocated, self.transport, self.work)


def plan(
    config_file: str | Path,
    overrides: Sequence[str] = (),
    gpus: str | None = None,
    nodes: int = 1,
    image_tokens: int | None = None,
    response_tokens: int | None = None,
) -> int:
    """Print a plan; returns `EXIT_USER_ERROR` where the run does not fit.

    Args:
        gpus: of each node, "8xH100-80GB"; None for those of this machine, or as many H100 as the run takes.
        image_tokens, response_tokens: of a prompt and of a response, on average; None to assume some.

    Raises:
        UserError: the config is wrong, or the model's config.json cannot be read.
    """
    if nodes < 1:
        raise UserError(f"--nodes {nodes} must be at least 1")

    def planned(settings: Sequence[str]) -> Plan:
        config = load_config(config_file, [*overrides, *settings])
        return make_plan(config, gpus, nodes, image_tokens, response_tokens)

    made = planned([])
    print("\n".join([*_memory_lines(made), "", *_time_lines(made), ""]))
    if not made.problems:
        print("fits")
        return EXIT_OK
    for problem in made.problems:
        print(f"does not fit: {problem}")
    settings, enough = settings_that_fit(made, planned)
    if settings:
        print("with these it fits:" if enough else "these help, and are not enough:", *settings, sep="\n  ")
    if not enough:
        print("it takes more GPUs or nodes, larger ones, or a smaller model")
    return EXIT_USER_ERROR


def make_plan(
    config: Config, gpus_text: str | None, nodes: int, image: int | None = None, response: int | None = None
) -> Plan:
    """The plan of a config for machines, see `plan`."""
    shape = read_shape(config.model)
    check_sight(config, shape.vision_config is not None)
    work = assumed_workload(config, shape, image, response)
    count, kind = gpus.parse(gpus_text) if gpus_text else _here()
    decision = decide(config, "cuda", kind.memory_bytes)
    there = nodes * count or _needed(config, decision.colocated)
    found: list[str] = []
    if _needed(config, False) > there and decide(config, "cuda", sys.maxsize).colocated > decision.colocated:
        # It is for memory only that they would be apart: say what is to fit.
        found = [decision.reason]
        decision = Decision(True, "there are too few GPUs to be apart")
    per_node, colocated = -(-there // nodes), decision.colocated
    memory = GpuMemory.of(config, shape, kind.memory_bytes, colocated, work)
    found = memory.problems or found
    if (parallel := config.rollout.tensor_parallel) > per_node:
        found = [
            f"rollout.tensor_parallel={parallel}: an engine is on one node, with {per_node} GPUs",
            *found,
        ]
    if (needed := _needed(config, colocated)) > there:
        asked = "lower actor.num_ranks, rollout.workers"
        found = [f"{needed} GPUs are needed and {there} are there: {asked}", *found]
    return Plan(config, shape, kind, nodes, per_node, work, decision, memory, found)


def _here() -> tuple[int, gpus.GpuKind]:
    """GPUs of this machine; 0 where there are none that are known."""
    there = describe().gpus
    kind = gpus.find(there[0].name) if there else None
    return (len(there), kind) if kind else (0, gpus.KINDS[DEFAULT_KIND])


def _needed(config: Config, colocated: bool) -> int:
    engines = config.rollout.workers * config.rollout.tensor_parallel
    return max(config.actor.num_ranks, engines) if colocated else config.actor.num_ranks + engines


def settings_that_fit(made: Plan, planned: Callable[[Sequence[str]], Plan]) -> tuple[list[str], bool]:
    """Settings that together come nearest to fit, those first that cost least; and whether it fits with them.

    Args:
        planned: the plan with some settings.
    """
    found: dict[str, str] = {}
    for candidate in _candidates(made):
        wanted = found | candidate
        try:
            changed = planned(_texts(wanted))
        except UserError:
            continue  # it contradicts another, or needs a package that is not here
        if changed.missing < made.missing - 0.01 * GIB:
            found, made = wanted, changed
        if not made.problems:
            break
    return _texts(found), not made.problems


def _texts(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def _candidates(made: Plan) -> Iterator[dict[str, str]]:
    actor, engine, length = made.config.actor, made.memory.engine, longest(made.config)
    yield {"actor.keep_gathered": "false"}
    yield {"actor.activation_checkpointing": "true"}
    tokens = actor.micro_batch_tokens
    while tokens > length:
        tokens = max(tokens // 2, length)
        yield {"actor.micro_batch_tokens": str(tokens)}
    yield {"actor.head_chunk_tokens": "512"}
    if made.decision.colocated:
        held = 8 * engine.token * length  # fewer sequences at a time are too slow
        least = (engine.weights + engine.work + held) / made.kind.memory_bytes
        for share in range(int(20 * utilization(made.config, True)) - 1, int(20 * least), -1):
            yield {"rollout.gpu_memory_utilization": f"{share / 20:.2f}"}
    yield {"actor.offload_reference": "true"}
    yield {"actor.offload": "optimizer"}
    yield {"actor.optimizer": "adamw_8bit"}
    yield {"actor.optimizer": "adamw", "actor.master_dtype": "bfloat16"}
    yield {"actor.lora.rank": "64"}
    yield {"rollout.tensor_parallel": str(2 * made.config.rollout.tensor_parallel)}


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


def _memory_lines(made: Plan) -> Iterator[str]:
    config, shape, kind = made.config, made.shape, made.kind
    of_tower = f"{shape.vision / 1e9:.2f}e9 of them in the" if shape.vision_config else "no"
    yield f"{config.model.path}: {shape.parameters / 1e9:.2f}e9 parameters, {of_tower} vision tower"
    where = f"{made.nodes} x {made.per_node} {kind.name}, {_gib(kind.memory_bytes)} GiB each"
    yield f"{where}: {config.actor.num_ranks} actor ranks, {config.rollout.workers} engines"
    yield str(made.decision)
    for name, table in made.memory.tables.items():
        yield ""
        yield f"{name + ', GiB':<26}" + "".join(f"{phase:>10}" for phase in PHASES)
        for part, row in [*table.items(), ("sum", totals(table))]:
            yield f"{part:<26}" + "".join(f"{_gib(row[p]) if row.get(p) else '':>10}" for p in PHASES)
    yield ""
    at_most, usual = (f"{made.memory.engine.sequences(n):.0f}" for n in (longest(config), made.work.tokens))
    lengths = f"of {longest(config)} tokens, or {usual} of {made.work.tokens}"
    yield f"KV cache: {at_most} sequences {lengths}, at a time"
    host = host_memory(config, shape, "cuda", made.transport, made.nodes)
    yield f"host memory of a node, GiB: {_gib(sum(host.values()))}"
    yield from (f"  {part:<34}{_gib(value):>8}" for part, value in host.items() if value)
    each, all_of_them = checkpoint_bytes(config, shape), disk_bytes(config, shape)
    yield f"disk: {_gib(each)} GiB a checkpoint, {_gib(all_of_them)} with those kept and one being written"


def _time_lines(made: Plan) -> Iterator[str]:
    config, work, kind = made.config, made.work, made.kind
    try:
        time = made.time()
    except UserError as error:
        yield str(error)
        return
    parts = f"generate {time.generate:.0f} + score {time.score:.0f} + update {time.update:.0f}"
    yield f"a step: {parts} + sync {time.sync:.0f} = {time.seconds:.0f} s"
    rate = config.rollout.rollouts_per_step * work.tokens / time.seconds / made.needed
    yield f"{rate:.0f} tokens/s/GPU, MFU of the update {time.mfu:.0%}"
    if steps := config.trainer.steps:
        hours = steps * time.seconds / 3600
        beside = "validation, checkpoints and start not counted"
        yield f"{steps} steps: {hours:.1f} h, {hours * made.needed:.0f} GPU hours; {beside}"
    lengths = f"{work.image_tokens} tokens an image, {work.text_tokens} a question, {work.response_tokens}"
    yield f"assumed: {lengths} a response (--image-tokens, --response-tokens),"
    yield f"  {TRAINING:.0%} of {kind.bf16_flops:.3g} FLOP/s in training, {PREFILL:.0%} in prefill,"
    yield f"  {DECODING:.0%} of {kind.bandwidth:.3g} B/s in decoding, weights by {made.transport}"
