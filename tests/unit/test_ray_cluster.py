"""What counts as a lost worker, and how Ray is started; the rest of the cluster runs in tests/e2e."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import torch.distributed as dist

from mssr.actor.checkpoint import ActorCheckpoint
from mssr.cluster import ray_calls, ray_start
from mssr.cluster.faults import is_lost
from mssr.cluster.ray_calls import (
    Calls,
    Failure,
    Worker,
    WorkerDiedError,
    WorkerHungError,
    _cause_of_death,
)
from mssr.cluster.ray_cluster import PREPARING, RayCluster
from mssr.cluster.ray_generation import Generation
from mssr.cluster.ray_start import init_ray
from mssr.config import Config
from mssr.errors import EngineError, TrainingError, UserError
from mssr.rollout import heartbeat
from mssr.types import RolloutRequest, SamplingParams

pytestmark = pytest.mark.unit
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (WorkerDiedError("died"), True),
        (WorkerHungError("no sign of life for 900 s"), True),
        (RuntimeError(GLOO), True),
        (dist.DistNetworkError("connection was lost"), True),
        (ray.exceptions.OwnerDiedError("ab" * 14, None, ""), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("nccl"), False),
        (TrainingError("3 updates in a row were not finite"), False),
        (UserError("reward.name: no such file"), False),
        (EngineError("vLLM failed"), False),  # of a rank it would be a mistake of ours
    ],
)
def test_only_what_a_restart_can_mend_is_tried_again(error: Exception, lost: bool) -> None:
    assert is_lost(Failure(Worker("actor rank 0", None), error)) is lost


def test_a_death_is_told_in_a_line() -> None:
    text = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: RayPolicyWorker\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: Worker unexpectedly exits with a connection error code 2. End of file. Some common causes "
        "include: (1) the process was killed by the OOM killer due to high memory usage."
    )
    told = _cause_of_death(Exception(text))
    assert told == "SYSTEM_ERROR: Worker unexpectedly exits with a connection error code 2"
    failure = Failure(Worker("engine 1", None), WorkerDiedError(f"died ({told})"))
    assert str(failure).startswith("engine 1: died (SYSTEM_ERROR")
    assert str(Failure(Worker("engine 1", None), ValueError("a\nb"))) == "engine 1: ValueError: a"


class ThreeCalls:
    """Three calls of three workers on a clock of their own: what a call gives and when, None: never; and what
    its worker says when it is asked for a sign of life, None: nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[float | None, Any, Any]]) -> None:
        self.now, self.calls = 0.0, calls
        self.refs = [(Worker(f"actor rank {k}", self.handle(k)), ("call", k)) for k in range(len(calls))]
        monkeypatch.setattr(ray_calls.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "wait", self.wait)
        monkeypatch.setattr(ray, "get", lambda ref: self.result(*ref))

    def handle(self, k: int) -> Any:
        handle = Mock()
        handle.silent_s.options.return_value.remote.return_value = "sign", k
        return handle

    def wait(self, refs: list[Any], timeout: float, fetch_local: bool = True) -> tuple[list[Any], list[Any]]:
        self.now += timeout
        ready = [ref for ref in refs if self.ready(*ref)]
        return ready, [ref for ref in refs if ref not in ready]

    def ready(self, kind: str, k: int) -> bool:
        at, _, sign = self.calls[k]
        return sign is not None if kind == "sign" else at is not None and self.now >= at

    def result(self, kind: str, k: int) -> Any:
        _, value, sign = self.calls[k]
        if kind == "sign":
            return sign
        if isinstance(value, Exception):
            raise value
        return value


@pytest.mark.parametrize("sign", [None, 41.0])
def test_who_shows_no_sign_of_life_hangs_and_who_works_on_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, sign: float | None
) -> None:
    """Whether it does not answer at all, or says itself that nothing goes on in it."""
    calls = ThreeCalls(monkeypatch, [(1.0, "a", 0.5), (500.0, "b", 0.5), (None, None, sign)])
    [first, second, hung] = Calls(hang_timeout_s=40).gather(calls.refs)
    assert (first, second) == ("a", "b") and isinstance(hung.error, WorkerHungError)
    assert str(hung).startswith("actor rank 2: no sign of life for 41 s")


def test_a_call_whose_arguments_come_late_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker has been silent since its last call."""
    calls = ThreeCalls(monkeypatch, [(5.0, "a", 41.0)])
    assert Calls(hang_timeout_s=40).gather(calls.refs) == ["a"]


def test_after_one_rank_has_died_the_others_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    died = ray.exceptions.ActorDiedError()
    calls = ThreeCalls(monkeypatch, [(2.0, died, 0.5), (None, None, 0.5), (4.0, RuntimeError(GLOO), 0.5)])
    monkeypatch.setattr(ray.exceptions, "RayTaskError", RuntimeError)
    calls.calls[2][1].cause = calls.calls[2][1]
    [first, given_up, third] = Calls(hang_timeout_s=40).gather(calls.refs, together=True)
    assert isinstance(first.error, WorkerDiedError) and given_up is None
    assert is_lost(third) and 4 <= calls.now < 20


def test_a_checkpoint_that_is_written_hides_no_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that waits for it shows signs of life of its own, and who waits for it asks for these."""
    calls = ThreeCalls(monkeypatch, [(None, None, 41.0)])
    for task in (heartbeat.CALL, heartbeat.SAVE):
        Calls(hang_timeout_s=40).gather(calls.refs, task=task)
        calls.refs[0][0].handle.silent_s.options.return_value.remote.assert_called_with(task)
    monkeypatch.undo()
    checkpoint = ActorCheckpoint.__new__(ActorCheckpoint)
    checkpoint._saving = Future()
    checkpoint._saving.set_exception(OSError("disk full"))
    monkeypatch.setattr(heartbeat, "_last", {heartbeat.CALL: 1.0})
    waits = iter([False, True])
    monkeypatch.setattr(checkpoint._saving, "done", lambda: next(waits))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.result()
    assert heartbeat._last.keys() == {heartbeat.CALL, heartbeat.SAVE} and heartbeat._last["call"] == 1.0


class Engine:
    """Stands for the handle of an engine; `prepare` is its only method."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.groups: list[str] = []
        self.prepare = self

    def options(self, concurrency_group: str) -> Engine:
        self.groups.append(concurrency_group)
        return self

    def remote(self, prompt_ids: list[str]) -> None:
        self.prepared += prompt_ids


def test_prompts_are_prepared_where_they_are_generated() -> None:
    """In a thread of their own; by the engines that get their requests first."""
    cluster = RayCluster.__new__(RayCluster)
    engines = [Engine() for _ in range(3)]
    cluster._engines = [Worker(f"engine {k}", e) for k, e in enumerate(engines)]
    prompt_ids = [f"p{k}" for k in range(60)]
    cluster.prepare(prompt_ids)
    assert sorted(i for e in engines for i in e.prepared) == sorted(prompt_ids)
    assert all(e.groups == [PREPARING] and len(e.prepared) > 10 for e in engines)
    requests = [RolloutRequest(i, 0, 0) for i in prompt_ids]
    first: dict[str, list[str]] = {}

    class Stop(Exception):
        pass

    class Stopping:
        def parts(self, streams: Any, stop: Any) -> Any:
            raise Stop

    class Handle:
        def __init__(self, name: str) -> None:
            self.generate = self.feed = self
            self.name = name

        def options(self, **_: Any) -> Handle:
            return self

        def remote(self, number: int, numbered: Any, *params: Any) -> None:
            if params:
                first[self.name] = [request.prompt_id for _, request in numbered]

    handles = [Worker(f"engine {k}", Handle(f"engine {k}")) for k in range(3)]
    with pytest.raises(Stop):
        Generation(Stopping(), requests, SamplingParams(1.0, 8), slots=6).run(handles)  # type: ignore[arg-type]
    for k, engine in enumerate(engines):
        assert set(first[f"engine {k}"]) <= set(engine.prepared)


def test_a_local_ray_is_for_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No dashboard, no client server, loopback; and Ray's token authentication is not turned off."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    started: dict[str, Any] = {}
    monkeypatch.setattr(ray_start.ray, "init", lambda **options: started.update(options))
    init_ray(Config(), processes=3)
    assert started["address"] == "local" and started["include_dashboard"] is False
    assert started["_node_ip_address"] == "127.0.0.1"
    assert os.environ.get("RAY_AUTH_MODE") is None  # Ray's own default is a token
