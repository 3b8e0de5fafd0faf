"""`mssr plan`: whether a run fits on GPUs that need not be here, what to change, and how long it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mssr.cluster.placement import Decision, decide
from mssr.config import Config
from mssr.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from mssr.models import gpus
from mssr.models.host_memory import checkpoint_bytes, disk_bytes, host_memory
from mssr.models.memory import (
    GIB,
    PHASES,
    EngineMemory,
    Table,
    Workload,
    assumed_workload,
    gpu_tables,
    problems,
    totals,
    utilization,
)
from mssr.models.shapes import ModelShape, read_shape
from mssr.models.step_time import DECODING, PREFILL, TRAINING, StepTime, step_time, transfer
from mssr.runs.config import load_config

DEFAULT_KIND = "H100-80GB"


@dataclass(frozen=True, slots=True)
class Machines:
    """What the run is planned for."""

    nodes: int
    per_node: int
    """GPUs of each node."""
    kind: gpus.GpuKind


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is told."""

    config: Config
    shape: ModelShape
    machines: Machines
    work: Workload
    colocated: bool
    reason: str
    tables: dict[str, Table]
    engine: EngineMemory
    problems: list[str]

    @property
    def needed(self) -> int:
        """GPUs that ranks and engines take."""
        return _needed(self.config, self.colocated)

    def totals(self) -> list[float]:
        """Bytes of every phase of every kind of GPU."""
        return [x for table in self.tables.values() for x in totals(table).values()]

    @property
    def missing(self) -> float:
        """Bytes by which phases exceed the GPUs, and what one sequence misses in the cache."""
        limit = self.machines.kind.memory_bytes
        cache = self.engine.token * _longest(self.config) - self.engine.cache
        return sum(max(0.0, x - limit) for x in self.totals()) + max(0.0, cache)

    def time(self) -> StepTime:
        return step_time(self.config, self.shape, self.machines.kind, self.colocated, self.work)


def plan(
    config_file: str | Path,
    overrides: Sequence[str] = (),
    gpus: str | None = None,
    nodes: int = 1,
    image_tokens: int | None = None,
    response_tokens: int | None = None,
    as_json: bool = False,
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
    lengths = image_tokens, response_tokens
    made = make_plan(load_config(config_file, overrides), gpus, nodes, *lengths)
    changes: list[dict[str, Any]] = []
    enough = True
    if made.problems:
        changes, enough = _changes(made, config_file, overrides, gpus, nodes, *lengths)
    if as_json:
        print(json.dumps(_tree(made, changes, enough), indent=1))
    else:
        print("\n".join(_lines(made, changes, enough)))
    return EXIT_USER_ERROR if made.problems else EXIT_OK


def make_plan(
    config: Config, gpus_text: str | None, nodes: int, image: int | None = None, response: int | None = None
) -> Plan:
    """The plan of a config for machines, see `plan`."""
    shape, work = read_shape(config.model), assumed_workload(config, image, response)
    count, kind = gpus.parse(gpus_text) if gpus_text else _here()
    decision = decide(config, "cuda", kind.memory_bytes)
    there = nodes * count if count else _needed(config, decision.colocated)
    if config.cluster.placement == "auto" and _needed(config, True) <= there < _needed(config, False):
        decision = Decision(True, "there are too few GPUs to be apart")
    colocated, reason = decision.colocated, decision.reason
    machines = Machines(nodes, -(-there // nodes), kind)
    tables, engine = gpu_tables(config, shape, kind.memory_bytes, colocated, work)
    found = problems(config, tables, engine, kind.memory_bytes)
    if (needed := _needed(config, colocated)) > there:
        found.insert(
            0, f"{needed} GPUs are needed and {there} are there: lower actor.num_ranks, rollout.workers"
        )
    if (parallel := config.rollout.tensor_parallel) > (most := machines.per_node):
        found.insert(0, f"rollout.tensor_parallel={parallel}: an engine is on one node, with {most} GPUs")
    return Plan(config, shape, machines, work, colocated, reason, tables, engine, found)


def _here() -> tuple[int, gpus.GpuKind]:
    """GPUs of this machine; 0 where there are none that are known."""
    from mssr.cluster.machine import describe

    there = describe().gpus
    kind = gpus.find(there[0].name) if there else None
    return (len(there), kind) if kind else (0, gpus.KINDS[DEFAULT_KIND])


def _needed(config: Config, colocated: bool) -> int:
    engines = config.rollout.workers * config.rollout.tensor_parallel
    return max(config.actor.num_ranks, engines) if colocated else config.actor.num_ranks + engines


def _longest(config: Config) -> int:
    return config.data.max_prompt_length + config.rollout.max_response_length


def _changes(
    made: Plan, config_file: str | Path, overrides: Sequence[str], *machines: Any
) -> tuple[list[dict[str, Any]], bool]:
    """Settings that together come nearest, each with what it saves, those first that cost least; and whether
    it fits with all of them."""
    found: list[dict[str, Any]] = []
    for candidate in _candidates(made):
        settings = [*overrides, *(s for change in found for s in change["settings"])]
        try:
            changed = make_plan(load_config(config_file, [*settings, *candidate]), *machines)
        except UserError:
            continue  # it contradicts another, or needs a package that is not here
        if changed.colocated != made.colocated or changed.missing > made.missing - 0.01 * GIB:
            continue
        saved = max(a - b for a, b in zip(made.totals(), changed.totals(), strict=True))
        saved = max(saved, changed.engine.cache - made.engine.cache)
        keys = {setting.partition("=")[0] for setting in candidate}
        for earlier in [c for c in found if {s.partition("=")[0] for s in c["settings"]} <= keys]:
            saved += earlier["saves_bytes"]
            found.remove(earlier)
        found.append({"settings": candidate, "saves_bytes": saved})
        made = changed
        if not made.problems:
            break
    return found, not made.problems


def _candidates(made: Plan) -> Iterator[list[str]]:
    actor, longest = made.config.actor, _longest(made.config)
    if actor.keep_gathered:
        yield ["actor.keep_gathered=false"]
    yield ["actor.activation_checkpointing=true"]
    tokens = actor.micro_batch_tokens
    while tokens > longest:
        tokens = max(tokens // 2, longest)
        yield [f"actor.micro_batch_tokens={tokens}"]
    yield ["actor.head_chunk_tokens=512"]
    if made.colocated:
        held = 8 * made.engine.token * longest  # fewer sequences at a time are too slow
        least = (made.engine.weights + made.engine.work + held) / made.machines.kind.memory_bytes
        for share in range(int(20 * utilization(made.config, True)) - 1, int(20 * least), -1):
            yield [f"rollout.gpu_memory_utilization={share / 20:.2f}"]
    yield ["actor.offload_reference=true"]
    yield ["actor.offload=optimizer"]
    yield ["actor.optimizer=adamw_8bit"]
    yield ["actor.optimizer=adamw", "actor.master_dtype=bfloat16"]
    yield ["actor.lora.rank=64"]
    yield [f"rollout.tensor_parallel={2 * made.config.rollout.tensor_parallel}"]


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


def _lines(made: Plan, changes: list[dict[str, Any]], enough: bool) -> Iterator[str]:
    config, shape, machines = made.config, made.shape, made.machines
    kind = machines.kind
    yield f"{config.model.path}: {shape.text / 1e9:.2f}e9 parameters, {shape.vision / 1e9:.2f}e9 of the tower"
    where = f"{machines.nodes} x {machines.per_node} {kind.name}, {_gib(kind.memory_bytes)} GiB each"
    yield f"{where}: {config.actor.num_ranks} actor ranks, {config.rollout.workers} engines"
    yield f"{'colocated' if made.colocated else 'apart'}: {made.reason}"
    for name, table in made.tables.items():
        yield ""
        yield f"{name + ', GiB':<26}" + "".join(f"{phase:>10}" for phase in PHASES)
        for part, row in [*table.items(), ("sum", totals(table))]:
            yield f"{part:<26}" + "".join(f"{_gib(row[p]) if row.get(p) else '':>10}" for p in PHASES)
    yield ""
    length, usual = _longest(config), made.work.tokens
    yield (
        f"KV cache: {made.engine.sequences(length):.0f} sequences of {length} tokens, or "
        f"{made.engine.sequences(usual):.0f} of {usual}, at a time"
    )
    host = host_memory(config, shape, "cuda", made.colocated, machines.nodes)
    yield f"host memory of a node, GiB: {_gib(sum(host.values()))}"
    yield from (f"  {part:<34}{_gib(value):>8}" for part, value in host.items() if value)
    each, all_of_them = checkpoint_bytes(config, shape), disk_bytes(config, shape)
    yield f"disk: {_gib(each)} GiB a checkpoint, {_gib(all_of_them)} with those kept and one being written"
    yield ""
    yield from _time_lines(made)
    yield ""
    for problem in made.problems:
        yield f"does not fit: {problem}"
    if not made.problems:
        yield "fits"
        return
    for change in changes:
        yield f"  {' '.join(change['settings']):<54} saves {_gib(change['saves_bytes'])} GiB"
    more = "more GPUs or nodes, larger ones, or a smaller model"
    yield "with these it fits" if enough else f"and that is not enough: it takes {more}"


def _time_lines(made: Plan) -> Iterator[str]:
    config, work = made.config, made.work
    try:
        time = made.time()
    except UserError as error:
        yield str(error)
        return
    tokens = config.rollout.rollouts_per_step * work.tokens
    parts = f"generate {time.generate:.0f} + score {time.score:.0f} + update {time.update:.0f}"
    yield f"a step: {parts} + sync {time.sync:.0f} = {time.seconds:.0f} s"
    rate = tokens / time.seconds / made.needed
    yield f"{rate:.0f} tokens/s/GPU, MFU of the update {time.mfu:.0%}"
    if steps := config.trainer.steps:
        hours = steps * time.seconds / 3600
        beside = "validation, checkpoints and start not counted"
        yield f"{steps} steps: {hours:.1f} h, {hours * made.needed:.0f} GPU hours; {beside}"
    lengths = f"{work.image_tokens} tokens an image, {work.text_tokens} a question, {work.response_tokens}"
    yield f"assumed: {lengths} a response (--image-tokens, --response-tokens),"
    shares = (
        f"{TRAINING:.0%} of {made.machines.kind.bf16_flops:.3g} FLOP/s in training, {PREFILL:.0%} in prefill"
    )
    yield f"  {shares}, {DECODING:.0%} of {made.machines.kind.bandwidth:.3g} B/s in decoding,"
    yield f"  weights by {transfer(config, made.colocated)}"


def _tree(made: Plan, changes: list[dict[str, Any]], enough: bool) -> dict[str, Any]:
    try:
        time: dict[str, Any] | None = asdict(made.time()) | {"seconds": made.time().seconds}
    except UserError:
        time = None
    host = host_memory(made.config, made.shape, "cuda", made.colocated, made.machines.nodes)
    return {
        "fits": not made.problems,
        "problems": made.problems,
        "changes": changes,
        "fits_with_changes": enough,
        "model": {"text": made.shape.text, "vision": made.shape.vision},
        "machines": asdict(made.machines),
        "colocated": made.colocated,
        "gpus": made.needed,
        "memory_bytes": made.tables,
        "kv_cache": asdict(made.engine),
        "host_bytes": host,
        "checkpoint_bytes": checkpoint_bytes(made.config, made.shape),
        "disk_bytes": disk_bytes(made.config, made.shape),
        "step_s": time,
        "assumed": asdict(made.work),
    }
