"""Trainers that take turns: a `Side` of the benchmark is a process that calls a `Gate` around its steps.

TRL's environment imports this, too.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

VARIABLE = "MSSR_BENCH_TURNS"


class Gate:
    """In the trainer's process: `wait` before a step, `done` after it."""

    def __init__(self) -> None:
        self._benchmark = Connection(int(os.environ.pop(VARIABLE)))
        self._begun = False

    def wait(self) -> None:
        """Stand still until it is this side's turn."""
        if not self._begun:
            self._begun = True
            self.done({})
        try:
            self._benchmark.recv()
        except EOFError as error:
            raise SystemExit("the benchmark is gone") from error

    def done(self, record: dict[str, Any]) -> None:
        self._benchmark.send(record)


class Side:
    """A trainer in a process of its own, whose output goes to ``log``; ready for its first step."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.name, self._log = name, log
        self._trainer, there = Pipe()
        variables = os.environ | environment | {VARIABLE: str(there.fileno())}
        with log.open("w") as output, there:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=variables, pass_fds=[there.fileno()]
            )
        self._receive()

    def step(self) -> dict[str, Any]:
        """Let it make one step: what it tells of it, the ``seconds`` until it was done, and the
        ``cpu_seconds`` of its processes, which depend less on what else the machine does."""
        cpu, start = self._cpu_seconds(), time.perf_counter()
        self._trainer.send(None)
        record = self._receive()
        record["seconds"] = time.perf_counter() - start
        record["cpu_seconds"] = self._cpu_seconds() - cpu
        return record

    def close(self) -> None:
        """Wait for its end after the last step."""
        self._trainer.close()
        self._process.wait(120)

    def _cpu_seconds(self) -> float:
        root = psutil.Process(self._process.pid)
        times = (process.cpu_times() for process in (root, *root.children(recursive=True)))
        return sum(t.user + t.system for t in times)

    def _receive(self) -> dict[str, Any]:
        try:
            return dict(self._trainer.recv())
        except EOFError:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self.name} ended, see {self._log}:\n{tail}") from None
