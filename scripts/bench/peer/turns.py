"""Two trainers that take turns: each stands still until the benchmark lets it make one step.

The benchmark opens a `Side`, a process that runs a trainer; the trainer calls a `Gate` around its steps.
TRL's environment imports this, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

VARIABLE = "MSSR_BENCH_TURNS"


class Gate:
    """In the trainer's process: `wait` before a step, `done` after it."""

    def __init__(self) -> None:
        go, told = map(int, os.environ.pop(VARIABLE).split(","))
        self._go, self._told = os.fdopen(go, "rb"), os.fdopen(told, "w")
        self._begun = False

    def wait(self) -> None:
        """Stand still until it is this side's turn."""
        if not self._begun:
            self._begun = True
            self.done({})
        if not self._go.read(1):
            raise SystemExit("the benchmark is gone")

    def done(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self._told, flush=True)


class Side:
    """A trainer in a process of its own.

    Args:
        command: of the process; its output goes to ``log``.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.name, self._log = name, log
        go_here, self._go = os.pipe()
        told, told_here = os.pipe()
        variables = os.environ | environment | {VARIABLE: f"{go_here},{told_here}"}
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=variables, pass_fds=(go_here, told_here)
            )
        os.close(go_here)
        os.close(told_here)
        self._told = os.fdopen(told)

    def ready(self) -> None:
        """Wait until the first step can begin."""
        self._read()

    def step(self) -> dict[str, Any]:
        """Let it make one step: what it tells of it, the ``seconds`` until it was done, and the
        ``cpu_seconds`` of its processes, which depend less on what else the machine does."""
        cpu, start = self._cpu_seconds(), time.perf_counter()
        os.write(self._go, b"1")
        record = self._read()
        record["seconds"] = time.perf_counter() - start
        record["cpu_seconds"] = self._cpu_seconds() - cpu
        return record

    def close(self) -> None:
        """Wait for its end after the last step."""
        os.close(self._go)
        self._process.wait(120)

    def _cpu_seconds(self) -> float:
        root = psutil.Process(self._process.pid)
        times = (process.cpu_times() for process in (root, *root.children(recursive=True)))
        return sum(t.user + t.system for t in times)

    def _read(self) -> dict[str, Any]:
        line = self._told.readline()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self.name} ended, see {self._log}:\n{tail}")
        return json.loads(line)
