"""A Ray cluster of two nodes with eight GPUs each, as far as Ray knows: who sits where, and what a node costs
that is lost. The workers are stubs."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_workers
import pytest
import ray
from fake_workers import OPTIONS, FakePolicyWorker, FakeRolloutWorker
from ray.cluster_utils import Cluster as Nodes

from mssr.cluster import preflight, ray_cluster
from mssr.cluster.placement import find_nodes
from mssr.cluster.ray_cluster import RayCluster
from mssr.config import Config
from mssr.errors import TrainingError, UserError, WorkersLostError
from mssr.types import RolloutRequest, SamplingParams

pytestmark = pytest.mark.e2e
NODE = {"num_cpus": 40, "num_gpus": 8}
PARAMS = SamplingParams(1.0, 4)
REQUESTS = [RolloutRequest(f"p{k}", 0, 37 * k) for k in range(24)]


class Seated:
    def seat(self) -> tuple[str, list[str]]:
        """Node, and the GPUs that this process would see."""
        node: str = ray.get_runtime_context().get_node_id()
        return node, os.environ["CUDA_VISIBLE_DEVICES"].split(",")


class Engine(Seated, FakeRolloutWorker):
    def start(self, device: str, colocated: bool) -> int:
        self._started = device, colocated
        return super().start(device, colocated)

    def started(self) -> tuple[str, bool]:
        return self._started


class Rank(Seated, FakePolicyWorker):
    pass


class Told:
    """In place of an `EventLog`."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def restart(self, event: str, detail: str) -> None:
        self.events.append((event, detail))

    record = restart


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**NODE)
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


Start = Callable[..., RayCluster]


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: Told) -> Iterator[Start]:
    monkeypatch.setattr(ray_cluster, "RayRolloutWorker", Engine)
    monkeypatch.setattr(ray_cluster, "RayPolicyWorker", Rank)
    check = preflight.check  # all of it but drivers, of which there are none
    monkeypatch.setattr(preflight, "check", lambda config, device, used: check(config, "cpu", used))
    for module in (fake_workers, sys.modules[__name__]):
        ray.cloudpickle.register_pickle_by_value(module)
    while any(node.free.get("GPU") != 8 for node in find_nodes("cuda")):
        time.sleep(0.1)  # Ray takes a while to have back what the test before had
    started: list[RayCluster] = []

    def start(ranks: int, engines: int, each: int = 1, **cluster: Any) -> RayCluster:
        config = Config()
        config.data.train, config.trainer.run_dir = str(tmp_path / "rows.jsonl"), str(tmp_path / "run")
        Path(config.data.train).touch()
        config.actor.num_ranks, config.rollout.workers = ranks, engines
        config.rollout.tensor_parallel, config.rollout.max_num_seqs = each, 4
        config.rollout.max_response_length = 4
        config.rollout.engine_options = {OPTIONS: {"generate_s": 0.1, "update_s": 0.0}}
        config.cluster = replace(config.cluster, device="cuda", weight_transfer="object_store", **cluster)
        started.append(RayCluster(config, told, lambda: False, told.notes.append))
        return started[-1]

    yield start
    for cluster in started:
        cluster.shutdown()


def seats(workers: list[Any]) -> list[tuple[str, list[str]]]:
    return ray.get([worker.handle.seat.remote() for worker in workers])


def test_what_does_not_fit_is_a_line_before_anything_starts(
    nodes: Nodes, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"need 17 GPU, 17 CPU, and free are .* room for 16 of 17 parts"):
        start(16, 1, placement="apart")
    with pytest.raises(UserError, match=r"room for 0 of 2 parts .*; ask for less, or add machines$"):
        start(0, 2, each=10)
    monkeypatch.setattr(ray_cluster, "PLACEMENT_TIMEOUT_S", 1.0)
    others = [ray.util.placement_group([{"GPU": 6.0}]) for _ in range(2)]
    ray.get([group.ready() for group in others])
    with pytest.raises(UserError, match=r"free are 2 of 8 GPU, .* others hold the rest: wait for them"):
        start(4, 1, placement="apart")
    for group in others:
        ray.util.remove_placement_group(group)


def test_a_pair_of_engine_and_rank_shares_one_gpu(nodes: Nodes, start: Start, told: Told) -> None:
    cluster = start(2, 2, placement="colocated")
    engines, ranks = seats(cluster._engines), seats(cluster._ranks)
    assert engines == ranks and {len(gpus) for _, gpus in engines} == {1}
    assert engines[0][0] == engines[1][0] and engines[0][1] != engines[1][1]
    # Or they would not sleep.
    assert ray.get([engine.handle.started.remote() for engine in cluster._engines]) == [("cuda", True)] * 2
    assert not cluster.ranks_idle_in_rollout
    assert told.notes == ["placement colocated: as cluster.placement says"] and told.events == []


def test_a_run_goes_on_without_the_engines_of_a_node_and_takes_them_back(
    nodes: Nodes, start: Start, told: Told
) -> None:
    """Of three engines of four GPUs, two have one node; the third and the ranks have the other."""
    cluster = start(2, 3, each=4, placement="apart", replace_timeout_s=1.0)
    engines, ranks = seats(cluster._engines), seats(cluster._ranks)
    assert cluster.ranks_idle_in_rollout and told.notes[0].startswith("placement apart")
    assert all(len(gpus) == 4 for _, gpus in engines)
    assert len({(node, gpu) for node, gpus in engines + ranks for gpu in gpus}) == 14
    assert len({node for node, _ in ranks}) == 1
    assert [gpus for _, gpus in ranks] == sorted(gpus for _, gpus in ranks)
    assert [len(list(own)) for _, own in itertools.groupby(node for node, _ in engines)] in ([1, 2], [2, 1])
    with_ranks = ranks[0][0]
    [lost] = {node for node, _ in engines} - {with_ranks}
    cluster.sync_weights(7)

    def lose_a_node(index: int, rollout: Any) -> None:
        if lost_nodes := [node for node in nodes.worker_nodes if node.node_id == lost]:
            nodes.remove_node(lost_nodes[0])

    rollouts = cluster.generate(REQUESTS, PARAMS, lose_a_node)
    assert [r.prompt_id for r in rollouts] == [r.prompt_id for r in REQUESTS]
    assert [name for name, _ in told.events] == ["engine_died", "engine_lost"]
    assert (
        ": 8 GPU did not become free" in told.events[1][1] and "goes on with 1 engines" in told.events[1][1]
    )
    cluster.prepare(["p1", "p2"])
    cluster.sync_weights(8)
    assert {r.policy_version for r in cluster.generate(REQUESTS[:8], PARAMS)} == {8}
    assert len(cluster._engines) == 1 and len(told.events) == 2

    nodes.add_node(**NODE)
    ray.get([cluster._places.engines[k].unit.group.ready() for k in cluster._missing])
    cluster.sync_weights(9)
    assert told.events[2][0] == "engine_back" and [e.number for e in cluster._engines] == [0, 1, 2]
    assert {r.policy_version for r in cluster.generate(REQUESTS[:20], PARAMS)} == {9}
    assert lost not in {node for node, _ in seats(cluster._engines)}

    [gone] = [node for node in nodes.worker_nodes if node.node_id == with_ranks]
    nodes.remove_node(gone)
    with pytest.raises(WorkersLostError):
        cluster.begin_save("nowhere")
    with pytest.raises(TrainingError, match=r"2 of 2 actor ranks have lost their machine, and 2 GPU did not"):
        cluster.restart()
    nodes.add_node(**NODE)
    cluster._config.cluster.replace_timeout_s = 300.0
    cluster.restart()
    assert len(seats(cluster._ranks)) == 2
