"""The process that owns the workers, a pool of pebble, and what a worker does with a response.

The driver has threads, torch and the user's main module, none of which a worker should inherit: so it starts
this process, which imports little, and pebble forks the workers from here. `mssr.rewards.pool` is the other
side. This module and what it imports stay free of torch and Ray, unless a reward asks for images.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkProcess
from typing import TYPE_CHECKING, NoReturn

import pebble

from mssr.algorithms import plugins
from mssr.rewards import functions, penalties
from mssr.rewards.base import Failure, Outcome, RewardInput, RewardResult
from mssr.rewards.rows import RowAccess, RowReader

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig

WALL_FACTOR = 10
"""``time_limit_s`` counts CPU time. What sleeps or waits, for a network or a core, is ended after so many
times as many seconds."""
MAX_CALL = 16
"""Responses of one call of a function that takes a list or is async."""
CHECK_S = 1.0
"""Seconds between looks at whether the pool is alive."""
_PDEATHSIG = 1  # prctl's PR_SET_PDEATHSIG

Entry = tuple[int, RewardInput]
"""A response and the number by which the driver knows it."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the workers are to do."""

    config: RewardConfig
    max_response_length: int
    workers: int
    together: bool
    """Whether the function takes several responses at a time: a list, or by being async."""
    rows: RowAccess | None = None
    """Where the rows are, if the function asks for what is in them."""


def main(fd: int) -> None:
    """Score what comes over the connection, ``(number, RewardInput)`` after a `Job`, until it is closed.

    Each is answered by ``(number, Outcome)``, in any order. If the pool breaks, as it does when an idle
    worker is killed, this process ends, and the driver starts another.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    code = 1
    with contextlib.suppress(EOFError, OSError):  # the driver is gone
        job: Job = connection.recv()
        reader = _prepare(job)
        gc.collect()
        gc.freeze()  # the collector of a worker would copy every shared page
        pool = pebble.ProcessPool(
            job.workers, initializer=_begin, initargs=(job, reader, fd, os.getpid()), context=_Context()
        )
        calls = _Calls(pool, connection, job)
        while pool.active:
            if connection.poll(CHECK_S):
                calls.add(connection.recv())
    _end(code)


def _end(code: int) -> NoReturn:
    for process in multiprocessing.active_children():
        process.terminate()
    os._exit(code)


def _prepare(job: Job) -> RowReader | Failure | None:
    """What all workers share: the imports of the named rules, and the data, if the reward asks for them."""
    if not plugins.is_spec(job.config.name):
        warm_up = RewardInput("<think>\n</think>\\boxed{\\sqrt{12}}", r"2\sqrt{3}", 1)  # reaches math-verify
        functions.load(job.config).call([warm_up])
    try:
        return None if job.rows is None else RowReader(job.rows)
    except Exception as error:  # told in place of every score
        return _failure(error)


class _Worker(ForkProcess):
    def terminate(self) -> None:
        """End it and whatever it started; a function may ignore SIGTERM, or not hear it."""
        assert self.pid is not None
        kill_group(self.pid)

    @property
    def exitcode(self) -> int | None:
        # Workers do not end by themselves. Pebble would not notice that a function has called os._exit(0).
        return super().exitcode or (None if self.is_alive() else 1)


class _Context(ForkContext):
    Process = _Worker  # type: ignore[assignment]


def kill_group(pid: int) -> None:
    """Kill a worker and its children."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


class _Calls:
    """Hands responses to the pool and their outcomes to the driver.

    Of a call of several that fails as a whole, each is tried again by itself.
    """

    def __init__(self, pool: pebble.ProcessPool, connection: Connection, job: Job) -> None:
        self._pool, self._connection, self._job = pool, connection, job
        self._wall = WALL_FACTOR * job.config.time_limit_s
        self._waiting: deque[Entry] = deque()
        self._running = 0  # calls of a function that takes several
        self._lock, self._sending = threading.RLock(), threading.Lock()

    def add(self, entry: Entry) -> None:
        if self._job.together:
            self._waiting.append(entry)
            self._gather()
        else:
            self._schedule([entry])

    def _gather(self) -> None:
        """While all workers are busy, responses gather for the next call."""
        with self._lock:
            while self._waiting and self._running < self._job.workers:
                size = min(MAX_CALL, -(-len(self._waiting) // (self._job.workers - self._running)))
                self._running += 1
                self._schedule([self._waiting.popleft() for _ in range(size)])

    def _schedule(self, call: list[Entry]) -> None:
        items = [item for _, item in call]
        try:
            # A worker ends coroutines itself, and is given the time to.
            future = self._pool.schedule(score_call, args=(items,), timeout=self._wall + self._job.together)
        except RuntimeError:  # the pool is broken
            _end(1)
        future.add_done_callback(lambda done: self._finish(call, done))

    def _finish(self, call: list[Entry], future: Future[list[Outcome] | Failure]) -> None:
        result = self._result(future)
        with self._lock:
            self._running -= self._job.together
            if isinstance(result, Failure) and len(call) > 1:
                self._running += len(call)
                for entry in call:
                    self._schedule([entry])
                return
        self._gather()
        outcomes = [result] if isinstance(result, Failure) else result
        with self._sending, contextlib.suppress(OSError):  # the driver is gone, which `main` notices
            for (number, _), outcome in zip(call, outcomes, strict=True):
                self._connection.send((number, outcome))

    def _result(self, future: Future[list[Outcome] | Failure]) -> list[Outcome] | Failure:
        try:
            return future.result()
        except TimeoutError:  # a function's own is a Failure by now
            return Failure(f"no score within {self._wall:g} s, {WALL_FACTOR} times its limit", timeout=True)
        except pebble.ProcessExpired as error:
            kill_group(error.pid)
            if error.exitcode == -signal.SIGPROF:
                limit = self._job.config.time_limit_s
                return Failure(f"no score within {limit:g} s of CPU time", timeout=True)
            return Failure(f"its process died ({describe(error.exitcode)})")
        except Exception:  # the pool is broken
            _end(1)


_reward: functions.LoadedReward | Failure
_job: Job
_timer: _CpuTimer


def _begin(job: Job, reader: RowReader | Failure | None, driver: int, parent: int) -> None:
    """Make this process a worker: it loads the function, and dies with its parent."""
    global _reward, _job, _timer
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)  # what the function starts is killed with the worker
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.close(driver)
    with contextlib.suppress(OSError):  # when memory runs out, this process goes and not the training
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _job, _timer = job, _CpuTimer()
    try:
        if isinstance(reader, Failure):
            _reward = reader
        else:
            _reward = functions.load(job.config, reader=reader)
    except BaseException as error:
        _reward = _failure(error)


def score_call(items: Sequence[RewardInput]) -> list[Outcome] | Failure:
    """Score the responses of a call, in a worker; a `Failure` is one of all of them.

    If the CPU time of this process exceeds the limit, the system ends it, whatever the function is at.
    """
    if isinstance(_reward, Failure):
        return _reward
    with _timer.limit(_job.config.time_limit_s * len(items)):
        try:
            if _reward.is_async and not _reward.batch:
                return _reward.run(_together(_reward, items))
            return [_finish(r, item) for r, item in zip(_reward.call(items), items, strict=True)]
        except BaseException as error:  # sys.exit() in a user's function is an error as any other
            return _failure(error)


class _CpuTimer:
    """Ends this process when it has used so much CPU time, whatever it is at and however busy the machine is.

    (``signal.setitimer`` counts ticks, and on a busy machine up to 40% too many.)
    """

    def __init__(self) -> None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        self._libc, self._timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
        if not hasattr(self._libc, "timer_create"):  # glibc before 2.34
            self._libc = ctypes.CDLL("librt.so.1", use_errno=True)
        event = (ctypes.c_int * 16)(0, 0, signal.SIGPROF, 0)  # a struct sigevent with SIGEV_SIGNAL
        if self._libc.timer_create(time.CLOCK_PROCESS_CPUTIME_ID, event, ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        self._set(seconds)
        try:
            yield
        finally:
            self._set(0)

    def _set(self, seconds: float) -> None:
        value = (ctypes.c_long * 4)(0, 0, int(seconds), int(seconds % 1 * 1e9))  # a struct itimerspec
        self._libc.timer_settime(self._timer, 0, value, None)


async def _together(reward: functions.LoadedReward, items: Sequence[RewardInput]) -> list[Outcome]:
    """All items of a call at the same time, each with its own limit."""
    limit = WALL_FACTOR * _job.config.time_limit_s

    async def one(item: RewardInput) -> Outcome:
        timeout = asyncio.timeout(limit)
        try:
            async with timeout:
                return _finish(await reward.call_async(item), item)
        except BaseException as error:
            if timeout.expired():
                return Failure(f"no score within {limit:g} s, {WALL_FACTOR} times its limit", timeout=True)
            return _failure(error)

    return list(await asyncio.gather(*(one(item) for item in items)))


def _finish(result: RewardResult, item: RewardInput) -> RewardResult:
    """The result less the configured penalties, which become parts, as does the score before them."""
    taken = penalties.penalties(_job.config, _job.max_response_length, item)
    if not taken:
        return result
    parts = {"accuracy": result.score, **result.parts, "score_raw": result.score, **taken}
    return RewardResult(result.score - sum(taken.values()), parts)


def _failure(error: BaseException) -> Failure:
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # an exception that cannot even be printed
        text = ""
    return Failure(one_line(error), text[-10_000:])


def one_line(error: BaseException) -> str:
    """What kind of error it is, and its message."""
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be had)"
    return " ".join(f"{type(error).__name__}: {text}"[:500].split())


def describe(code: int) -> str:
    """How a process ended: "exit code 3", "SIGSEGV"."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
