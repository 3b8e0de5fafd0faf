"""The order in which engines and ranks get their devices and weights, told by workers that record calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import ray

from mssr.cluster.ray_calls import Failure, Worker, WorkerDiedError
from mssr.cluster.ray_cluster import RayCluster
from mssr.cluster.ray_workers import FinishedPart, RayPolicyWorker, RayRolloutWorker, Sent
from mssr.cluster.turns import Turns, transport
from mssr.config import Config
from mssr.errors import TrainingError, TransferInterruptedError, UserError, WorkersLostError
from mssr.rollout.checksums import Loaded
from mssr.runs.config import load_config
from mssr.types import PackedRollouts, Rollout, RolloutRequest, SamplingParams

pytestmark = pytest.mark.unit
PARAMS = SamplingParams(1.0, 4)
Fail = Callable[[str, str, int], BaseException | None]


class Call:
    """Stands for an object ref; the call was made at once."""

    def __init__(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value, self.error = value, error


class FakeCalls:
    """`Calls` without waiting."""

    def gather(self, refs: Sequence[tuple[Worker, Call]], **_: Any) -> list[Any]:
        return [Failure(worker, ref.error) if ref.error else ref.value for worker, ref in refs]

    def parts(self, streams: Mapping[Worker, Call], stop: Any) -> Iterator[tuple[Worker, Any]]:
        for worker, stream in streams.items():
            yield worker, Failure(worker, stream.error) if stream.error else stream.value


class Method:
    def __init__(self, lab: Lab, worker: str, name: str) -> None:
        self.lab, self.worker, self.name = lab, worker, name

    def options(self, **_: Any) -> Method:
        return self

    def remote(self, *args: Any) -> Call:
        return self.lab.call(self.worker, self.name, args)


class Handle:
    def __init__(self, lab: Lab, worker: str) -> None:
        self._lab, self._worker = lab, worker

    def __getattr__(self, name: str) -> Method:
        return Method(self._lab, self._worker, name)


class Lab:
    """A `RayCluster` of two engines and two ranks.

    Args:
        fail: what a call raises: asked with worker, method and how often it was called on a worker of that
            name before.
    """

    def __init__(
        self, colocated: bool, fail: Fail = lambda *call: None, transfer: str = "auto", **rollout: Any
    ) -> None:
        config = Config()
        config.cluster.weight_transfer = transfer
        config.rollout.workers = config.actor.num_ranks = 2
        for key, value in rollout.items():
            setattr(config.rollout, key, value)
        self.fail = fail
        self.record: list[tuple[str, str]] = []
        self.arguments: dict[tuple[str, str], Any] = {}
        """Of the last call."""
        self.counts: dict[tuple[str, str], int] = {}
        self.sent: dict[str, int] = {}
        self.held: dict[str, dict[str, int]] = {}
        cluster = self.cluster = RayCluster.__new__(RayCluster)
        cluster._config, cluster._calls, cluster._stop = config, FakeCalls(), lambda: False  # type: ignore[assignment]
        cluster._report = cluster._record = lambda event, detail: None
        cluster._shelf = SimpleNamespace(add=None, drop=lambda ids: None, fetcher=lambda ids: None)  # type: ignore
        cluster._ranks, cluster._engines, cluster._missing = [], [], []
        cluster._device, cluster._colocated = "cuda", colocated
        seats = SimpleNamespace(engines=[Mock(), Mock()], ranks=range(2), wait=lambda *_: [])
        cluster._places = seats  # type: ignore[assignment]
        cluster._worker = self.worker  # type: ignore[method-assign, assignment]
        cluster._turns = Turns(config, cluster._workers(), cluster._calls, "cuda", colocated)

    def worker(self, cls: type, name: str, number: int, seat: Any) -> Worker:
        assert cls in (RayPolicyWorker, RayRolloutWorker)
        return Worker(name, Handle(self, name), number)

    def call(self, worker: str, method: str, args: tuple[Any, ...]) -> Call:
        key = worker, method
        self.counts[key] = count = self.counts.get(key, -1) + 1
        self.arguments[key] = args
        self.record.append((worker, f"wake {args[0]}" if method == "wake" else method))
        if error := self.fail(worker, method, count):
            return Call(error=error)
        return Call(getattr(self, f"_{method}", lambda *_: None)(worker, *args))

    def _start(self, worker: str, *_: Any) -> int:
        return 8

    def _open_door(self, worker: str, transport: str) -> tuple[str, Any]:
        return f"GPU of {worker}", (worker, 0, b"")

    def _send_weights(self, worker: str, *_: Any) -> Sent:
        return Sent("stored", self.sent)

    def _load_weights(self, worker: str, source: Any, version: int, check: bool) -> list[Loaded]:
        held = self.held.get(worker, self.sent)
        return [Loaded("", held, held)] if check else [Loaded("")]

    def _update(self, worker: str, *_: Any) -> dict[str, float]:
        return {}

    def _generate(self, worker: str, call: int, requests: Any, params: Any) -> FinishedPart:
        empty = np.zeros(1, np.int32)
        rollout = Rollout("p", 0, empty, empty, np.zeros(1, np.float32), "stop", 0, "")
        return FinishedPart([i for i, _ in requests], PackedRollouts.of([rollout] * len(requests)))

    def generate(self) -> None:
        requests = [RolloutRequest(f"p{k}", 0, k) for k in range(12)]
        assert len(self.cluster.generate(requests, PARAMS)) == 12

    def update(self) -> None:
        self.cluster.update(SimpleNamespace(prompt_ids=()), 0)  # type: ignore[arg-type]

    def told(self) -> list[str]:
        """What happened since the last call: "both engines: sleep"."""
        events = [
            (method, worker.replace("actor ", ""))
            for worker, method in self.record
            if method not in ("feed", "rendezvous")
        ]
        self.record.clear()
        lines = []
        for (method, kind), group in itertools.groupby(events, key=lambda e: (e[0], e[1][:-2])):
            names = sorted({name for _, name in group})
            lines.append(f"{f'both {kind}s' if len(names) == 2 else names[0]}: {method}")
        return lines


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "kill", lambda handle: None)


TO_ENGINES = ["both ranks: make_room", "both engines: wake weights", "both ranks: open_door"]
TO_ENGINES += ["both engines: load_weights", "both ranks: send_weights", "both engines: wake kv_cache"]
SEND_TO_1 = ["both ranks: open_door", "engine 1: load_weights", "both ranks: send_weights"]


def died(worker: str, method: str, count: int) -> Fail:
    def fail(*call: Any) -> BaseException | None:
        return WorkerDiedError("died") if call == (worker, method, count) else None

    return fail


def test_three_steps_with_a_validation_and_a_replaced_engine() -> None:
    """generate, sleep, update, wake weights, send, wake kv_cache. vLLM starts alone on its device; what is
    asked twice of those whose turn it is costs nothing."""
    lab = Lab(colocated=True, fail=died("engine 1", "generate", 4))
    cluster = lab.cluster
    cluster._launch()
    assert lab.told() == ["both engines: start", "both engines: sleep", "both ranks: start"]
    cluster.sync_weights(0)
    lab.generate()  # validation
    assert lab.told() == [*TO_ENGINES, "both engines: generate"]
    for step in range(1, 4):
        lab.generate()
        told = lab.told()
        if step == 3:
            again = ["both ranks: make_room", "engine 1: start", *SEND_TO_1]
            assert told[: len(again) + 1] == ["both engines: generate", *again]
            assert lab.arguments["engine 1", "load_weights"][1] == 2  # the version that the others have
            [to_0, to_1] = [lab.arguments[f"actor rank {k}", "send_weights"][1] for k in range(2)]
            assert not to_0 and len(to_1) == 1
        else:
            assert told == ["both engines: generate"]
        lab.update()
        lab.update()
        assert lab.told() == ["both engines: sleep", "both ranks: update"]
        cluster.sync_weights(step)
        assert lab.told() == TO_ENGINES
        if step == 2:
            lab.generate()  # validation
            assert lab.told() == ["both engines: generate"]


@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_engines_sleep_while_states_that_wait_elsewhere_are_saved(offload: str) -> None:
    lab = Lab(colocated=True)
    lab.cluster._config.actor.offload = offload
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    lab.told()
    lab.cluster.begin_save("there")
    lab.generate()
    saved, generated = ["both ranks: begin_save", "both ranks: finish_save"], ["both engines: generate"]
    if offload == "none":
        assert lab.told() == [*saved, *generated]
    else:
        assert lab.told() == ["both engines: sleep", *saved, *TO_ENGINES, *generated]


def test_every_rank_sends_to_the_process_on_its_device() -> None:
    lab = Lab(colocated=True)
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    for k in range(2):
        source = lab.arguments[f"engine {k}", "load_weights"][0]
        assert dict(source.doors) == {f"GPU of actor rank {k}": (f"actor rank {k}", 0, b"")}
        kind, loads, check = lab.arguments[f"actor rank {k}", "send_weights"]
        assert kind == "ipc" and len(loads) == 1 and check is (k == 0)


def test_engines_that_sleep_and_are_asked_to_generate_get_their_weights_first() -> None:
    """Level 2 keeps none: after log-probs, further responses."""
    lab = Lab(colocated=True)
    lab.cluster._launch()
    lab.cluster.sync_weights(5)
    lab.update()
    lab.told()
    lab.generate()
    assert lab.told() == [*TO_ENGINES, "both engines: generate"]
    assert lab.arguments["engine 0", "load_weights"][1] == 5


def test_an_engine_that_dies_when_it_is_to_sleep_has_a_successor_that_sleeps() -> None:
    lab = Lab(colocated=True, fail=died("engine 1", "sleep", 1))
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    lab.told()
    lab.update()
    assert lab.told() == [
        *("both engines: sleep", "both ranks: make_room", "engine 1: start", "engine 1: sleep"),
        "both ranks: update",
    ]
    lab.cluster.sync_weights(1)
    assert lab.told() == TO_ENGINES


@pytest.mark.parametrize("method", ["wake", "load_weights"])
def test_an_engine_that_dies_on_its_way_back_has_a_successor_with_the_weights(method: str) -> None:
    lab = Lab(colocated=True, fail=died("engine 1", method, 0))
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    told = lab.told()
    start = told.index("engine 1: start")
    assert told[start : start + 4] == ["engine 1: start", *SEND_TO_1]
    assert "both engines: wake kv_cache" in told[start:] and "engine 1: sleep" not in told[start:]
    assert lab.counts["engine 0", "load_weights"] == 0  # it was sent nothing twice


def test_ranks_are_made_anew_while_engines_sleep() -> None:
    """Whatever the ranks were at when they died."""
    lab = Lab(colocated=True, fail=died("actor rank 1", "send_weights", 1))
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    lab.cluster._write_stacks = lambda workers: ""  # type: ignore[method-assign]
    with pytest.raises(WorkersLostError):
        lab.cluster.sync_weights(1)
    lab.told()
    lab.cluster.restart()
    lab.cluster.load("a checkpoint")
    assert lab.told() == ["both engines: sleep", "both ranks: start", "both ranks: load"]
    lab.cluster.sync_weights(0)
    assert lab.told() == TO_ENGINES


def test_an_engine_that_dies_with_its_rank_counts_once_and_is_back_with_the_weights() -> None:
    """As with a machine that both are on: the ranks are to make room for the new engine, and cannot."""
    lost = {("engine 1", "generate", 0), ("actor rank 1", "make_room", 1)}
    lab = Lab(True, lambda *call: WorkerDiedError("died") if call in lost else None)
    events: list[str] = []
    lab.cluster._report = lab.cluster._record = lambda event, detail: events.append(event)  # type: ignore
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    with pytest.raises(WorkersLostError):
        lab.generate()
    lab.told()
    lab.cluster.restart()
    lab.cluster.sync_weights(0)
    start = ["engine 0: sleep", "both ranks: start", "both ranks: make_room", "engine 1: start"]
    assert lab.told() == [*start, "engine 1: sleep", *TO_ENGINES]
    assert events == ["engine_died", "actor_rank_died", "engine_back"]


def test_an_engine_whose_device_fails_as_it_starts_is_not_called_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a process, and nothing in it."""
    killed: list[str] = []
    monkeypatch.setattr(ray, "kill", lambda handle: killed.append(handle._worker))

    def fail(*call: Any) -> BaseException | None:
        if call == ("engine 1", "start", 1):
            return RuntimeError("CUDA error: uncorrectable ECC error encountered")
        dead = call[:2] == ("engine 1", "sleep") and killed.count("engine 1") == 2
        return WorkerDiedError("died") if dead or call == ("engine 1", "generate", 0) else None

    lab = Lab(True, fail)
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    with pytest.raises(WorkersLostError, match="engine 1: RuntimeError: CUDA error"):
        lab.generate()
    assert killed == ["engine 1", "engine 1"]
    lab.cluster.restart()
    assert killed.count("engine 1") == 3 and len(lab.cluster._engines) == 2


def test_apart_nobody_sleeps_and_rank_0_sends_to_all() -> None:
    lab = Lab(colocated=False)
    lab.cluster._launch()
    assert lab.told() == ["both engines: start", "both ranks: start"]
    lab.cluster.sync_weights(0)
    lab.update()
    sync = ["both ranks: open_door", "both engines: load_weights", "both ranks: send_weights"]
    assert lab.told() == [*sync, "both ranks: update"]
    to = [lab.arguments[f"actor rank {k}", "send_weights"][:2] for k in range(2)]
    assert [(kind, len(loads)) for kind, loads in to] == [("broadcast", 2), ("broadcast", 0)]


def test_engines_that_another_interrupted_are_sent_the_weights_again() -> None:
    def fail(worker: str, method: str, count: int) -> BaseException | None:
        if method != "load_weights" or count:
            return None
        return WorkerDiedError("died") if worker == "engine 1" else TransferInterruptedError("it is gone")

    lab = Lab(colocated=False, fail=fail)
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    told = lab.told()
    again = ["both ranks: open_door", "engine 0: load_weights", "both ranks: send_weights"]
    assert told[-7:] == ["engine 1: start", *SEND_TO_1, *again]
    assert "engine 0: start" not in told


def test_engines_that_nobody_else_interrupted_are_replaced() -> None:
    def fail(worker: str, method: str, count: int) -> BaseException | None:
        return TransferInterruptedError("NCCL") if (method, count) == ("load_weights", 0) else None

    lab = Lab(colocated=False, fail=fail)
    lab.cluster._launch()
    lab.told()
    lab.cluster.sync_weights(0)
    assert "both engines: start" in lab.told()


def test_a_new_engine_whose_weights_are_gone_costs_the_ranks_a_restart() -> None:
    """With lag the ranks train on while it is needed; its weights are not theirs any more."""
    lab = Lab(colocated=False, fail=died("engine 1", "generate", 0), lag=1)
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    with pytest.raises(WorkersLostError, match=r"engine 1: is new .*rollout.lag=1"):
        lab.generate()


def test_a_new_engine_gets_the_stored_weights_while_the_ranks_train() -> None:
    fail = died("engine 1", "generate", 0)
    lab = Lab(colocated=False, fail=fail, transfer="object_store", lag=1)
    lab.cluster._launch()
    lab.cluster.sync_weights(3)
    assert lab.told()[2:] == ["both ranks: send_weights", "both engines: load_weights"]
    lab.generate()
    told = lab.told()
    assert told[:3] == ["both engines: generate", "engine 1: start", "engine 1: load_weights"]
    assert lab.arguments["engine 1", "load_weights"][:2] == ("stored", 3)
    assert not any("rank" in line for line in told)


def test_other_weights_than_the_actors_stop_the_run() -> None:
    lab = Lab(colocated=True)
    lab.sent = {"lm_head.weight": 1, "model.visual.merger.ln_q.weight": 2}
    lab.cluster._launch()
    lab.cluster.sync_weights(0)
    lab.update()
    lab.cluster.sync_weights(1)
    assert lab.arguments["engine 0", "load_weights"][2] is False  # first: the first time only
    lab.held["engine 1"] = lab.sent | {"lm_head.weight": 3}
    lab.fail = died("engine 1", "generate", 0)
    with pytest.raises(TrainingError, match=r"engine 1 has not .*: lm_head.weight; .*check_weights=never"):
        lab.generate()


def config(**cluster: Any) -> Config:
    made = Config()
    for key, value in cluster.items():
        setattr(made.rollout if key == "tensor_parallel" else made.cluster, key, value)
    return made


@pytest.mark.parametrize(
    ("cluster", "device", "colocated", "chosen"),
    [
        ({}, "cuda", True, "ipc"),
        ({}, "cuda", False, "broadcast"),
        ({}, "cpu", False, "object_store"),
        ({}, "cpu", True, "object_store"),
        ({"tensor_parallel": 2}, "cpu", False, "broadcast"),
        ({"weight_transfer": "object_store"}, "cuda", True, "object_store"),
        ({"weight_transfer": "ipc"}, "cpu", True, "ipc"),
        ({"weight_transfer": "broadcast"}, "cpu", True, "broadcast"),
    ],
)
def test_the_transport_fits_the_placement(
    cluster: dict[str, Any], device: str, colocated: bool, chosen: str
) -> None:
    assert transport(config(**cluster), device, colocated) == chosen


@pytest.mark.parametrize(("wanted", "colocated"), [("ipc", False), ("broadcast", True)])
def test_a_transport_that_cannot_work_is_refused(wanted: str, colocated: bool) -> None:
    with pytest.raises(
        UserError, match=rf"cluster.weight_transfer={wanted} is between .*; set cluster.placement"
    ):
        transport(config(weight_transfer=wanted), "cuda", colocated)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("cluster.weight_transfer=object_store rollout.tensor_parallel=2", "first process only"),
        ("cluster.weight_transfer=ipc cluster.placement=apart", "set broadcast"),
        ("cluster.weight_transfer=broadcast cluster.launcher=local actor.num_ranks=1", "read by nothing"),
    ],
)
def test_a_transport_that_contradicts_the_rest_is_refused(overrides: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"^cluster.weight_transfer=.*{words}"):
        load_config("configs/digits/mssr.yaml", overrides.split())
