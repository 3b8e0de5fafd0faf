"""Generation on several engines: one queue of requests for all, rollouts handed on as they end.

An engine holds as many requests as it can run at a time, and a few to go on with; for every rollout that
it returns it gets another request. So none is idle while requests wait, however long responses are. Every
prompt has an engine where it goes if there is room, so that its images are prepared by one engine, in all
epochs, and a group shares what the engine keeps of its prompt; an engine that has none of its own left
takes from the one that has most. Where all requests fit into the engines at once, which engine has which does
not depend on time.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from mssr.cluster.base import OnFinished
from mssr.cluster.ray_calls import Calls, Failure, Worker
from mssr.cluster.shared_prompts import SharedPrompts
from mssr.models.cost import home
from mssr.types import Rollout, RolloutRequest, SamplingParams

FEEDING = "feeding"
"""Concurrency group of the method that brings further requests to a busy engine."""
SPARE = 8
"""One in so many of an engine's slots: the requests that it holds, at least, beyond those that it runs."""
SPARE_S = 1.0
"""And as many as it ends in so many seconds, up to half its slots. Until others come pass up to 0.8 s:
rollouts are handed over by the handful (1/16 of 1024 slots take 0.4 s at 160 a second), and messages are
gathered (0.25 s)."""

_calls = itertools.count()


class Generation:
    """One call of `Cluster.generate`, over the failures of engines.

    Args:
        requests: those first that are likely to take longest.
        slots: sequences that an engine runs at a time.
        stop: asked now and then whether to give up everything; None: never.
        on_prompts: told of prompts that engines share.
    """

    def __init__(
        self,
        calls: Calls,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        slots: int,
        on_finished: OnFinished | None = None,
        stop: Callable[[], bool] | None = None,
        on_prompts: Callable[[SharedPrompts], None] = lambda prompts: None,
    ) -> None:
        self._calls, self._stop = calls, stop
        self._requests, self._params = requests, params
        self._slots = slots
        self._on_finished, self._on_prompts = on_finished, on_prompts
        self._rollouts: dict[int, Rollout] = {}
        self._waiting: dict[Worker, deque[int]] = {}
        """The requests that no engine has, by the engine where they go first."""
        self._held: dict[Worker, set[int]] = {}
        self._ended: dict[Worker, int] = {}
        """How many rollouts an engine has returned in this turn, which began at `_began`."""
        self._number = 0

    @property
    def done(self) -> bool:
        return len(self._rollouts) == len(self._requests)

    def result(self) -> list[Rollout]:
        """The rollouts in the order of the requests."""
        return [self._rollouts[i] for i in range(len(self._requests))]

    def run(self, engines: Sequence[Worker]) -> list[Failure]:
        """Go on until all is done or no engine is left; returns how engines failed.

        The requests of an engine that fails go to the others.

        Raises:
            StopRequestedError: ``stop`` said so.
        """
        self._number = next(_calls)
        self._waiting = {engine: deque() for engine in engines}
        left = [i for i in range(len(self._requests)) if i not in self._rollouts]
        for index in left:
            number = home(self._requests[index].prompt_id) % len(engines)
            self._waiting[engines[number]].append(index)
        self._ended, self._began = dict.fromkeys(engines, 0), time.monotonic()
        each = min(self._most(0.0), math.ceil(len(left) / len(engines)))
        own = {engine: self._take(engine, each, others=False) for engine in engines}
        streams = {}
        for engine in engines:
            first = own[engine] + self._take(engine, each - len(own[engine]))
            self._held[engine] = set(first)
            call = engine.handle.generate.options(num_returns="streaming")
            streams[engine] = call.remote(self._number, self._numbered(first), self._params)
        failures = []
        try:
            for engine, part in self._calls.parts(streams, self._stop):
                if isinstance(part, Failure):
                    failures.append(part)
                    self._waiting[engine].extendleft(sorted(self._held.pop(engine), reverse=True))
                    self._feed(self._held)
                    continue
                for prompts in part.prompts:
                    self._on_prompts(prompts)
                self._ended[engine] += len(part.numbers)
                for index, rollout in zip(part.numbers, part.rollouts.unpack(), strict=True):
                    self._held[engine].discard(index)
                    self._rollouts[index] = rollout
                    if self._on_finished is not None:
                        self._on_finished(index, rollout)
                if self.done:
                    break
                self._feed([engine])
        finally:
            for engine in self._held:
                self._send(engine, None)
            self._held.clear()
        return failures

    def _most(self, rate: float) -> int:
        """Requests that an engine holds at a time, which ends so many a second."""
        wanted = min(math.ceil(rate * SPARE_S), self._slots // 2)
        return self._slots + max(1, self._slots // SPARE, wanted)

    def _feed(self, engines: Iterable[Worker]) -> None:
        """Give engines what they have room for."""
        elapsed = max(time.monotonic() - self._began, SPARE_S)
        for engine in engines:
            held = self._held[engine]
            if further := self._take(engine, self._most(self._ended[engine] / elapsed) - len(held)):
                held.update(further)
                self._send(engine, self._numbered(further))

    def _take(self, engine: Worker, room: int, others: bool = True) -> list[int]:
        """At most ``room`` requests for an engine, the first ones: its own, then those of others."""
        taken: list[int] = []
        queue = self._waiting[engine]
        while len(taken) < room:
            if not queue and others:
                queue = max(self._waiting.values(), key=len)
            if not queue:
                break
            taken.append(queue.popleft())
        return taken

    def _send(self, engine: Worker, requests: list[tuple[int, RolloutRequest]] | None) -> None:
        engine.handle.feed.options(concurrency_group=FEEDING).remote(self._number, requests)

    def _numbered(self, indices: Sequence[int]) -> list[tuple[int, RolloutRequest]]:
        return [(i, self._requests[i]) for i in indices]
