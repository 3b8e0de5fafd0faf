"""What may happen to a run. Each function does one thing to it and says what it did.

Those in `DRIVER_ENDS` end the driver; then the same command is given again, as a user would.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.run import PATIENCE_S, Run, Skipped

Injury = Callable[[Run, random.Random], str]


def kill_engine(run: Run, rng: random.Random) -> str:
    return run.kill("rollout-0.log")


def kill_actor_rank(run: Run, rng: random.Random) -> str:
    return run.kill(f"actor-{rng.randrange(2)}.log")


def stop_actor_rank(run: Run, rng: random.Random) -> str:
    """The process is there and does nothing: what the others wait for is a collective that hangs."""
    return run.kill(f"actor-{rng.randrange(2)}.log", signal.SIGSTOP)


def stop_engine(run: Run, rng: random.Random) -> str:
    return run.kill("rollout-0.log", signal.SIGSTOP)


def kill_reward_pool(run: Run, rng: random.Random) -> str:
    [pool] = [p for p in run.processes() if "mssr.rewards.worker" in " ".join(p.cmdline()) and is_root(p)]
    pool.kill()
    return f"kill -9 of the reward pool ({pool.pid})"


def is_root(process) -> bool:
    """Whether a process of the pool is the one that forks the others."""
    parent = process.parent()
    return parent is None or "mssr.rewards.worker" not in " ".join(parent.cmdline())


def reward_hangs(run: Run, rng: random.Random) -> str:
    (run.directory / "hang-reward").touch()
    return "a reward sleeps for an hour"


def kill_driver(run: Run, rng: random.Random) -> str:
    run.process.kill()
    return "kill -9 of the driver"


def sigterm(run: Run, rng: random.Random) -> str:
    run.process.send_signal(signal.SIGTERM)
    return "SIGTERM"


def ctrl_c(run: Run, rng: random.Random) -> str:
    os.killpg(run.process.pid, signal.SIGINT)
    return "Ctrl-C"


def truncated_checkpoint(run: Run, rng: random.Random) -> str:
    _wait_for_two_checkpoints(run)
    run.process.kill()
    run.process.wait()
    path = _file_of_newest_checkpoint(run, rng)
    os.truncate(path, path.stat().st_size // 2)
    run.expected_events.add("damaged_checkpoint")
    return f"{_name(path)} cut in half, driver killed"


def flipped_bit_in_checkpoint(run: Run, rng: random.Random) -> str:
    _wait_for_two_checkpoints(run)
    run.process.kill()
    run.process.wait()
    path = _file_of_newest_checkpoint(run, rng)
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    run.expected_events.add("damaged_checkpoint")
    return f"{_name(path)}: one bit flipped, driver killed"


def disk_full(run: Run, rng: random.Random) -> str:
    """Only while checkpoints/ is a file system of its own, which `run` makes where it may."""
    if not run.small_disk:
        raise Skipped("no right to mount a small file system")
    ballast = run.run_dir / "checkpoints" / "ballast"
    before = _failed_checkpoints(run)
    deadline = time.monotonic() + PATIENCE_S
    while _failed_checkpoints(run) == before and run.process.poll() is None:
        assert time.monotonic() < deadline, f"no checkpoint fails on a full disk; see {run.directory}"
        # Again and again, for the run removes what it could not write. The disk may be full already.
        with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))
        time.sleep(0.05)
    ballast.unlink(missing_ok=True)
    run.expected_events.add("checkpoint_failed")
    return "the disk is full until a checkpoint has failed"


def nan_on_one_rank(run: Run, rng: random.Random) -> str:
    (run.directory / "nan-on-rank-1").touch()
    return "NaN in the loss of rank 1"


INJURIES: dict[str, Injury] = {
    f.__name__: f
    for f in (
        kill_engine,
        kill_actor_rank,
        stop_actor_rank,
        stop_engine,
        kill_reward_pool,
        reward_hangs,
        kill_driver,
        sigterm,
        ctrl_c,
        truncated_checkpoint,
        flipped_bit_in_checkpoint,
        disk_full,
    )
}
"""After which a run goes on exactly as if they had not happened. (After a NaN an update is missing.)"""
DRIVER_ENDS = {
    "kill_driver": -signal.SIGKILL,
    "truncated_checkpoint": -signal.SIGKILL,
    "flipped_bit_in_checkpoint": -signal.SIGKILL,
    "sigterm": 128 + signal.SIGTERM,
    "ctrl_c": 128 + signal.SIGINT,
}
"""Injury -> exit code."""


def _wait_for_two_checkpoints(run: Run) -> None:
    """Where the only one is damaged a run refuses to start, rather than silently afresh."""
    deadline = time.monotonic() + PATIENCE_S
    while len(list((run.run_dir / "checkpoints").glob("step-*"))) < 2 and run.process.poll() is None:
        assert time.monotonic() < deadline, f"there is no second checkpoint; see {run.directory}"
        time.sleep(0.05)


def _failed_checkpoints(run: Run) -> int:
    return sum(e["event"] == "checkpoint_failed" for e in run.events())


def _file_of_newest_checkpoint(run: Run, rng: random.Random) -> Path:
    checkpoints = run.run_dir / "checkpoints"
    newest = checkpoints / (checkpoints / "latest").read_text()
    return rng.choice(sorted(p for p in newest.rglob("*") if p.is_file()))


def _name(path: Path) -> str:
    return str(path).rpartition("checkpoints/")[2]
