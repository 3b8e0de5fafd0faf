"""Calls of Ray actors that are watched: who is dead, who hangs, and who only takes long."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from mssr.errors import StopRequestedError, first_line
from mssr.rollout import heartbeat

HEALTH = "health"
"""Concurrency group of the methods that answer while a worker is busy."""
GRACE_S = 5.0
"""After the failure of one rank, how long the others have to show that theirs is the cause."""
GATHER_SHARE, GATHER_S = 0.01, 0.25
"""For how long messages of streams are gathered, because every look costs as much as several of them: so much
of the time since the streams began, at most so many seconds."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A Ray actor and what to call it."""

    name: str
    """As users know it: "actor rank 1", "engine 0"."""
    handle: Any
    number: int = 0
    """The 1 and the 0 of these."""


class WorkerDiedError(Exception):
    """The process is gone; the message says how."""


class WorkerHungError(Exception):
    """The process is there and shows no sign of life."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that gave no result."""

    worker: Worker
    error: BaseException

    def __str__(self) -> str:
        error = self.error
        kind = "" if isinstance(error, (WorkerDiedError, WorkerHungError)) else f"{type(error).__name__}: "
        return f"{self.worker.name}: {kind}{first_line(error)}"


class Calls:
    """Waits for calls and looks after the workers meanwhile.

    Args:
        hang_timeout_s: without a sign of life for so long, a worker hangs.
    """

    def __init__(self, hang_timeout_s: float) -> None:
        self._limit = hang_timeout_s
        self._poll_s = min(1.0, hang_timeout_s / 4)
        self._look_after_s = max(self._poll_s, hang_timeout_s / 30)

    def gather(
        self,
        refs: Sequence[tuple[Worker, Any]],
        *,
        together: bool = False,
        stop: Callable[[], bool] | None = None,
        hang_timeout_s: float | None = None,
        task: str = heartbeat.CALL,
    ) -> list[Any]:
        """The result of every call, or its `Failure`, in their order.

        Args:
            refs: pairs (worker, object ref of the call).
            together: the calls are a collective: after one failure the others are given up, with None.
            stop: asked now and then whether to give up everything.
            hang_timeout_s: in place of the usual one, for workers that cannot show signs of life yet.
            task: whose signs of life count.

        Raises:
            StopRequestedError: ``stop`` said so.
        """
        outcomes: dict[Any, Any] = {}
        pending = {ref: worker for worker, ref in refs}
        watch = _Watch(hang_timeout_s or self._limit, task)
        given_up = float("inf")
        while pending:
            for ref in self._ready(pending, stop):
                outcomes[ref] = _outcome(pending.pop(ref), ref)
            now = time.monotonic()
            if together and any(isinstance(x, Failure) for x in outcomes.values()):
                given_up = min(given_up, now + GRACE_S)
            for ref, worker in list(pending.items()):
                hung = watch.hung(worker)
                if hung is not None or now >= given_up:
                    outcomes[ref] = hung
                    del pending[ref]
        return [outcomes[ref] for _, ref in refs]

    def _ready(self, pending: Iterable[Any], stop: Callable[[], bool] | None) -> list[Any]:
        """Those of some calls that have something to say, after a short wait."""
        if not ray.is_initialized():  # ray.wait would start it again
            raise RuntimeError("Ray was shut down by another thread")
        if stop is not None and stop():
            raise StopRequestedError
        ready, _ = ray.wait(list(pending), timeout=self._poll_s, fetch_local=False)
        return ready

    def parts(
        self, streams: Mapping[Worker, Any], stop: Callable[[], bool] | None = None
    ) -> Iterator[tuple[Worker, Any]]:
        """What streaming calls yield, as it comes, with whose it is.

        A call that fails yields its `Failure` and nothing after it. Ends when all calls have ended.

        Raises:
            StopRequestedError: ``stop`` said so.
        """
        pending = {stream: worker for worker, stream in streams.items()}
        began = watched = time.monotonic()
        watch = _Watch(self._limit, heartbeat.CALL)
        while pending:
            ready = self._ready(pending, stop)
            if len(pending) > 1 and ready:  # it returns one only, though others may have something too
                time.sleep(min(GATHER_S, GATHER_SHARE * (time.monotonic() - began)))
                ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0, fetch_local=False)
            refs = {}
            for stream in ready:
                try:
                    refs[stream] = next(stream)
                except StopIteration:
                    del pending[stream]
            parts = _outcomes([(pending[stream], ref) for stream, ref in refs.items()])
            for stream, part in zip(refs, parts, strict=True):
                worker = pending.pop(stream) if isinstance(part, Failure) else pending[stream]
                yield worker, part
            # To look after all workers for every message would take longer than the messages.
            if time.monotonic() - watched >= self._look_after_s:
                watched = time.monotonic()
                for stream, worker in list(pending.items()):
                    if hung := watch.hung(worker):
                        del pending[stream]
                        yield worker, hung


def stacks(workers: Sequence[Worker], timeout_s: float = 5.0) -> str:
    """Where all threads of some workers are, as far as they answer."""
    refs = [w.handle.stacks.options(concurrency_group=HEALTH).remote() for w in workers]
    answered, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    parts = []
    for worker, ref in zip(workers, refs, strict=True):
        silent = "does not answer; it is stopped, or its interpreter is stuck\n"
        parts.append(f"== {worker.name}\n{_outcome(worker, ref) if ref in answered else silent}")
    return "\n".join(parts)


class _Watch:
    """Asks workers for signs of life, without waiting for answers."""

    def __init__(self, limit_s: float, task: str) -> None:
        self._limit, self._task, self._began = limit_s, task, time.monotonic()
        self._asked: dict[Worker, tuple[float, Any]] = {}
        """When each was asked last, and the reference to its answer."""

    def hung(self, worker: Worker) -> Failure | None:
        """The failure of a worker that has been silent beyond the limit."""
        now = time.monotonic()
        if worker not in self._asked:
            self._ask(worker, now)
            return None
        since, ref = self._asked[worker]
        silent = now - since
        if ray.wait([ref], timeout=0)[0]:
            try:
                # A call whose arguments are still on their way gives no signs yet.
                silent = min(ray.get(ref), now - self._began)
            except ray.exceptions.RayError:
                return None  # it is dead, as its call will tell
            if silent <= self._limit and now - since > self._limit / 10:
                self._ask(worker, now)
        if silent <= self._limit:
            return None
        return Failure(worker, WorkerHungError(f"no sign of life for {silent:.0f} s"))

    def _ask(self, worker: Worker, now: float) -> None:
        sign = worker.handle.silent_s.options(concurrency_group=HEALTH).remote(self._task)
        self._asked[worker] = now, sign


def _outcomes(calls: Sequence[tuple[Worker, Any]]) -> list[Any]:
    """The results or failures of calls that have ended; together, which costs less than one by one."""
    try:
        return list(ray.get([ref for _, ref in calls]))
    except ray.exceptions.RayError:
        return [_outcome(worker, ref) for worker, ref in calls]


def _outcome(worker: Worker, ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayActorError as error:
        return Failure(worker, WorkerDiedError(f"died ({_cause_of_death(error)})"))
    except ray.exceptions.RayTaskError as error:
        # The worker's own exception, without Ray's copy of its traceback in the message; the traceback
        # stays in the chain for the log.
        error.cause.__cause__ = error
        return Failure(worker, error.cause)
    except ray.exceptions.RayError as error:
        return Failure(worker, WorkerDiedError(f"is lost ({type(error).__name__})"))


def _cause_of_death(error: BaseException) -> str:
    """What Ray knows of it, without what it guesses."""
    text = " ".join(str(error).split()) or type(error).__name__
    found = re.search(r"exit type: (\w+) Worker exit detail: (.*?)(?:\. |$)", text)
    return f"{found[1]}: {found[2]}" if found else text[:200]
