"""The driver's side of the processes that score: responses go out, outcomes come back, nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
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
        self._closed = False
        self._restarts = 0
        self._process = _Process(job)
        self._listen()

    def submit(self, item: RewardInput) -> Future[Outcome]:
        """Have a response scored.

        The future raises TrainingError if the processes cannot be kept running.

        Raises:
            ValueError: the pool is closed.
        """
        future: Future[Outcome] = Future()
        with self._lock:
            if self._closed:
                raise ValueError("the pool of reward processes is closed")
            if self._error is not None:
                future.set_exception(self._error)
                return future
            number = next(self._numbers)
            self._pending[number] = item, future
            self._process.send((number, item))
        return future

    def reset(self) -> None:
        """Cancel everything that is pending; what comes next meets workers that owe nothing."""
        with self._lock:
            self._cancel()
            if self._closed or self._error is not None:
                return
            self._process.close()
            self._start()

    def close(self) -> None:
        """End all processes; the pool cannot be used afterwards."""
        with self._lock:
            self._closed = True
            self._cancel()
            self._process.close()

    def _cancel(self) -> None:
        for _, future in self._pending.values():
            future.cancel()
        self._pending.clear()

    def _start(self) -> None:
        self._process = _Process(self._job)
        for number, (item, _) in self._pending.items():
            self._process.send((number, item))
        self._listen()

    def _listen(self) -> None:
        threading.Thread(target=self._receive, args=(self._process,), name="rewards", daemon=True).start()

    def _receive(self, process: _Process) -> None:
        """The thread of a process, as long as that lives."""
        while (message := process.receive()) is not None:
            number, outcome = message
            with self._lock:
                self._restarts = 0
                _, future = self._pending.pop(number, (None, None))
            if future is not None:
                future.set_result(outcome)
        how = describe(process.wait())
        with self._lock:
            if self._closed or process is not self._process:
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


class _Process:
    """The process of `mssr.rewards.worker.main`."""

    def __init__(self, job: Job) -> None:
        self._socket, theirs = socket.socketpair()
        # Not by multiprocessing, which would import the user's main module there and in every worker.
        code = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[2])\n"
            "from mssr.rewards.worker import main; main(int(sys.argv[1]))"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), json.dumps(list(map(str, sys.path)))],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
        self._connection = Connection(os.dup(self._socket.fileno()))
        self.send(job)

    def send(self, message: object) -> None:
        with contextlib.suppress(OSError):  # it has died, which `receive` notices
            self._connection.send(message)

    def receive(self) -> tuple[int, Outcome] | None:
        """The next outcome with its number; None if it has ended."""
        try:
            return self._connection.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            return None

    def wait(self) -> int:
        return self._process.wait()

    def close(self) -> None:
        """End it and its workers; may be called again."""
        with contextlib.suppress(OSError):  # it has ended
            self._socket.shutdown(socket.SHUT_RDWR)  # upon which it kills its workers and ends
        self._socket.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:  # it is loading something
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    """One thread a process, and the same order of sets in every run."""
    defaults = {"PYTHONHASHSEED": "0"} | dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"
    )
    return defaults | dict(os.environ)
