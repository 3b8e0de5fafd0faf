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
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkProcess
from typing import TYPE_CHECKING, NoReturn

import pebble

from mssr.rewards import functions
from mssr.rewards.base import Failure, Outcome, RewardInput, combined
from mssr.rewards.penalties import penalised
from mssr.rewards.rows import NO_ROWS, RowAccess

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig

WALL_FACTOR = 10
"""``time_limit_s`` counts CPU time. What sleeps or waits, for a network or a core, is ended after so many
times as many seconds."""
MAX_CALL = 16
"""Responses of one call of a function that takes a list or is async."""
AHEAD = 4
"""Calls of other functions that are with a worker or wait for it."""
CHECK_S = 1.0
"""Seconds between looks at whether the pool is alive."""
LAST_WORDS_S = 0.2
"""Seconds from the death of a worker until pebble is told of it."""
_PDEATHSIG = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True, slots=True)
class Job:
    """What the workers are to do."""

    config: RewardConfig
    rewards: tuple[tuple[str, float, RewardConfig], ...]
    """Label, weight and section of each function, see `mssr.rewards.base.combined`."""
    max_response_length: int
    clip: bool
    """Whether penalties take a score no lower than 0."""
    workers: int
    together: bool
    """Whether a function takes several responses at a time: a list, or by being async."""
    rows: RowAccess = NO_ROWS
    """Where the rows are, if a function asks for what is in them."""
    sized: bool = False
    """Whether one asks for the sizes to which images are resized."""
    partial: bool = False
    """Whether other rewards are to be added before the penalties are taken off."""

    @property
    def wall_limit_s(self) -> float:
        """Seconds by the clock of one call."""
        return WALL_FACTOR * self.config.time_limit_s

    def outcome(self, item: RewardInput, outcomes: Sequence[Outcome]) -> Outcome:
        """That of what the functions gave."""
        labels, weights, _ = zip(*self.rewards, strict=True)
        outcome = combined(list(zip(labels, weights, outcomes, strict=True)))
        return outcome if self.partial else self.final(item, outcome)

    def final(self, item: RewardInput, outcome: Outcome) -> Outcome:
        """Less the penalties."""
        if isinstance(outcome, Failure):
            return outcome
        return penalised(outcome, item, self.config, self.max_response_length, self.clip)

    def too_long(self) -> Failure:
        """That of what took longer than `wall_limit_s`."""
        return Failure(
            f"no score within {self.wall_limit_s:g} s, {WALL_FACTOR} times its limit", timeout=True
        )


def main(fd: int) -> None:
    """Score what comes over the connection, ``(number, RewardInput)`` after a `Job`, until it is closed.

    Each is answered by ``(number, Outcome)``, in any order. If the pool breaks, as it does when an idle
    worker is killed, this process ends, and the driver starts another.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    signal.signal(signal.SIGTERM, _end)
    connection = Connection(fd)
    with contextlib.suppress(EOFError, OSError):  # the driver is gone
        job: Job = connection.recv()
        failure = _prepare(job)
        gc.collect()
        gc.freeze()  # the collector of a worker would copy every shared page
        pool = pebble.ProcessPool(
            job.workers, initializer=_begin, initargs=(job, failure, fd, os.getpid()), context=_Context()
        )
        asyncio.run(_serve(pool, connection, job))
    _end()


def _end(*_: object) -> NoReturn:
    for process in multiprocessing.active_children():
        process.terminate()
    os._exit(1)


def _prepare(job: Job) -> Failure | None:
    """Have what all workers share: what the named rules import, and the data, if the reward asks for them."""
    for _, _, config in job.rewards:
        if config.rule:
            warm_up = RewardInput(
                "<think>\n</think>\\boxed{\\sqrt{12}}", r"2\sqrt{3}", 1
            )  # reaches math-verify
            functions.load(config).call([warm_up])
    try:
        job.rows.open(job.sized)
        return None
    except Exception as error:  # told in place of every score
        return _failure(error)


class _Worker(ForkProcess):
    _died: float | None = None

    def is_alive(self) -> bool:
        # Pebble first is to read what a worker sent before it died, or it blames an earlier call.
        if super().is_alive():
            return True
        self._died = self._died or time.monotonic()
        return time.monotonic() < self._died + LAST_WORDS_S

    def terminate(self) -> None:
        """End it and whatever it started; a function may ignore SIGTERM, or not hear it."""
        assert self.pid is not None
        self._died = -math.inf
        _kill_group(self.pid)

    @property
    def exitcode(self) -> int | None:
        # Workers do not end by themselves. Pebble would not notice that a function has called os._exit(0).
        return super().exitcode or (None if self.is_alive() else 1)


class _Context(ForkContext):
    Process = _Worker  # type: ignore[assignment]


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            kill(pid, signal.SIGKILL)


async def _serve(pool: pebble.ProcessPool, connection: Connection, job: Job) -> None:
    """Have the pool score what the driver sends."""
    waiting: asyncio.Queue[tuple[int, RewardInput]] = asyncio.Queue()

    def receive() -> None:
        try:
            waiting.put_nowait(connection.recv())
        except (EOFError, OSError):  # the driver is gone
            _end()

    async def score(call: list[tuple[int, RewardInput]]) -> None:
        """Of a call of several that fails as a whole, each is tried again by itself."""
        result = await _call(pool, job, [item for _, item in call])
        if isinstance(result, Failure) and len(call) > 1:
            await asyncio.gather(*(score([one]) for one in call))
            return
        outcomes = [result] if isinstance(result, Failure) else result
        for (number, _), outcome in zip(call, outcomes, strict=True):
            connection.send((number, outcome))

    async def take_turns() -> None:
        while True:
            call = [await waiting.get()]
            more = min(MAX_CALL - 1, -(-waiting.qsize() // job.workers)) if job.together else 0
            await score(call + [waiting.get_nowait() for _ in range(more)])

    async def watch() -> None:
        while pool.active:
            await asyncio.sleep(CHECK_S)
        _end()

    asyncio.get_running_loop().add_reader(connection.fileno(), receive)
    turns = job.workers * (1 if job.together else AHEAD)
    await asyncio.gather(watch(), *(take_turns() for _ in range(turns)))


async def _call(pool: pebble.ProcessPool, job: Job, items: list[RewardInput]) -> list[Outcome] | Failure:
    timeout = job.wall_limit_s + job.together  # a worker ends coroutines itself, and is given the time to
    try:
        return await asyncio.wrap_future(pool.schedule(score_call, args=(items,), timeout=timeout))
    except TimeoutError:  # a function's own is a Failure by now
        return job.too_long()
    except pebble.ProcessExpired as error:
        _kill_group(error.pid)
        if error.exitcode == -signal.SIGPROF:
            return Failure(f"no score within {job.config.time_limit_s:g} s of CPU time", timeout=True)
        return Failure(f"its process died ({describe(error.exitcode)})")
    except Exception:  # the pool is broken
        _end()


_rewards: list[functions.LoadedReward] | Failure
_job: Job
_end_after: Callable[[float], None]


def _begin(job: Job, failure: Failure | None, driver: int, parent: int) -> None:
    """Make this process a worker: it loads the functions, and dies with its parent."""
    global _rewards, _job, _end_after
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
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _job, _end_after = job, _cpu_timer()
    try:
        _rewards = failure or [functions.load(config, job.rows) for _, _, config in job.rewards]
    except BaseException as error:
        _rewards = _failure(error)


def score_call(items: Sequence[RewardInput]) -> list[Outcome] | Failure:
    """Score the responses of a call, in a worker; a `Failure` is one of all of them.

    If the CPU time of this process exceeds the limit, the system ends it, whatever the function is at.
    """
    if isinstance(_rewards, Failure):
        return _rewards
    _end_after(_job.config.time_limit_s * len(items))
    try:
        found = [
            reward.loop.run_until_complete(_together(reward, items))
            if reward.is_async and not reward.batch
            else reward.call(items)
            for reward in _rewards
        ]
        return list(map(_job.outcome, items, zip(*found, strict=True)))
    except BaseException as error:  # sys.exit() in a user's function is an error as any other
        return _failure(error)
    finally:
        _end_after(0)


def _cpu_timer() -> Callable[[float], None]:
    """A setter of the seconds of CPU time after which the system ends this process, 0 for never.

    (``signal.setitimer`` counts ticks, and on a busy machine up to 40% too many.)
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    libc, timer = ctypes.CDLL("librt.so.1", use_errno=True), ctypes.c_void_p()
    event = (ctypes.c_int * 16)(0, 0, signal.SIGPROF, 0)  # a struct sigevent with SIGEV_SIGNAL
    if libc.timer_create(time.CLOCK_PROCESS_CPUTIME_ID, event, ctypes.byref(timer)):
        raise OSError(ctypes.get_errno(), "timer_create")

    def end_after(seconds: float) -> None:
        value = (ctypes.c_long * 4)(0, 0, int(seconds), int(seconds % 1 * 1e9))  # a struct itimerspec
        libc.timer_settime(timer, 0, value, None)

    return end_after


async def _together(reward: functions.LoadedReward, items: Sequence[RewardInput]) -> list[Outcome]:
    """All items of a call at the same time, each with its own limit."""

    async def one(item: RewardInput) -> Outcome:
        timeout = asyncio.timeout(_job.wall_limit_s)
        try:
            async with timeout:
                return reward.result(await reward.ask([item]))
        except BaseException as error:
            return _job.too_long() if timeout.expired() else _failure(error)

    return list(await asyncio.gather(*map(one, items)))


def _failure(error: BaseException) -> Failure:
    """What kind of error it is and its message in one line, and where it was raised."""
    try:
        told = traceback.TracebackException.from_exception(error)
        reason = " ".join(f"{type(error).__name__}: {told}"[:500].split())
        return Failure(reason, "".join(told.format())[-10_000:])
    except Exception:  # it cannot even be printed
        return Failure(type(error).__name__)


def describe(code: int) -> str:
    """How a process ended: "SIGSEGV", "exit code 3"."""
    return {-number: number.name for number in signal.Signals}.get(code, f"exit code {code}")
