"""The records of the study: reading them, choosing learning rates, and the statistics of docs/study.md.

A record is a dict, a line of records/*.jsonl; README.md says what is in it. Steps count from 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from mssr.runs.jsonl import read_records

RECORDS = Path(__file__).resolve().parent / "records"
SELECTION_SEED = 100
"""Chooses each method's own best learning rate on the grid, and is used for nothing else."""
LEVEL = 0.95
"""Of every interval."""
WINDOW = 5
"""Steps in a mean of sampled accuracy: 640 responses, a standard error of at most 2 points."""
LAST = 10
"""Steps that count as the end of a run."""
COLLAPSE = 0.15
"""A run has collapsed where its end is so far below its best."""
ESCAPED = 0.5
"""A run has left the local optimum where at its end this share of responses have steps."""

Record = Mapping[str, Any]


def read_all(directory: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, in the order of the files' names.

    Raises:
        ValueError: a job is there twice.
    """
    records = [record for path in sorted(directory.glob("*.jsonl")) for record in read_records(path)]
    seen: set[str] = set()
    for record in records:
        if record["job"] in seen:
            raise ValueError(f"{record['job']} is in {directory} twice; remove one of the two lines")
        seen.add(record["job"])
    return records


def own_best_lr(records: Iterable[Record], method: str) -> float | None:
    """The rate of the grid with a method's highest mean validation accuracy, by the selection seed.

    The mean is over the run's validations, so it counts how fast and how high. Of equal rates the lowest.
    None where no such run is there; a rate without one is not chosen.
    """
    chooses = [
        (-fmean(record["curves"]["val"]["accuracy"]), record["lr"])
        for record in records
        if (record["part"], record["label"], record["seed"]) == ("grid", method, SELECTION_SEED)
    ]
    return min(chooses)[1] if chooses else None


class Runs:
    """The runs that are compared, by what they are runs of.

    Grid and controls are one pool, "grid": a control stands beside its method. Other parts are their own, as
    are the runs that choose a learning rate, "selection".

    Raises:
        ValueError: the runs of a pool have different tasks or budgets, so that they cannot be compared.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.own: dict[str, float | None] = {}
        """Own best rate by label; a control's is that of its method."""
        self.seeds: dict[str, set[int]] = {"grid": set()}
        """By pool."""
        self._found: dict[tuple[str, str, float], dict[int, Record]] = {}
        budgets: dict[str, tuple[Any, ...]] = {}
        for record in records:
            pool = "grid" if record["part"] == "controls" else record["part"]
            budget = tuple(record[key] for key in ("setting", "base", "task", "steps", "rollouts"))
            budget += () if pool == "published" else (record["updates"],)
            if budgets.setdefault(pool, budget) != budget:
                raise ValueError(f"{record['job']} has the budget {budget} and others {budgets[pool]}")
            if record["label"] not in self.own:
                self.own[record["label"]] = own_best_lr(records, record["method"])
            pool = "selection" if record["seed"] == SELECTION_SEED else pool
            self.seeds.setdefault(pool, set()).add(record["seed"])
            found = self._found.setdefault((pool, record["label"], record["lr"]), {})
            if found.setdefault(record["seed"], record) is not record:
                raise ValueError(f"{record['job']} and {found[record['seed']]['job']} are the same run")

    def of(self, label: str, lr: float | None = None, pool: str = "grid") -> dict[int, Record]:
        """Runs by seed; lr None is the own best rate."""
        chosen = self.own.get(label) if lr is None else lr
        found = {} if chosen is None else self._found.get((pool, label, chosen), {})
        return dict(sorted(found.items()))


# What is measured in a run


def smooth(curve: Sequence[float]) -> list[float]:
    """Means of WINDOW steps; the first is that of steps 1 to WINDOW, and it stands for step WINDOW."""
    return [fmean(curve[i : i + WINDOW]) for i in range(len(curve) - WINDOW + 1)]


def reach(curve: Sequence[float], level: float) -> int | None:
    """First step at which the mean of the last WINDOW steps is at least the level; None: never."""
    return next((i + WINDOW for i, value in enumerate(smooth(curve)) if value >= level), None)


def best(record: Record) -> float:
    """Highest mean sampled accuracy of WINDOW steps."""
    return max(smooth(record["curves"]["accuracy"]))


def peak(record: Record) -> int:
    """Step at which that is reached first."""
    means = smooth(record["curves"]["accuracy"])
    return WINDOW + means.index(max(means))


def end(record: Record, curve: str = "accuracy") -> float:
    """Mean of a curve over the last LAST steps."""
    return fmean(record["curves"][curve][-LAST:])


def fall(record: Record) -> float:
    """How far the end is below the best."""
    return best(record) - end(record)


def mean(record: Record) -> float:
    """Mean sampled accuracy of all steps: how fast, how high and how long together."""
    return fmean(record["curves"]["accuracy"])


def reach_or_after(record: Record, level: float) -> int:
    """`reach`, where a run that never reaches the level counts as one step longer than it was."""
    return reach(record["curves"]["accuracy"], level) or record["steps"] + 1


def seconds_a_step(records: Iterable[Record]) -> dict[str, float]:
    """Median seconds of a step by method, of the runs that had the machine alone."""
    steps: dict[str, list[float]] = {}
    for record in records:
        if record["part"] == "timing":
            steps.setdefault(record["label"], []).extend(record["seconds"]["step"])
    return {label: median(seconds) for label, seconds in steps.items()}


# Statistics over seeds


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over n seeds and its interval of LEVEL."""

    value: float
    low: float
    high: float
    n: int

    def verdict(self, threshold: float = 0.0) -> str:
        """Of the claim that what is estimated is above the threshold."""
        if self.low > threshold:
            return "holds"
        return "does not hold" if self.high < threshold else "not decided"


def t_interval(values: Sequence[float]) -> Estimate | None:
    """Mean and Student's interval, of paired differences or anything else; None with less than two values."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return None
    value, half = fmean(values), t.ppf((1 + LEVEL) / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(value, float(value - half), float(value + half), n)


def wilson(successes: int, n: int) -> Estimate:
    """A share and Wilson's interval."""
    from scipy.stats import binomtest

    interval = binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def paired_shares(first: Sequence[bool], second: Sequence[bool]) -> Estimate | None:
    """Difference of two shares over the same seeds; None with less than two.

    The interval is the exact one (Clopper and Pearson) of which of the two it is where they differ, given
    at how many seeds they do: it is without 0 where the exact test of McNemar rejects.
    """
    from scipy.stats import binomtest

    n = len(first)
    if n < 2:
        return None
    firsts = sum(a and not b for a, b in zip(first, second, strict=True))
    differ = sum(a != b for a, b in zip(first, second, strict=True))
    if not differ:
        return Estimate(0.0, 0.0, 0.0, n)
    interval = binomtest(firsts, differ).proportion_ci(LEVEL, method="exact")
    scale = differ / n
    value, low, high = ((2 * share - 1) * scale for share in (firsts / differ, interval.low, interval.high))
    return Estimate(value, low, high, n)
