"""`mssr doctor`: whether machines, GPUs and cluster are fit for a run, as a table with what to do.

What is checked of a machine is in `machine_checks`; this is what is asked of whom, and the cluster.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mssr.cluster import machine as facts
from mssr.cluster.machine import Machine
from mssr.config import Config
from mssr.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from mssr.models import gpus as gpu_kinds
from mssr.models.host_memory import disk_bytes
from mssr.models.loading import check_model_path, check_sight
from mssr.models.published import read_shape
from mssr.runs.config import load_config
from mssr.tools import gpu_checks
from mssr.tools.machine_checks import ERROR, GIB, OK, WARNING, Finding, Row, gib, guarded, machine_rows

if TYPE_CHECKING:
    from mssr.cluster.placement import Node
    from mssr.cluster.preflight import Found

_HERE = "this machine"
_7B_BYTES = 16_582_000_000
"""Weights of Qwen2.5-VL-7B."""


def doctor(config_file: str | None, overrides: Sequence[str], address: str | None, as_json: bool) -> int:
    """Check, print the table, and return the exit code: 2 where a row is an error."""
    rows = list(guarded("mssr doctor", "itself", examine(config_file, overrides, address)))
    print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else _table(rows))
    return EXIT_USER_ERROR if any(row.status == ERROR for row in rows) else EXIT_OK


def examine(config_file: str | None, overrides: Sequence[str], address: str | None) -> Iterator[Row]:
    """All rows. What goes wrong in a check is a row itself."""
    config, weights, disk = None, float(_7B_BYTES), 0.0
    if config_file:
        try:
            config = load_config(config_file, overrides)
            check_model_path(config.model, config.rollout.tensor_parallel)
            shape = read_shape(config.model)
            check_sight(config, shape.vision_config is not None)
            weights, disk = 2.0 * shape.parameters, disk_bytes(config, shape)
            for path in facts.missing_files(config):
                yield Row("config", "files", ERROR, f"{path} is not there", "see data.train and data.val")
            found = ", ".join(facts.shared_paths(config))
            yield Row("config", "files", OK, found or "none here; all is on the hub")
        except UserError as error:
            yield Row("config", config_file, ERROR, " ".join(str(error).split()))
    address = address or (config and config.cluster.address) or os.environ.get("RAY_ADDRESS")
    here = facts.describe()
    needs_gpus = not address and (config is None or config.cluster.device != "cpu")
    yield from machine_rows(_HERE, here, weights, needs_gpus)
    yield from guarded(_HERE, "libraries", _libraries(here), "scripts/setup.sh makes an environment")
    yield from guarded(_HERE, "disk", _disk(config.run_dir if config else Path.cwd(), disk))
    if address:
        rows = _cluster(address, here, weights, config)
        yield from guarded("cluster", "connection", rows, "ray start --head has to run there")


def _libraries(here: Machine) -> Iterator[Finding | Row]:
    """torch, vLLM and NCCL by use."""
    found = gpu_checks.libraries()
    count, nccl = found["gpus"], found["nccl"]
    yield OK, f"torch and vLLM load, for {found['device']}" + (f", with NCCL {nccl}" if nccl else "")
    if here.gpus and here.cuda and not count:
        yield ERROR, "torch sees none of the GPUs", "look at CUDA_VISIBLE_DEVICES; nvidia-smi must work"
    if count > 1:
        advice = "nvidia-smi topo -m shows how GPUs are connected, NCCL_DEBUG=INFO what NCCL makes of it"
        yield from guarded(_HERE, "NCCL", _among_gpus(here, count, advice), advice)


def _among_gpus(here: Machine, count: int, advice: str) -> Iterator[Finding]:
    if any(gpu.free_bytes < 4 * GIB for gpu in here.gpus if gpu.total_bytes):
        yield WARNING, "not measured: the GPUs are in use", "run it again on idle GPUs"
        return
    speed = gpu_checks.bandwidth(0, count, count, f"127.0.0.1:{gpu_checks.free_port()}")
    kind = gpu_kinds.find(here.gpus[0].name)
    # NCCL reaches most of NVLink's speed and a third of PCIe's.
    yield _judge(speed, f"{count} GPUs", 0.2 * kind.link / 1e9 if kind else 0.0, advice)


def _judge(speed: dict[str, float], among: str, least: float, advice: str) -> Finding:
    all_reduce, broadcast = speed["all_reduce"], speed["broadcast"]
    found = f"bus bandwidth of all-reduce {all_reduce:.1f}, of broadcast {broadcast:.1f} GB/s among {among}"
    return (WARNING, f"{found}: slow", advice) if all_reduce < least else (OK, found)


def _disk(where: Path, need: float) -> Iterator[Finding]:
    free = facts.free_disk(where)
    found = f"{gib(free)} free in {where}" + (f"; checkpoints take up to {gib(need)}" if need else "")
    advice = "set trainer.run_dir to a larger disk, or trainer.keep_checkpoints lower"
    yield (WARNING, found, advice) if free < need else (OK, found)


# The nodes of a Ray cluster.


def _cluster(address: str, here: Machine, weights: float, config: Config | None) -> Iterator[Finding | Row]:
    import ray

    from mssr.cluster.placement import find_nodes
    from mssr.cluster.preflight import survey
    from mssr.cluster.ray_start import init_ray

    run = config or Config()
    run = replace(run, cluster=replace(run.cluster, address=address))
    init_ray(run, processes=0)
    try:
        nodes = find_nodes("cpu")
        yield OK, f"{address}: {len(nodes)} nodes"
        found = survey(config, nodes)
        for node in nodes:
            yield from _node(found[node.id], weights, config)
        machines = [here, *(one.machine for one in found.values() if one.machine)]
        for line in facts.differences(machines):
            yield Row("cluster", "versions", ERROR, line, "make them equal: scripts/setup.sh, on one commit")
        yield from guarded("cluster", "GPUs", _gpus(nodes, list(found.values()), config))
        nodes = [node for node in nodes if node.total.get("GPU")]
        if len(nodes) > 1 and all(node.free.get("GPU") == node.total["GPU"] for node in nodes):
            advice = "open all ports between nodes; NCCL_SOCKET_IFNAME names the network, NCCL_DEBUG=INFO "
            yield from guarded("cluster", "NCCL", _among_nodes(nodes, run, here), advice + "tells more")
    finally:
        ray.shutdown()


def _node(found: Found, weights: float, config: Config | None) -> Iterator[Row]:
    """What is wrong with a node; if nothing is, one row says so."""
    where = f"node {found.address}"
    if found.machine is None:
        yield Row(where, "answer", ERROR, found.failure, "install mssr there as it is here")
        return
    rows = [row for row in machine_rows(where, found.machine, weights, False) if row.status != OK]
    for path in found.missing:
        rows.append(Row(where, "files", ERROR, f"{path} is not there", "put it where all nodes see it"))
    if config and not found.sees_run_dir:
        advice = "set trainer.run_dir to a directory on storage that all nodes share"
        rows.append(Row(where, "run directory", ERROR, f"{config.run_dir} is not the same there", advice))
    count = len(found.machine.gpus)
    yield from rows or [Row(where, "all checks", OK, f"{found.machine.host}: {count} GPUs")]


def _gpus(nodes: Sequence[Node], found: Sequence[Found], config: Config | None) -> Iterator[Finding]:
    from mssr.cluster.placement import Places, decide, find_nodes
    from mssr.cluster.preflight import gpu_bytes

    total = int(sum(node.total.get("GPU", 0) for node in nodes))
    free = int(sum(node.free.get("GPU", 0) for node in nodes))
    if free < total:
        advice = "ray status shows what is in use; NCCL is measured on an idle cluster"
        yield WARNING, f"{total}, {free} of them free", advice
    else:
        yield OK, f"{total}, all of them free"
    if config and config.cluster.device != "cpu" and total:
        decision = decide(config, "cuda", gpu_bytes(found))
        Places(config, "cuda", decision.colocated).check_total(find_nodes("cuda"), decision)
        yield OK, f"the run has room ({decision})"


def _among_nodes(nodes: Sequence[Node], config: Config, here: Machine) -> Iterator[Finding]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from mssr.cluster.ray_start import worker_environment

    env = {"env_vars": worker_environment(config)}

    def ask(node: Node, gpus: int, function: Any, *arguments: Any) -> Any:
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0, runtime_env=env)(function)
        return task.options(scheduling_strategy=there).remote(*arguments)

    counts = [int(node.total["GPU"]) for node in nodes]
    world, backend, limit = sum(counts), "nccl" if here.cuda else "gloo", gpu_checks.TIMEOUT_S + 60
    try:
        meet = f"{nodes[0].address}:{ray.get(ask(nodes[0], 0, gpu_checks.free_port), timeout=limit)}"
        answers = [
            ask(node, count, gpu_checks.bandwidth, sum(counts[:k]), count, world, meet, backend)
            for k, (node, count) in enumerate(zip(nodes, counts, strict=True))
        ]
        speed = ray.get(answers, timeout=limit)[0]
    except ray.exceptions.RayTaskError as error:
        raise UserError(str(error.cause)) from error
    except ray.exceptions.GetTimeoutError as error:
        raise UserError(f"no answer within {limit:.0f} s") from error
    advice = "that is TCP: NCCL needs libibverbs, ulimit -l unlimited, and /dev/infiniband in containers"
    yield _judge(speed, f"{world} GPUs on {len(nodes)} nodes", 5.0, advice)


def _table(rows: Iterable[Row]) -> str:
    lines, where, counts = [], "", dict.fromkeys((OK, WARNING, ERROR), 0)
    for row in rows:
        if row.where != where:
            lines.append(row.where)
            where = row.where
        counts[row.status] += 1
        lines.append(f"  {row.status:<8} {row.check:<14} {row.found}")
        if row.advice:
            lines.append(f"  {'':<8} {'':<14} -> {row.advice}")
    return "\n".join([*lines, f"errors: {counts[ERROR]}, warnings: {counts[WARNING]}, ok: {counts[OK]}"])
