"""A shared queue of requests: none is lost, none is answered twice, and no engine idles while some wait."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import ray
import torch

from mssr.cluster import ray_workers
from mssr.cluster.ray_calls import Failure, Worker, WorkerDiedError
from mssr.cluster.ray_generation import Generation
from mssr.cluster.ray_workers import FinishedPart, RayRolloutWorker
from mssr.cluster.shared_prompts import SharedPrompts
from mssr.config import Config
from mssr.models.encoded import EncodedPrompt
from mssr.rollout.queue import Finished, RequestQueue
from mssr.types import PackedRollouts, Rollout, RolloutRequest, SamplingParams

pytestmark = pytest.mark.unit
PARAMS = SamplingParams(1.0, 8)
PROMPT = EncodedPrompt(torch.arange(3), torch.zeros(3, dtype=torch.int32), None, None)


def rollout(request: RolloutRequest) -> Rollout:
    tokens = np.array([request.seed], np.int32)
    return Rollout(request.prompt_id, 0, tokens, tokens, np.zeros(1, np.float32), "stop", 0, "")


class Remote:
    """Stands for a method of a Ray actor."""

    def __init__(self, method: Any) -> None:
        self.remote = method

    def options(self, **_: Any) -> Remote:
        return self


class FakeEngine:
    """Runs ``slots`` requests at a time; a request takes as many ticks as its seed says."""

    def __init__(self, name: str, slots: int, dies_at: int | None = None) -> None:
        self.worker = Worker(name, self)
        self.slots, self.dies_at = slots, dies_at
        self.queue: list[tuple[int, RolloutRequest]] = []
        self.running: dict[int, tuple[int, RolloutRequest]] = {}
        self.answered: list[int] = []
        self.idle_while_others_wait = 0
        self.generate, self.feed = Remote(self._generate), Remote(self._feed)
        self.ended = False

    def _generate(self, number: int, requests: Any, params: SamplingParams) -> FakeEngine:
        self.queue += requests
        return self

    def _feed(self, number: int, requests: Any) -> None:
        self.ended = requests is None
        self.queue += requests or []

    def tick(self, now: int) -> FinishedPart | Failure | None:
        if self.dies_at == now:
            return Failure(self.worker, WorkerDiedError("died"))
        while self.queue and len(self.running) < self.slots:
            index, request = self.queue.pop(0)
            self.running[index] = now + request.seed, request
        over = [i for i, (end, _) in self.running.items() if end <= now]
        self.answered += over
        rollouts = [rollout(self.running.pop(i)[1]) for i in over]
        return FinishedPart(over, PackedRollouts.of(rollouts)) if over else None


class FakeCalls:
    """Time passes tick by tick for all engines together."""

    def __init__(self) -> None:
        self.now = 0
        self.stop_at: int | None = None

    def parts(self, streams: Mapping[Worker, FakeEngine], stop: Any) -> Iterator[tuple[Worker, Any]]:
        alive = dict(streams)
        while alive:
            self.now += 1
            assert self.now < 10_000
            for worker, engine in list(alive.items()):
                part = engine.tick(self.now)
                if isinstance(part, Failure):
                    del alive[worker]
                if part:
                    yield worker, part


def generation(durations: list[int], slots: int, **options: Any) -> tuple[Generation, FakeCalls]:
    calls = FakeCalls()
    requests = [RolloutRequest(f"p{i}", 0, seed) for i, seed in enumerate(durations)]
    return Generation(calls, requests, PARAMS, slots, **options), calls  # type: ignore[arg-type]


def test_every_request_is_answered_once_in_its_place() -> None:
    durations = np.random.default_rng(0).integers(1, 40, 300).tolist()
    seen: list[int] = []
    job, _ = generation(durations, 8, on_finished=lambda i, r: seen.append(i))
    engines = [FakeEngine(f"engine {k}", 8) for k in range(3)]
    assert job.run([e.worker for e in engines]) == []
    assert job.done and [r.prompt_id for r in job.result()] == [f"p{i}" for i in range(300)]
    assert sorted(seen) == list(range(300)) == sorted(i for e in engines for i in e.answered)
    assert all(e.ended for e in engines)


def test_no_engine_waits_for_the_stragglers_of_another() -> None:
    """Fixed shares would give one engine all the long ones."""
    durations = [100 if i % 2 == 0 else 1 for i in range(200)]
    job, calls = generation(durations, 4)
    job.run([FakeEngine(f"engine {k}", 4).worker for k in range(2)])
    ideal = sum(durations) / 8
    assert calls.now <= ideal + 2 * 100
    fixed = sum(durations[::2]) / 4
    assert calls.now < 0.7 * fixed


def test_a_prompt_goes_to_the_same_engine_in_every_epoch_and_the_engines_get_equal_shares() -> None:
    groups = [RolloutRequest(f"p{i // 4}", i % 4, 1) for i in range(200)]
    epochs = []
    for order in (groups, groups[::-1]):
        engines = [FakeEngine(f"engine {k}", 80) for k in range(3)]
        job = Generation(FakeCalls(), order, PARAMS, 80)  # type: ignore[arg-type]
        job.run([e.worker for e in engines])
        answered = [[order[i].prompt_id for i in e.answered] for e in engines]
        assert sorted(map(len, answered)) == [66, 67, 67]
        epochs.append(answered)
    both = [set(a) & set(b) for a, b in zip(*epochs, strict=True)]
    assert sum(map(len, both)) >= 40  # of 50; where a share is full, prompts go to the others
    split = [p for p in {r.prompt_id for r in groups} if sum(p in a for a in epochs[0]) > 1]
    assert len(split) <= 4  # a group is split where a share ends


def test_the_requests_of_an_engine_that_dies_go_to_the_others() -> None:
    durations = np.random.default_rng(1).integers(1, 20, 100).tolist()
    job, _ = generation(durations, 4)
    engines = [FakeEngine("engine 0", 4), FakeEngine("engine 1", 4, dies_at=7)]
    [failure] = job.run([e.worker for e in engines])
    assert failure.worker is engines[1].worker and job.done
    assert len(engines[0].answered) + len(engines[1].answered) == 100


def test_without_engines_the_next_run_goes_on() -> None:
    durations = [5] * 30
    job, _ = generation(durations, 4)
    dying = [FakeEngine(f"engine {k}", 4, dies_at=8) for k in range(2)]
    assert len(job.run([e.worker for e in dying])) == 2 and not job.done
    before = len(dying[0].answered) + len(dying[1].answered)
    fresh = FakeEngine("engine 2", 4)
    assert job.run([fresh.worker]) == [] and job.done
    assert 0 < before == 30 - len(fresh.answered)


def test_a_queue_hands_out_what_comes_and_ends() -> None:
    requests = [(i, RolloutRequest(f"p{i}", 0, i)) for i in range(4)]
    queue = RequestQueue(requests[:2], open=True)
    assert queue.take(1) == requests[:1] and queue.taken == 1
    assert queue.take() == requests[1:2]
    threading.Timer(0.05, lambda: (queue.put(requests[2:]), queue.close())).start()
    taken = []
    while part := queue.take(wait=True):
        taken += part
    assert taken == requests[2:] and queue.take(wait=True) == []


class OneByOne:
    """An engine that answers one request a step."""

    slots = 64  # handfuls of 4

    def generate(self, queue: RequestQueue, params: SamplingParams) -> Iterator[Finished]:
        waiting: list[Any] = []
        while True:
            waiting += queue.take(wait=not waiting)
            if not waiting:
                return
            index, request = waiting.pop(0)
            yield [(index, rollout(request))]

    @property
    def prompts(self) -> OneByOne:
        return self

    def take_new(self, prompt_ids: Iterable[str]) -> dict[str, EncodedPrompt]:
        """Of the first prompts one that was new."""
        return {"p1": PROMPT} if "p1" in list(prompt_ids) else {}


def worker_of(ranks: int) -> RayRolloutWorker:
    worker = RayRolloutWorker.__new__(RayRolloutWorker)
    worker._lock, worker._queues, worker._config = threading.Lock(), {}, Config()
    worker._config.actor.num_ranks = ranks
    worker._engine = OneByOne()  # type: ignore[assignment]
    return worker


def test_a_worker_returns_rollouts_by_the_handful_and_keeps_none_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = worker_of(ranks=1)
    stored: list[Any] = []
    monkeypatch.setattr(ray, "put", lambda value: stored.append(value) or "reference")  # type: ignore[func-returns-value]
    monkeypatch.setattr(ray_workers, "MAX_DELAY_S", float("inf"))
    requests = [(i, RolloutRequest(f"p{i}", 0, i)) for i in range(10)]
    parts = worker.generate(7, requests[:6], PARAMS)
    first, second = next(parts), next(parts)  # the second although more may come: the engine is idle
    assert [len(first.numbers), len(second.numbers)] == [4, 2]
    assert first.prompts == []  # it waits for others, until the engine has nothing else to do
    assert second.prompts == [SharedPrompts("reference", {"p1": PROMPT.nbytes})]
    assert [list(prompts) for prompts in stored] == [["p1"]]
    worker.feed(7, requests[6:])
    worker.feed(7, None)
    assert [len(p.numbers) for p in parts] == [4] and worker._queues == {}


def test_an_evaluation_shares_no_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no rank that could need them."""
    worker = worker_of(ranks=0)
    monkeypatch.setattr(ray, "put", lambda value: pytest.fail("shared"))
    parts = worker.generate(0, [(1, RolloutRequest("p1", 0, 0))], PARAMS)
    assert next(parts).prompts == []


def test_what_is_packed_for_the_way_comes_out_as_it_was() -> None:
    rng = np.random.default_rng(0)
    sent = []
    for k, (p, t) in enumerate([(3, 2), (0, 1), (5, 0), (4, 7)]):
        tokens = rng.integers(0, 99, p + t).astype(np.int32)
        log_probs = -rng.random(t).astype(np.float32)
        reason = "stop" if k % 2 else "length"
        sent.append(
            (10 - k, Rollout(f"p{k}", k, tokens[:p], tokens[p:], log_probs, reason, k + 5, f"text {k}"))
        )
    numbers, rollouts = zip(*sent, strict=True)
    got = pickle.loads(pickle.dumps(FinishedPart(list(numbers), PackedRollouts.of(rollouts))))
    assert got.numbers == list(numbers)
    for a, b in zip(rollouts, got.rollouts.unpack(), strict=True):
        for name, value in vars(a).items():
            np.testing.assert_array_equal(getattr(b, name), value, err_msg=name)
            assert getattr(getattr(b, name), "dtype", None) == getattr(value, "dtype", None), name
