"""Time limits: of a response's own CPU time, and a generous one of the clock. Decided by outcomes only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mssr.rewards import ScoredBatch
from tests.unit import reward_lab as lab
from tests.unit.reward_lab import inputs, write

pytestmark = pytest.mark.unit

BURN = """
import time
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
burn(0.3)  # loading costs no response anything
def f(response, answer):
    kind, _, seconds = response.partition(" ")
    burn(float(seconds)) if kind == "burn" else time.sleep(float(seconds))
    return 0.5
def many(responses, answers): return [f(r, a) for r, a in zip(responses, answers)]
async def later(response, answer): return f(response, answer)
"""


def score(folder: Path, function: str, responses: list[str], limit: float) -> ScoredBatch:
    file = write(folder, BURN).removesuffix("f")
    return lab.score(file + function, inputs(*responses), time_limit_s=limit)


@pytest.fixture
def busy_machine() -> Iterator[None]:
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    yield
    for burner in burners:
        burner.kill()
        burner.wait()


def test_a_busy_machine_costs_no_score(tmp_path: Path, busy_machine: None) -> None:
    """Beside those that take all they get. How long it takes by the clock depends on who else is there: three
    hundred times as long is still no reason; that the clock does not count is in the last test."""
    batch = score(tmp_path, "f", ["burn 0.1"] * 2, limit=3.0)
    assert batch.scores.tolist() == [0.5] * 2 and batch.errors == 0


@pytest.mark.parametrize("function", ["f", "many", "later"])
def test_each_response_has_its_own_limit_of_cpu_time(tmp_path: Path, function: str) -> None:
    batch = score(tmp_path, function, ["burn 0.08"] * 5 + ["burn 9", "burn 0.08"], limit=0.2)
    assert batch.scores.tolist() == [0.5] * 5 + [0, 0.5]
    assert (batch.errors, batch.timeouts) == (1, 1)


def test_who_waits_may_take_a_multiple_of_the_limit(tmp_path: Path) -> None:
    batch = score(tmp_path, "f", ["sleep 0.5", "sleep 1000", "sleep 0.5"], limit=0.4)
    assert batch.scores.tolist() == [0.5, 0, 0.5]
    assert (batch.errors, batch.timeouts) == (1, 1)
