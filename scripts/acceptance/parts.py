"""What a part of the acceptance is given, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Told = dict[str, str]
"""What a part measured, by name, for the report."""


class NotPossible(Exception):
    """This machine cannot do it; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where the parts run."""

    scratch: Path
    """A directory for all parts of this acceptance."""
    quick: bool
    gpus: int
    """0: the CPU stands in."""

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


Part = Callable[[Place], Told]


def layout(place: Place, placement: str) -> list[str]:
    """Overrides that place ranks and engines on all GPUs (at most 8), or one of each on the CPU.

    Raises:
        NotPossible: there are too few GPUs.
    """
    if not place.gpus:
        ranks, engines = 1, 1
    elif placement == "colocated":
        ranks = engines = min(place.gpus, 8)
    elif place.gpus == 1:
        raise NotPossible("one GPU: ranks and engines cannot be apart")
    else:
        engines = max(1, min(place.gpus, 8) // 4)
        ranks = min(place.gpus, 8) - engines
    return [f"cluster.placement={placement}", f"actor.num_ranks={ranks}", f"rollout.workers={engines}"]


def mssr(*arguments: str | Path, fine: Sequence[int] = (0,)) -> str:
    """What a command prints.

    Raises:
        AssertionError: it ends with none of the codes that are fine; with the end of what it said.
    """
    command = [sys.executable, "-m", "mssr.tools.cli", *map(str, arguments)]
    print("+ mssr", *arguments, flush=True)
    ran = subprocess.run(command, capture_output=True, text=True)
    print(ran.stdout, ran.stderr, flush=True)
    end = (ran.stderr.strip() or ran.stdout.strip())[-300:]
    assert ran.returncode in fine, f"mssr {arguments[0]} ended with {ran.returncode}: {end}"
    return ran.stdout


def train(place: Place, name: str, config: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a run that is in the scratch directory by its name."""
    run_dir = place.scratch / name
    options = [f"cluster.device={place.device}", "trainer.progress=plain", *overrides]
    mssr("train", config, *options, f"trainer.run_dir={run_dir}")
    return records(run_dir)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Those of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
