"""`mssr doctor`: whether machines, GPUs and cluster are fit for a run, as a table with what to do.

What is checked of a machine is in `machine_checks`; this is what is asked of whom, and the cluster.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mssr.cluster import machine as facts
from mssr.cluster.machine import Machine
from mssr.config import Config
from mssr.config.secrets import redact
from mssr.errors import EXIT_OK, EXIT_USER_ERROR, UserError
from mssr.models import gpus as gpu_kinds
from mssr.models.host_memory import disk_bytes
from mssr.models.loading import check_model_path
from mssr.models.shapes import read_shape
from mssr.runs.config import load_config
from mssr.tools import gpu_checks
from mssr.tools.machine_checks import ERROR, GIB, OK, WARNING, Finding, Row, Run, gib, guarded, machine_rows

if TYPE_CHECKING:
    from mssr.cluster.placement import Node
    from mssr.cluster.preflight import Found

_HERE = "this machine"
_7B_BYTES = 16_582_000_000
"""Weights of Qwen2.5-VL-7B."""
_ANSWER_TIMEOUT_S = 150
"""Longest that a node may take to answer."""
_VARIABLES = ("CUDA_", "NCCL_", "GLOO_", "VLLM_", "HF_", "RAY_", "PYTORCH_")
_RAY_ADDRESS_FILE = Path("/tmp/ray/ray_current_cluster")


def doctor(config_file: str | None, overrides: Sequence[str], address: str | None, as_json: bool) -> int:
    """Check, print the table, and return the exit code: 2 where a row is an error."""
    rows = list(guarded("mssr doctor", "itself", partial(examine, config_file, overrides, address)))
    print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else _table(rows))
    return EXIT_USER_ERROR if any(row.status == ERROR for row in rows) else EXIT_OK


def examine(config_file: str | None, overrides: Sequence[str], address: str | None) -> Iterator[Row]:
    """All rows. What goes wrong in a check is a row itself."""
    config = None
    if config_file:
        try:
            config = load_config(config_file, overrides)
            check_model_path(config.model)
            files = ", ".join(facts.shared_paths(config))
            yield Row("config", "files", OK, files or "none; all is on the hub")
        except UserError as error:
            yield Row("config", config_file, ERROR, " ".join(str(error).split()))
    address = address or (config and config.cluster.address) or os.environ.get("RAY_ADDRESS")
    here = facts.describe()
    run = Run(
        weights_bytes=_weights_bytes(config) if here.gpus else 0,
        by_object_store=config is not None and config.cluster.weight_transfer == "object_store",
        gpus_here=not address and (config is None or config.cluster.device != "cpu"),
    )
    yield from machine_rows(_HERE, here, run)
    yield from guarded(_HERE, "libraries", partial(_libraries, here))
    yield from guarded(_HERE, "environment", _environment)
    yield from guarded(_HERE, "disk", partial(_disk, config))
    if address:
        yield from guarded("cluster", "connection", partial(_cluster, address, here, run, config))
    elif _RAY_ADDRESS_FILE.exists():
        yield Row("cluster", "connection", OK, "not asked for: --address auto checks all nodes of this one")


def _weights_bytes(config: Config | None) -> int:
    """In bfloat16; those of a 7B model where none is named, or what is named cannot be read."""
    try:
        return 2 * read_shape(config.model).parameters if config else _7B_BYTES
    except UserError:
        return _7B_BYTES


def _libraries(here: Machine) -> Iterator[Finding | Row]:
    """torch, vLLM and NCCL by use."""
    try:
        found = gpu_checks.libraries()
    except RuntimeError as error:
        yield ERROR, f"torch, vLLM or Triton does not load: {error}", "scripts/setup.sh makes an environment"
        return
    device, count = found["device"], found["gpus"]
    yield OK, f"torch and vLLM load, for {device}" + (f", with NCCL {found['nccl']}" if found["nccl"] else "")
    if here.gpus and here.cuda and not count:
        yield ERROR, "torch sees none of the GPUs", "look at CUDA_VISIBLE_DEVICES; nvidia-smi must work"
    if count < 2:
        return
    if found["no_peer"]:
        yield OK, f"GPUs {found['no_peer'][0]} cannot read each other's memory: NCCL goes through the host"
    if min(gpu.free_bytes for gpu in here.gpus) < 4 * GIB:
        yield Row(_HERE, "NCCL", WARNING, "not measured: the GPUs are in use", "run it again on idle GPUs")
        return
    kind = gpu_kinds.find(here.gpus[0].name)
    yield from guarded(_HERE, "NCCL", partial(_bandwidth_here, count, kind.link / 1e9 if kind else 0.0))


def _bandwidth_here(count: int, link: float) -> Iterator[Finding]:
    speed = gpu_checks.bandwidth(range(count), count, f"127.0.0.1:{_free_port()}")
    found = f"{_speeds(speed)} among {count} GPUs"
    # NCCL reaches most of NVLink's speed and a third of PCIe's.
    if speed["all_reduce"] < 0.2 * link:
        advice = "nvidia-smi topo -m shows how GPUs are connected, NCCL_DEBUG=INFO what NCCL makes of it"
        yield WARNING, f"{found}, whose links have {link:.0f} GB/s", advice
    else:
        yield OK, found


def _environment() -> Iterator[Finding]:
    names = sorted(name for name in os.environ if name.startswith(_VARIABLES))
    shown = redact({name: os.environ[name] for name in names})
    yield OK, ", ".join(f"{name}={value}" for name, value in shown.items()) or "nothing of NCCL, vLLM, Ray"
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE", "CUDA_LAUNCH_BLOCKING"):
        if os.environ.get(name, "0") != "0":
            yield WARNING, f"{name}={os.environ[name]} makes everything slower", f"unset {name}"


def _disk(config: Config | None) -> Iterator[Finding]:
    where = config.run_dir if config else Path.cwd()
    free, need = facts.free_disk(where), disk_bytes(config, read_shape(config.model)) if config else 0.0
    found = f"{gib(free)} free in {where}" + (f"; checkpoints take up to {gib(need)}" if config else "")
    if free < need:
        yield WARNING, found, "set trainer.run_dir to a larger disk, or trainer.keep_checkpoints lower"
    else:
        yield OK, found


# The nodes of a Ray cluster.


def _cluster(address: str, here: Machine, run: Run, config: Config | None) -> Iterator[Finding | Row]:
    import ray

    from mssr.cluster.placement import find_nodes
    from mssr.cluster.preflight import survey

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        # A head asks for a token as soon as there is one; who names its address has to say that he has it.
        advice = "is a head running there? If it wants a token: RAY_AUTH_MODE=token and its ~/.ray/auth_token"
        yield ERROR, f"{address}: {' '.join(str(error).split())[:200]}", advice
        return
    try:
        nodes = find_nodes("cpu")
        yield OK, f"{address}: {len(nodes)} nodes"
        found = survey(config, nodes)
        for node in nodes:
            yield from _node(found[node.id], run, config)
        machines = [one.machine for one in found.values() if one.machine]
        for line in facts.differences([here, *machines]):
            yield Row("cluster", "versions", ERROR, line, "make them equal: scripts/setup.sh, on one commit")
        yield from guarded("cluster", "GPUs", partial(_gpus, nodes, machines, config))
        with_gpus = [node for node in nodes if node.total.get("GPU")]
        if len(with_gpus) > 1:
            backend = "nccl" if here.cuda else "gloo"
            yield from guarded("cluster", "NCCL", partial(_bandwidth_across, with_gpus, backend))
    finally:
        ray.shutdown()


def _node(found: Found, run: Run, config: Config | None) -> Iterator[Row]:
    """What is wrong with a node; if nothing is, one row says so."""
    where = f"node {found.address}"
    if found.machine is None:
        yield Row(where, "answer", ERROR, found.failure, "install mssr there as it is here")
        return
    rows = [row for row in machine_rows(where, found.machine, run) if row.status != OK]
    for path in found.missing:
        rows.append(Row(where, "files", ERROR, f"{path} is not there", "put it where all nodes see it"))
    if config and not found.sees_run_dir:
        advice = "set trainer.run_dir to a directory on storage that all nodes share"
        rows.append(Row(where, "run directory", ERROR, f"{config.run_dir} is not the same there", advice))
    count = len(found.machine.gpus)
    yield from rows or [Row(where, "all checks", OK, f"{found.machine.host}: {count} GPUs")]


def _gpus(nodes: Sequence[Node], machines: Sequence[Machine], config: Config | None) -> Iterator[Finding]:
    from mssr.cluster.placement import decide

    total = int(sum(node.total.get("GPU", 0) for node in nodes))
    free = int(sum(node.free.get("GPU", 0) for node in nodes))
    found = f"{total}, {free} of them free"
    if config is None or config.cluster.device == "cpu" or not total:
        yield OK, found
        return
    sizes = [gpu.total_bytes for machine in machines for gpu in machine.gpus]
    decision = decide(config, "cuda", min(sizes, default=0))
    ranks, engines = config.actor.num_ranks, config.rollout.workers * config.rollout.tensor_parallel
    need = max(ranks, engines) if decision.colocated else ranks + engines
    found = f"{found}; the run takes {need} ({decision})"
    if total < need:
        yield ERROR, found, "lower actor.num_ranks and rollout.workers, or add nodes"
    elif free < need:
        yield WARNING, found, "another run holds them: ray status shows what is in use"
    else:
        yield OK, found


def _bandwidth_across(nodes: Sequence[Node], backend: str) -> Iterator[Finding]:
    if any(node.free.get("GPU", 0) < node.total["GPU"] for node in nodes):
        yield WARNING, "not measured: some GPUs are in use", "run it again on an idle cluster"
        return
    counts = [int(node.total["GPU"]) for node in nodes]
    world, [port] = sum(counts), _ask(nodes[:1], [partial(_free_port)], [0])
    starts = [sum(counts[:k]) for k in range(len(counts))]
    calls = [
        partial(gpu_checks.bandwidth, range(k, k + count), world, f"{nodes[0].address}:{port}", backend)
        for k, count in zip(starts, counts, strict=True)
    ]
    answers = _ask(nodes, calls, counts)
    if failed := [answer for answer in answers if isinstance(answer, str)]:
        advice = (
            "open all ports between nodes; NCCL_SOCKET_IFNAME names the network, NCCL_DEBUG=INFO tells more"
        )
        yield ERROR, failed[0], advice
        return
    speed = {key: min(answer[key] for answer in answers) for key in answers[0]}
    found = f"{_speeds(speed)} among {world} GPUs on {len(nodes)} nodes"
    if speed["all_reduce"] < 5:
        advice = "that is TCP: NCCL needs libibverbs, ulimit -l unlimited, and /dev/infiniband in containers"
        yield WARNING, found, advice
    else:
        yield OK, found


def _ask(nodes: Sequence[Node], calls: Sequence[partial[Any]], gpus: Sequence[int]) -> list[Any]:
    """The result of a call on each node, which has so many GPUs there, or why there is none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    refs = [
        ray.remote(num_cpus=0, num_gpus=count, max_retries=0)(_call)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False))
        .remote(call)
        for node, call, count in zip(nodes, calls, gpus, strict=True)
    ]
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_TIMEOUT_S)
    answers: list[Any] = []
    for ref in refs:
        try:
            answers.append(ray.get(ref) if ref in ready else f"no answer within {_ANSWER_TIMEOUT_S} s")
        except ray.exceptions.RayError as error:
            answers.append(str(error).strip().splitlines()[-1].strip())
    return answers


def _call(function: partial[Any]) -> Any:
    return function()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def _speeds(speed: dict[str, float]) -> str:
    return (
        f"bus bandwidth of all-reduce {speed['all_reduce']:.1f}, of broadcast {speed['broadcast']:.1f} GB/s"
    )


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
