"""One real run (Ray, vLLM, two FSDP2 ranks) that is watched, injured and started again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

MARK = "MSSR_CHAOS_RUN"
"""Environment variable by which every process of a run is known."""
STEPS = 10
ARGUMENTS = [
    f"trainer.steps={STEPS}",
    "trainer.save_every=2",
    "trainer.val_every=3",
    "trainer.samples_every=1",
    "trainer.keep_checkpoints=3",
    "trainer.max_restarts=5",
    "cluster.hang_timeout_s=120",  # on busy cores ranks that start wait long for each other
    "reward.time_limit_s=20",  # what takes so long hangs, and is not only waiting for a core
    "rollout.rollouts_per_step=16",
    "actor.lr=0.005",
]
PATIENCE_S = 1500.0
"""Bounds a hang. Beside others that burn the cores a run of one minute takes five."""
CLOCKS = ("timing/", "perf/", "memory/")
REWARD_TROUBLE = ("reward/errors", "reward/timeouts")


class Skipped(Exception):
    """An injury that this machine does not allow; the message says why."""


class Run:
    """A training in a directory of its own.

    Args:
        small_disk: put its checkpoints on a small file system of their own, if that is allowed.
    """

    def __init__(self, directory: Path, config: Path, small_disk: bool = False):
        directory.mkdir(parents=True)
        self.directory = directory
        self.run_dir = directory / "run"
        self.extra: Sequence[str] = ()
        """Overrides of the next start."""
        self.expected_events: set[str] = set()
        self.screen = directory / "screen.txt"
        self._mark = uuid.uuid4().hex
        shutil.copy(Path(__file__).with_name("plugins.py"), directory)
        self._command = [
            *(sys.executable, "-m", "mssr.tools.cli", "train", str(config), *ARGUMENTS),
            f"trainer.run_dir={self.run_dir}",
            f"reward.name={directory}/plugins.py:reward",
            f"algorithm.loss.name={directory}/plugins.py:loss",
        ]
        self.small_disk = small_disk and self._mount()

    def start(self) -> None:
        with self.screen.open("ab") as screen:
            self.process = subprocess.Popen(
                [*self._command, *self.extra],
                stdout=screen,
                stderr=screen,
                start_new_session=True,
                env=os.environ | {MARK: self._mark},
            )

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"the run hangs; see {self.directory}") from None

    def reach(self, step: int) -> None:
        """Wait until the record of a step is there, or the run has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and not any(r["step"] >= step for r in self.metrics()):
            assert time.monotonic() < deadline, f"step {step} is never reached; see {self.directory}"
            time.sleep(0.02)

    def metrics(self) -> list[dict[str, Any]]:
        return _lines(self.run_dir / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        return _lines(self.run_dir / "events.jsonl")

    def samples(self) -> dict[str, str]:
        return {p.name: p.read_text() for p in sorted((self.run_dir / "samples").glob("*.jsonl"))}

    def processes(self) -> list[psutil.Process]:
        """All that belong to the run, Ray's included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self, log: str, number: int = signal.SIGKILL) -> str:
        """Send a signal to the worker that writes this log; where it is being replaced, to the next one.

        Of the driver that runs now: those of one that was killed before may still be about to end.
        """
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    if os.readlink(f"/proc/{process.pid}/fd/1") == str(self.run_dir / "logs" / log):
                        process.send_signal(number)
                        return f"{signal.Signals(number).name} to {log.removesuffix('.log')} ({process.pid})"
                except (OSError, psutil.Error):
                    continue
            time.sleep(0.05)
        raise AssertionError(f"no process writes {log}; see {self.directory}")

    def close(self) -> None:
        """End what is left and give back the disk."""
        for process in self.processes():
            process.kill()
        if self.small_disk:
            subprocess.run(["umount", "-l", str(self.run_dir / "checkpoints")], check=True)

    def _mount(self) -> bool:
        target = self.run_dir / "checkpoints"
        target.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(target)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False


def comparable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what a clock says, and what an injured reward pool does."""
    hidden = (*CLOCKS, *REWARD_TROUBLE)
    return [{k: v for k, v in r.items() if not k.startswith(hidden)} for r in records]


def abandoned_memory() -> set[str]:
    """Shared memory that no process maps or has open. (Other runs on this machine use theirs.)"""
    used = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            used |= {line.split(maxsplit=5)[5] for line in maps if "/dev/shm/" in line}
            used |= {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    return {name for name in os.listdir("/dev/shm") if f"/dev/shm/{name}" not in used}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may be written to at this moment."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
