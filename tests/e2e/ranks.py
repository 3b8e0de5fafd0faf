"""Ranks of the actor without Ray: two processes, started once, that run the jobs of many tests."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from mssr.data.prompt_source import PromptSource
from mssr.runs.config import load_config
from mssr.types import TrainBatch
from tests.conftest import Workspace

Tensors = dict[str, torch.Tensor]
RunRanks = Callable[[TrainBatch | None, int, list[dict[str, Any]]], list[tuple[Tensors, dict[str, float]]]]


@contextlib.contextmanager
def rank_processes(workspace: Workspace) -> Iterator[RunRanks]:
    """Yields ``run(batch, ranks, jobs)``, which runs jobs one after the other on the ranks and returns what
    rank 0 has after each: weights, or with ``gradient`` the gradients of the first update; and metrics.

    A job is a dictionary with ``overrides`` of the workspace's config, ``steps`` (1), ``load`` and ``save``
    directories, ``gradient``, and a ``batch`` of its own in place of the common one. Metrics have
    ``distinct_states``: how many different ones the ranks hold of parameters and optimizer.
    """
    # A process for each rank: torch remembers, beyond the end of a process group, which rank it was.
    pools: list[Pool] = []

    def run(
        batch: TrainBatch | None, ranks: int, jobs: list[dict[str, Any]]
    ) -> list[tuple[Tensors, dict[str, float]]]:
        while len(pools) < ranks:
            pools.append(multiprocessing.get_context("spawn").Pool(1))
        directory = Path(tempfile.mkdtemp(dir=workspace.path))
        _write_jobs(directory, batch, ranks, jobs)
        try:
            _wait(
                [
                    pool.apply_async(_run_jobs, (rank, str(workspace.config), str(directory)))
                    for rank, pool in enumerate(pools[:ranks])
                ]
            )
        except BaseException:
            while pools:  # the other rank waits for the one that failed
                pools.pop().terminate()
            raise
        return torch.load(directory / "results.pt")

    try:
        yield run
    finally:
        for pool in pools:
            pool.terminate()


def _wait(running: list[AsyncResult[None]]) -> None:
    """Until all have ended, or one has failed."""
    while running:
        running[0].wait(0.05)
        for ended in [result for result in running if result.ready()]:
            ended.get()
            running.remove(ended)


def _write_jobs(directory: Path, batch: TrainBatch | None, ranks: int, jobs: list[dict[str, Any]]) -> None:
    spec = []
    for number, job in enumerate(jobs):
        own = job.get("batch", batch)
        fields = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
        np.savez(
            directory / f"batch-{number}.npz",
            **{k: v for k, v in fields.items() if isinstance(v, np.ndarray)},
        )
        overrides = [*job.get("overrides", []), f"actor.num_ranks={ranks}"]
        spec.append(job | {"batch": number, "overrides": overrides, "prompt_ids": own.prompt_ids})
    (directory / "spec.json").write_text(json.dumps(spec))


def _run_jobs(rank: int, config_file: str, directory: str) -> None:
    """In a process of a rank."""
    from mssr.actor.worker import PolicyWorker

    here = Path(directory)
    results = []
    for number, job in enumerate(json.loads((here / "spec.json").read_text())):
        config = load_config(config_file, job["overrides"])
        arrays = np.load(here / f"batch-{number}.npz")
        batch = TrainBatch(prompt_ids=tuple(job["prompt_ids"]), kl_coef=config.algorithm.kl.coef, **arrays)
        worker = PolicyWorker(config, rank, f"file://{here}/rendezvous-{number}")
        if job.get("load"):
            worker.checkpoint.load(job["load"])
        if job.get("gradient"):
            results.append(_first_gradient(worker, batch))
        elif job.get("gather"):
            results.append((_gathered(job["gather"]), {}))
        else:
            metrics: dict[str, float] = {}
            for step in range(job.get("steps", 1)):
                metrics = worker.update(batch, step)
            metrics["distinct_states"] = _distinct_states(worker)
            results.append((worker.export_weights(), metrics))
        if job.get("save"):
            worker.checkpoint.begin(job["save"])
            worker.checkpoint.result()
        worker.close()
    if rank == 0:
        torch.save(results, here / "results.pt")


def _gathered(shapes: list[tuple[int, ...]]) -> Tensors:
    """Tensors that count up from 0, sharded by rows and gathered again; every second one is not sharded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from mssr.actor.distributed import full_tensors

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = [torch.arange(math.prod(s), dtype=torch.float32).reshape(s) for s in shapes]
    named = [(f"{k}", t if k % 2 else distribute_tensor(t, mesh, [Shard(0)])) for k, t in enumerate(whole)]
    named[0] = ("0", named[0][1].to(torch.float64))
    return dict(full_tensors(named, max_bytes=100))


def _first_gradient(worker: Any, batch: TrainBatch) -> tuple[Tensors, dict[str, float]]:
    from mssr.actor.distributed import full_tensors

    updater = worker.updater
    state = updater.begin(batch)
    plan = updater.plan(batch, 0).updates[0]
    runs: list[int] = []
    first_layer: Any = worker.policy.layers[0]
    first_layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    updater._before_update(state, plan.ranks[worker.rank], needs_old=False)
    with contextlib.ExitStack() as stack:
        gathers, scatters, all_reduces = (
            stack.enter_context(
                mock.patch.object(torch.distributed, verb, wraps=getattr(torch.distributed, verb))
            )
            for verb in ("all_gather_single", "reduce_scatter_single", "all_reduce")
        )
        updater.backward(state, plan)
    named = worker.policy.named_parameters()
    tensors = dict(full_tensors((n, p.grad) for n, p in named if p.grad is not None))
    counts = {"passes": len(plan.ranks[0]), "layer_runs": len(runs), "all_reduces": all_reduces.call_count}
    return tensors, counts | {"gathers": gathers.call_count, "scatters": scatters.call_count}


def _distinct_states(worker: Any) -> int:
    from mssr.actor.distributed import local_tensor

    digest = hashlib.sha256()
    parameters = [p for p in worker.policy.parameters() if p.requires_grad]
    state = worker.updater.optimizer.state
    for value in (v for p in parameters for v in (p, *state.get(p, {}).values())):
        digest.update(local_tensor(value.detach()).flatten().view(torch.uint8).numpy().tobytes())
    digests = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest.hexdigest())
    return len(set(digests))


def make_batch(workspace: Workspace, prompt_ids: list[str], seed: int = 0) -> TrainBatch:
    """Random responses of random lengths, with random advantages."""
    source = PromptSource(load_config(workspace.config))
    rng = np.random.default_rng(seed)
    prompts = [source.encoder.encode(source.row(i)).token_ids.numpy() for i in prompt_ids]
    responses = [rng.integers(0, 250, rng.integers(2, 14)) for _ in prompt_ids]
    parts = [part for pair in zip(prompts, responses, strict=True) for part in pair]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    return TrainBatch(
        prompt_ids=tuple(prompt_ids),
        tokens=np.concatenate(parts).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prompt_lengths=np.array([len(p) for p in prompts]),
        advantages=rng.standard_normal(len(prompt_ids)).astype(np.float32),
        engine_log_probs=np.full(sum(map(len, responses)), -3.0, dtype=np.float32),
    )


def relative_difference(a: Tensors, b: Tensors) -> float:
    """Of the whole vectors, so that no single near-zero entry decides."""
    assert a.keys() == b.keys()
    difference = sum(((a[k] - b[k]).double() ** 2).sum() for k in a)
    norm = sum((a[k].double() ** 2).sum() for k in a)
    return float((difference / norm) ** 0.5)
