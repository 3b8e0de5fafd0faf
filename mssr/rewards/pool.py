"""The driver's side of the processes that score: responses go out, outcomes come back, nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection

from mssr.errors import TrainingError
from mssr.rewards.base import Outcome, RewardInput
from mssr.rewards.worker import Job, describe

MAX_RESTARTS = 3
"""Losses of the process that owns the workers, without a score between them."""
# Not by multiprocessing, which would import the user's main module there and in every worker.
_CODE = """import json, sys; sys.path[:] = json.loads(sys.argv[2])
from mssr.rewards.worker import main; main(int(sys.argv[1]))"""
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", **_ONE_THREAD}
"""The same order of sets in every run, one thread a process."""


class RewardPool:
    """Workers that score with one function.

    Their process starts with the object and loads the function while the caller goes on. If it dies it is
    started again, and what it had in hand is scored again.

    Args:
        on_restart: called with one sentence, how it died, each time before it is started again, from a thread
            of this object. If it raises, every response that has no outcome gets that exception.
    """

    def __init__(self, job: Job, on_restart: Callable[[str], None] | None = None) -> None:
        self._job, self._on_restart = job, on_restart
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[RewardInput, Future[Outcome]]] = {}
        self._lock = threading.RLock()
        self._error: BaseException | None = None
        self._restarts = 0
        self._start()

    def submit(self, item: RewardInput) -> Future[Outcome]:
        """Have a response scored.

        The future raises TrainingError if the processes cannot be kept running, ValueError if the pool is
        closed.
        """
        future: Future[Outcome] = Future()
        with self._lock:
            if self._error is not None:
                future.set_exception(self._error)
                return future
            number = next(self._numbers)
            self._pending[number] = item, future
            self._send((number, item))
        return future

    def reset(self) -> None:
        """Cancel everything that is pending; what comes next meets workers that owe nothing."""
        with self._lock:
            self._cancel()
            if self._error is None:
                self._end()
                self._start()

    def close(self) -> None:
        """End all processes; the pool cannot be used afterwards. May be called again."""
        with self._lock:
            self._error = ValueError("the pool of reward processes is closed")
            self._cancel()
            self._end()

    def _cancel(self) -> None:
        with contextlib.suppress(KeyError):  # there are none left
            while True:
                _, (_, future) = self._pending.popitem()
                future.cancel()

    def _start(self) -> None:
        """A process of `mssr.rewards.worker.main`, which is sent what is pending, and a thread for it."""
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CODE, str(theirs.fileno()), json.dumps(list(map(str, sys.path)))],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT | os.environ,
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
        args = self._process, self._connection
        threading.Thread(target=self._receive, args=args, name="rewards", daemon=True).start()
        self._send(self._job)
        for number, (item, _) in list(self._pending.items()):
            self._send((number, item))

    def _send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # the process has died, which `_receive` notices
            self._connection.send(message)

    def _end(self) -> None:
        self._process.terminate()  # upon which it kills its workers and ends
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:  # it is loading something
            self._process.kill()
            self._process.wait()

    def _receive(self, process: subprocess.Popen[bytes], connection: Connection) -> None:
        """The thread of a process, as long as that lives."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, outcome = connection.recv()
                self._restarts = 0
                _, future = self._pending.pop(number, (None, None))
                # (Without the lock, which others hold while they send: then nobody would receive.)
                if future is not None:
                    future.set_result(outcome)
        how = describe(process.wait())
        with self._lock:
            if self._error is not None or process is not self._process:
                return
            self._restarts += 1
            try:
                if self._restarts > MAX_RESTARTS:
                    raise TrainingError(f"the processes that score rewards keep dying ({how})")
                if self._on_restart is not None:
                    self._on_restart(f"the process that owns the reward workers died ({how})")
                self._start()
            except BaseException as error:
                self._error = error
                for _, future in self._pending.values():
                    future.set_exception(error)
                self._pending.clear()
