"""Hanging, dying and hostile reward functions lose their own responses and nothing else: real processes."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mssr.data_config import RewardConfig
from mssr.errors import TrainingError
from mssr.rewards import RewardInput, ScoredBatch, Scorer, pool

pytestmark = pytest.mark.unit

LIMIT = 0.4
HOSTILE = r'''
import ctypes, os, re, resource, signal, subprocess, sys, threading, time

class Rude(BaseException):
    def __str__(self):
        raise RuntimeError("not even this")

class Number(float):
    def __float__(self):
        while True: pass

def act(response, answer):
    """The response says what to do; its last word is the score."""
    command, _, value = response.partition(" ")
    if command == "loop":
        while True: pass
    if command == "sleep": time.sleep(1e6)
    if command == "stubborn":
        while True:
            try: time.sleep(1e6)
            except BaseException: pass
    if command == "regex": re.match("(a+)+$", "a" * 64 + "b")  # in C, deaf to Python's signals
    if command == "ignores":
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
        while True: pass
    if command == "float": return Number(1)
    if command == "child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1e6)", "orphan-of-a-reward"])
    if command == "input": input()
    if command == "raise": raise KeyError("lost")
    if command == "rude": raise Rude
    if command == "interrupt": raise KeyboardInterrupt
    if command == "sysexit": sys.exit(0)
    if command == "exit": os._exit(3)
    if command == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if command == "group": os.killpg(0, signal.SIGKILL)
    if command == "segfault": ctypes.string_at(0)
    if command == "recursion": return act(response, answer)
    if command == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
        return len(bytearray(2**40))
    if command == "close": os.closerange(3, 64); return 1.0
    if command == "nan": return float("nan")
    if command == "none": return None
    if command == "thread": threading.Thread(target=time.sleep, args=(1e6,)).start()
    if command == "print":
        print("out of a reward"); print("err of a reward", file=sys.stderr)
    if command == "slow": time.sleep(0.15)
    return float(value or 1)
'''
TIMEOUTS = ["loop", "sleep", "stubborn", "regex", "ignores", "float", "child"]
DEATHS = ["exit", "kill", "group", "segfault"]
ERRORS = ["input", "raise", "rude", "interrupt", "sysexit", "recursion", "memory", "nan", "none"]


def inputs(*responses: str) -> list[RewardInput]:
    return [RewardInput(response, "", 1) for response in responses]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "hostile.py"
    path.write_text(HOSTILE)
    return path


@pytest.fixture
def scorer(hostile: Path) -> Iterator[Scorer]:
    with make(hostile) as scorer:
        yield scorer


def make(hostile: Path, function: str = "act", **changes: object) -> Scorer:
    settings = {"name": f"{hostile}:{function}", "time_limit_s": LIMIT, "workers": 2} | changes
    return Scorer(RewardConfig(**settings), 100)  # type: ignore[arg-type]


def timed(scorer: Scorer, items: list[RewardInput]) -> tuple[ScoredBatch, float]:
    start = time.monotonic()
    batch = scorer.score(items)
    return batch, time.monotonic() - start


@pytest.mark.parametrize("command", TIMEOUTS)
def test_what_hangs_is_ended_at_the_limit_and_loses_only_itself(scorer: Scorer, command: str) -> None:
    scorer.score(inputs("fine"))  # the function is loaded
    batch, seconds = timed(scorer, inputs("fine 0.25", command, *["fine 0.5"] * 20))
    assert batch.scores.tolist() == [0.25, 0, *[0.5] * 20]
    assert (batch.errors, batch.timeouts) == (1, 1)
    assert LIMIT <= seconds < LIMIT + 0.5


@pytest.mark.parametrize("command", [*DEATHS, *ERRORS])
def test_what_dies_or_raises_loses_only_itself(scorer: Scorer, command: str) -> None:
    batch = scorer.score(inputs("fine 0.25", command, *["fine 0.5"] * 20, command))
    assert batch.scores.tolist() == [0.25, 0, *[0.5] * 20, 0]
    assert (batch.errors, batch.timeouts) == (2, 0)
    assert scorer.score(inputs("fine 0.25")).scores.tolist() == [0.25]
