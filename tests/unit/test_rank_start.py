"""How a rank starts: how long it waits for the others, with how many threads, and what it sets aside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mssr.actor import distributed, worker
from mssr.actor.distributed import limit_waits, peak_memory
from mssr.actor.worker import PolicyWorker, host_threads
from mssr.cluster.ray_workers import RayPolicyWorker
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit


def limits_s() -> set[float]:
    return {dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()}


@pytest.fixture
def rendezvous(tmp_path: Path) -> Iterator[str]:
    yield f"file://{tmp_path}/rendezvous"
    dist.destroy_process_group()


def test_ranks_wait_for_a_slow_start_and_not_as_long_for_a_hung_update(
    workspace: Workspace, rendezvous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = ["cluster.start_timeout_s=4321", "cluster.hang_timeout_s=77"]
    more = ["actor.num_ranks=1", "algorithm.kl.coef=0.1", "actor.head_chunk_tokens=99"]
    config = load_config(workspace.config, [*more, *limits])
    waited: list[set[float]] = []
    for name in ("load_model", "PromptSource"):
        own = getattr(worker, name)
        monkeypatch.setattr(worker, name, lambda *a, o=own, **k: waited.append(limits_s()) or o(*a, **k))
    offloads: list[Any] = []
    own_shard = worker.shard
    monkeypatch.setattr(worker, "shard", lambda *a: offloads.append(a[4]) or own_shard(*a))
    config.actor.offload_reference = True
    rank: Any = PolicyWorker(config, 0, rendezvous)
    # Read, twice made without memory, and the data.
    assert len(waited) == 4 and set.union(*waited) == {4321.0}
    assert limits_s() == {77.0}
    assert offloads == [False, True]  # of policy and reference
    assert rank.policy.head_chunk == rank.reference.head_chunk == 99
    assert [load_config(workspace.config).actor.head_chunk(d) for d in ("cpu", "cuda")] == [256, 2048]


def test_parts_of_a_mesh_have_the_limit_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives them half an hour whatever the group has that they are parts of."""
    limited: dict[Any, float] = {}
    monkeypatch.setattr(
        dist.distributed_c10d, "_set_pg_timeout", lambda t, group: limited.update({group: t.total_seconds()})
    )
    mesh: Any = type("Mesh", (), {"get_all_groups": lambda self: ["replicate", "shard"]})()
    limit_waits(mesh, 5)
    assert limited == {dist.group.WORLD: 5, "replicate": 5, "shard": 5}


def test_only_an_optimizer_on_the_host_takes_several_threads(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(50)))
    plain = load_config(workspace.config)
    host = load_config(workspace.config, ["actor.offload=all"])
    own = load_config(workspace.config, ["actor.offload=all", "cluster.threads_per_actor=3"])
    assert [host_threads(config, "cuda", 8) for config in (plain, host, own)] == [1, 6, 3]
    assert host_threads(host, "cuda", 99) == host_threads(host, "cpu", 8) == 1
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    monkeypatch.setattr(
        dist, "all_gather_object", lambda hosts, own: hosts.__setitem__(slice(3), [own, "", own])
    )
    assert worker._ranks_here(3) == 2


def test_the_peak_of_gpu_memory_is_that_of_the_fullest_rank_and_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, reset = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)

    def all_reduce(peak: torch.Tensor, op: Any) -> None:
        assert op == dist.ReduceOp.MAX and peak.device.type == "cpu"
        peak.clamp_(min=5.0)  # what another rank has

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    assert peak_memory(device) == {"memory/actor_gpu_gib": 5.0} and reset == [device]
    assert peak_memory(torch.device("cpu")) == {}


@pytest.mark.parametrize(
    ("device", "colocated", "own", "expected"),
    [
        ("cuda", False, {}, "expandable_segments:True"),
        ("cuda", True, {}, None),
        ("cpu", False, {}, None),
        ("cuda", False, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ("cuda", False, {"PYTORCH_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_memory_grows_in_place_where_no_engine_maps_it(
    monkeypatch: pytest.MonkeyPatch, device: str, colocated: bool, own: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(own))
    found: list[str | None] = []
    monkeypatch.setattr(
        worker, "PolicyWorker", lambda *_: found.append(os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    )
    rank = RayPolicyWorker.__new__(RayPolicyWorker)
    rank._config = None  # type: ignore[assignment]
    rank.start(0, "", device, colocated)
    assert found == [expected]
