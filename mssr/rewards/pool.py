"""Scoring in processes: a time limit for each response, and nothing but that response is ever lost.

How a batch is scored:

- Responses go to the workers in calls of a few. A worker reports each one as it is done, so the driver
  knows which one a worker is at, kills the worker when it is at one for longer than the limit or when it
  dies, and gives the rest of its call to others.
- A worker that is at one response for far longer than others took is set aside until it is done or out of
  time: it gets a low priority, and another takes its place. So a batch in which some responses hang is
  late by about one time limit and not by one for each of them.
- Functions that take a list, and async ones, have several responses in hand at a time. If such a call
  fails, hangs or kills its worker, its responses are tried again one by one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from mssr.errors import TrainingError
from mssr.rewards.base import Failure, RewardInput, RewardResult
from mssr.rewards.forker import Forker, ForkerDiedError, ProcessTimes, process_times
from mssr.rewards.worker import Job, timed_out

MAX_CALL = 16
"""Responses of one call."""
MAX_ASIDE = 64
"""Workers set aside at a time; each holds little memory of its own."""
MAX_RESTARTS = 3
"""Losses of the process that forks the workers, a batch."""
ASIDE_PRIORITY = 10
"""Niceness of those. Where cores are scarce they get a tenth of the share of others: little for one that
hangs, and enough for one that needs less than a tenth of its time limit."""
MIN_PATIENCE_S = 0.01
"""A worker that is at one response for less than this is not suspected to hang."""
ASYNC_GRACE_S = 0.5
"""Beyond the limit until a worker that should have ended its coroutines itself is killed."""

Outcome = RewardResult | Failure


class ProcessPool:
    """Workers that score with one function.

    The first process starts with the object and loads the function while the caller goes on.

    Args:
        job: what the workers do.
        workers: how many responses, or calls of several, are worked on at the same time.
        together: whether a call's responses are scored in one call of the function: "batch" or "async",
            else "no".
    """

    def __init__(self, job: Job, workers: int, together: str = "no") -> None:
        self._job = job
        self._count = workers
        self._together = together
        self._limit = job.config.time_limit_s
        self._workers: list[_Worker] = []
        self._forker = Forker(job)

    def run(self, items: Sequence[RewardInput]) -> list[Outcome]:
        """The outcomes of the items, in their order.

        Raises:
            TrainingError: no worker can be started.
        """
        batch = _Batch(items, self._count)
        restarts = 0
        try:
            while batch.unfinished:
                try:
                    self._advance(batch)
                except ForkerDiedError as error:
                    restarts += 1
                    self._restart(batch)
                    if restarts > MAX_RESTARTS:
                        raise TrainingError(
                            f"the processes that score rewards keep dying ({error})"
                        ) from None
        except BaseException:  # also Ctrl-C: the next batch starts with workers that owe nothing
            self.close()
            self._forker = Forker(self._job)
            raise
        assert not any(w.pending for w in self._workers)
        return [batch.outcomes[i] for i in range(len(items))]

    def close(self) -> None:
        """End all processes; the pool cannot be used afterwards."""
        for worker in self._workers:
            worker.connection.close()
        self._workers.clear()
        self._forker.close()

    def _advance(self, batch: _Batch) -> None:
        """Hand out calls, wait for something to happen, and act on it."""
        self._dispatch(batch)
        busy = [w for w in self._workers if w.pending]
        if not busy:
            return
        now = time.monotonic()
        events = [self._deadline(w) for w in busy]
        events += [self._check_at(w, batch) for w in busy if self._may_go_aside(w, batch)]
        ready = wait([w.connection for w in busy], max(0.0, min(events) - now))
        for worker in busy:
            if worker.connection in ready:
                self._receive(worker, batch)
        now = time.monotonic()
        for worker in busy:
            # One that has something to say is heard first: the driver itself may have been late.
            if worker not in self._workers or not worker.pending or worker.connection.poll():
                continue
            if now >= self._deadline(worker):
                self._lose(worker, timed_out(self._limit), batch)
            elif self._may_go_aside(worker, batch) and self._is_stuck(worker, batch, now):
                self._set_aside(worker, batch)

    def _dispatch(self, batch: _Batch) -> None:
        while batch.calls and sum(bool(w.pending) and not w.aside for w in self._workers) < self._count:
            worker = next((w for w in self._workers if not w.pending), None)
            if worker is None:
                try:
                    worker = _Worker(*self._forker.fork())
                except TrainingError:
                    if any(w.pending for w in self._workers):
                        return  # go on with those that there are
                    raise
                self._workers.append(worker)
            call = batch.calls.popleft()
            try:
                worker.connection.send([(i, batch.items[i]) for i in call])
            except OSError:  # it died while it was idle
                batch.calls.appendleft(call)
                self._end(worker)
                continue
            worker.pending = call
            worker.begin(time.monotonic())

    def _receive(self, worker: _Worker, batch: _Batch) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._forget(worker)
            status = self._forker.status(worker.pid)
            self._drop(worker, Failure(f"its process died ({status})"), batch)
            return
        if message is None:  # a call that is to be tried one by one
            batch.again(worker.pending)
            worker.pending = []
        else:
            index, outcome = message
            worker.pending.remove(index)
            now = time.monotonic()
            batch.finish(index, outcome, now - worker.since)
            if self._together != "async":
                worker.begin(now)
        if worker.aside and not worker.pending:
            self._end(worker)  # its priority cannot be raised again

    def _deadline(self, worker: _Worker) -> float:
        if self._together == "batch":
            return worker.since + self._limit * len(worker.pending)
        return worker.since + self._limit + (ASYNC_GRACE_S if self._together == "async" else 0.0)

    def _patience(self, worker: _Worker, batch: _Batch) -> float:
        """Seconds at one response, or call, until a worker is suspected; half of it more until it is sure."""
        count = len(worker.pending) if self._together == "batch" else 1
        return max(MIN_PATIENCE_S, 3 * batch.mean_seconds) * count

    def _check_at(self, worker: _Worker, batch: _Batch) -> float:
        if worker.suspect is None:
            return worker.since + self._patience(worker, batch)
        return worker.suspect.check_at

    def _is_stuck(self, worker: _Worker, batch: _Batch, now: float) -> bool:
        """Whether it ran or slept for long, which is not to be confused with waiting for a core."""
        if now < self._check_at(worker, batch):
            return False
        times = process_times(worker.pid)
        if worker.suspect is None:
            worker.suspect = _Suspect(now, times)
        suspect = worker.suspect
        if times is None or suspect.times is None:
            own = now - suspect.since
        elif times.asleep:
            own = now - suspect.since - (times.waited - suspect.times.waited)
        else:  # a wait for a core is accounted for only when it is over
            own = times.used - suspect.times.used
        left = self._patience(worker, batch) / 2 - own
        suspect.check_at = now + max(left, 0.001)
        return left <= 0

    def _may_go_aside(self, worker: _Worker, batch: _Batch) -> bool:
        """If others wait for its place, and not many are slow: these would time out for want of cores."""
        if worker.aside or not (batch.calls or (self._together == "no" and len(worker.pending) > 1)):
            return False
        return sum(w.aside for w in self._workers) < MAX_ASIDE and batch.set_aside < 2 + batch.finished // 16

    def _set_aside(self, worker: _Worker, batch: _Batch) -> None:
        if self._together == "no":
            batch.requeue(worker.pending[1:])
            del worker.pending[1:]
        batch.set_aside += 1
        worker.aside = True
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, worker.pid, ASIDE_PRIORITY)

    def _lose(self, worker: _Worker, failure: Failure, batch: _Batch) -> None:
        self._end(worker)
        self._drop(worker, failure, batch)

    def _drop(self, worker: _Worker, failure: Failure, batch: _Batch) -> None:
        """Of a worker that is no more: the culprit fails, the rest is done by others."""
        if self._together != "no" and len(worker.pending) > 1:
            batch.again(worker.pending)
        elif worker.pending:
            culprit, *rest = worker.pending
            batch.finish(culprit, failure)
            batch.requeue(rest)
        worker.pending = []

    def _end(self, worker: _Worker) -> None:
        self._forget(worker)
        self._forker.end(worker.pid)

    def _forget(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.connection.close()

    def _restart(self, batch: _Batch) -> None:
        self.close()
        self._forker = Forker(self._job)
        batch.restart()


class _Worker:
    __slots__ = ("aside", "connection", "pending", "pid", "since", "suspect")

    def __init__(self, connection: Connection, pid: int) -> None:
        self.connection = connection
        self.pid = pid
        self.pending: list[int] = []  # items of its call that it has not reported; it is at the first
        self.since = 0.0  # when it began with that one, or with the call
        self.suspect: _Suspect | None = None
        self.aside = False

    def begin(self, now: float) -> None:
        self.since, self.suspect = now, None


@dataclass(slots=True)
class _Suspect:
    """A worker that is at one response for long, and may be stuck."""

    since: float
    times: ProcessTimes | None
    """As they were then."""
    check_at: float = 0.0


class _Batch:
    """Items, what is known of them, and the calls that are still to be handed out."""

    def __init__(self, items: Sequence[RewardInput], workers: int) -> None:
        self.items = items
        self.outcomes: dict[int, Outcome] = {}
        self.calls: deque[list[int]] = deque()
        self.set_aside = 0
        self._call_size = min(MAX_CALL, max(1, len(items) // (4 * workers)))
        self._seconds = 0.0
        self.restart()

    @property
    def unfinished(self) -> bool:
        return len(self.outcomes) < len(self.items)

    @property
    def finished(self) -> int:
        return len(self.outcomes)

    @property
    def mean_seconds(self) -> float:
        return self._seconds / max(1, self.finished)

    def restart(self) -> None:
        """Hand out everything that has no outcome."""
        missing = [i for i in range(len(self.items)) if i not in self.outcomes]
        size = self._call_size
        self.calls = deque(missing[k : k + size] for k in range(0, len(missing), size))

    def finish(self, index: int, outcome: Outcome, seconds: float = 0.0) -> None:
        self.outcomes[index] = outcome
        self._seconds += seconds

    def requeue(self, indices: Sequence[int]) -> None:
        """To be handed out next, as one call."""
        if indices:
            self.calls.appendleft(list(indices))

    def again(self, indices: Iterable[int]) -> None:
        """To be handed out next, one by one."""
        self.calls.extendleft([i] for i in reversed(list(indices)))
