#!/usr/bin/env python
"""docs/study.md and its figures, byte for byte from the records.

python scripts/study/report.py           # writes them
python scripts/study/report.py --check   # fails with the name of a file that is not as the records have it

The prose and the tables' shape are those of study.md.jinja, the claims those of claims.yaml.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from scripts.study import figures  # noqa: E402
from scripts.study import records as study  # noqa: E402
from scripts.study.records import Estimate, Record, Runs  # noqa: E402

DOCUMENT = "docs/study.md"
FIGURES = "docs/study"
RATES = (1e-4, 2e-4, 3e-4)
"""Of the grid. A rate of None stands for each method's own best."""
POOLS: dict[str, tuple[float | None, ...]] = {"grid": (None, *RATES), "published": (1e-4,), "escape": (None,)}
"""Where methods are compared, the rate that decides first."""


def speed(first: Record, second: Record, level: float | None = None) -> float:
    """log2 of how many times as many steps the second needs to a level; None: its own best."""
    level = study.best(second) if level is None else level
    return math.log2(study.reach_or_after(second, level) / study.reach_or_after(first, level))


MEASURES: dict[str, Callable[[Record], float]] = {
    "mean": study.mean,
    "best": study.best,
    "peak": study.peak,
    "end": study.end,
    "fall": study.fall,
    "entropy": partial(study.end, curve="entropy"),
    "careful": partial(study.end, curve="careful"),
    "escaped": lambda run: study.end(run, "careful") >= study.ESCAPED,
    "fell": lambda run: study.fall(run) > study.COLLAPSE,
    "val": lambda run: run["final"]["val"],
    "pass@8": lambda run: run["final"]["pass@8"],
    "bold": lambda run: run["final"]["bold"],
    "first": lambda run: run["curves"]["accuracy"][0],
    "first_careful": lambda run: run["curves"]["careful"][0],
    "choice": lambda run: fmean(run["curves"]["val"]["accuracy"]),
}
RATIOS: dict[str, Callable[[Record, Record], float]] = {"speed": speed, "speed80": partial(speed, level=0.8)}
"""Measures of two runs, log2 of a ratio."""


@dataclass(frozen=True, slots=True)
class Effect:
    """As in claims.yaml, which says what it is."""

    text: str
    measure: str
    of: str
    than: str | None = None
    above: float = 0.0
    pool: str = "grid"

    def estimate(self, runs: Runs, lr: float | None) -> Estimate | None:
        """Over the seeds that both methods have; None: fewer than two."""
        first = runs.of(self.of, lr, self.pool)
        if self.than is None:
            return study.t_interval([MEASURES[self.measure](run) for run in first.values()])
        second = runs.of(self.than, lr, self.pool)
        pairs = [(first[seed], second[seed]) for seed in first if seed in second]
        if ratio := RATIOS.get(self.measure):
            return study.t_interval([ratio(*pair) for pair in pairs])
        measure = MEASURES[self.measure]
        values = [(measure(a), measure(b)) for a, b in pairs]
        if self.measure == "escaped":
            return study.paired_shares([bool(a) for a, _ in values], [bool(b) for _, b in values])
        return study.t_interval([a - b for a, b in values])

    def verdict(self, runs: Runs, lr: float | None) -> str:
        threshold = math.log2(self.above) if self.measure in RATIOS else self.above
        estimate = self.estimate(runs, lr)
        return estimate.verdict(threshold) if estimate else "not run"

    def shown(self, runs: Runs, lr: float | None) -> str:
        """Value and interval, and the seeds if not all were run; nothing where fewer than two were."""
        estimate = self.estimate(runs, lr)
        if estimate is None:
            return ""
        numbers = (estimate.value, estimate.low, estimate.high)
        few = f", {estimate.n} seeds" if estimate.n < len(runs.seeds[self.pool]) else ""
        if self.measure in RATIOS:
            return "{:.2f} ({:.2f} to {:.2f})".format(*(2**x for x in numbers)) + few
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(*(round(x, 3) + 0.0 for x in numbers)) + few  # no -0.000


@dataclass(frozen=True, slots=True)
class Claim:
    text: str
    decides: list[Effect]
    beside: list[Effect] = field(default_factory=list)
    option: str = ""
    """The default that rests on it."""

    def verdict(self, runs: Runs, lr: float | None) -> str:
        """It does not hold where one of the deciding effects does not, and holds where all do."""
        found = {effect.verdict(runs, lr) for effect in self.decides}
        return next(word for word in ("does not hold", "not run", "not decided", "holds") if word in found)

    def follows(self, runs: Runs) -> str:
        """For the option, from the verdicts at the own best and at the highest rate."""
        found = {self.verdict(runs, None), self.verdict(runs, RATES[-1])} - {"not run"}
        if not found:
            return "not run"
        if "does not hold" in found:
            return "it depends on the learning rate" if "holds" in found else "the alternative is better"
        return "it stays" if "holds" in found else "it stays, as nothing speaks against it"

    def rates(self, runs: Runs) -> list[float | None]:
        """Those at which an effect was run."""
        effects = [*self.decides, *self.beside]
        return [lr for lr in POOLS[effects[0].pool] if any(effect.shown(runs, lr) for effect in effects)]


def claims(file: Path = HERE / "claims.yaml") -> dict[str, dict[str, Claim]]:
    """By group (paper, ours) and key."""

    def effects(found: Sequence[dict[str, Any]]) -> list[Effect]:
        return [Effect(**effect) for effect in found]

    return {
        group: {
            key: Claim(
                one["claim"], effects(one["decides"]), effects(one.get("beside", [])), one.get("option", "")
            )
            for key, one in found.items()
        }
        for group, found in yaml.safe_load(file.read_text()).items()
    }


# What the template shows


def rate(lr: float | None) -> str:
    return "own best" if lr is None else f"{lr:.0e}".replace("e-0", "e-")


def average(found: Sequence[Record], measure: str) -> str:
    return f"{fmean(MEASURES[measure](run) for run in found):.2f}"


def spread(found: Sequence[Record], measure: str) -> str:
    """Mean and half of its interval."""
    estimate = study.t_interval([MEASURES[measure](run) for run in found])
    return (
        f"{estimate.value:.2f} ± {estimate.high - estimate.value:.2f}"
        if estimate
        else average(found, measure)
    )


def count(found: Sequence[Record], measure: str) -> str:
    return f"{sum(bool(MEASURES[measure](run)) for run in found)} of {len(found)}"


def typical(steps: Sequence[int | None], seconds: float = 1.0) -> str:
    """Median, in seconds if those of a step are given; and how many are no None, where not all are."""
    reached = sum(step is not None for step in steps)
    middle = median(math.inf if step is None else step * seconds for step in steps)
    shown = "–" if math.isinf(middle) else f"{middle:.0f}"
    return shown if reached == len(steps) else f"{shown} ({reached} of {len(steps)})"


def steps_to(found: Sequence[Record], level: float, seconds: float = 1.0) -> str:
    return typical([study.reach(run["curves"]["accuracy"], level) for run in found], seconds)


def less(runs: Runs, label: str, other: str) -> str:
    """Difference of mean accuracies, both at their own best rates."""
    return "" if label == other else Effect("", "mean", label, other).shown(runs, None)


def steps_to_best_of(runs: Runs, label: str, other: str) -> str:
    """Of another method's run with the same seed, both at their own best rates."""
    levels = {seed: study.best(run) for seed, run in runs.of(other).items()}
    curves = {seed: run["curves"]["accuracy"] for seed, run in runs.of(label).items() if seed in levels}
    return typical([study.reach(curve, levels[seed]) for seed, curve in curves.items()]) if curves else ""


def share(found: Sequence[Record], measure: str) -> Estimate:
    return study.wilson(sum(bool(MEASURES[measure](run)) for run in found), len(found))


def dots(runs: Runs, methods: Sequence[str], ours: Mapping[str, Claim]) -> dict[str, figures.Dots]:
    """What is drawn as points with intervals."""

    def means(label: str, lr: float) -> Estimate | None:
        return study.t_interval([study.mean(run) for run in runs.of(label, lr).values()])

    controls = [effect for one in ours.values() for effect in one.decides if effect.pool == "grid"]
    left = {
        m: share(list(found.values()), "escaped") for m in methods if (found := runs.of(m, None, "escape"))
    }
    return {
        "rates": ("mean accuracy", {rate(lr): {m: means(m, lr) for m in methods} for lr in RATES}),
        "differences": (
            "difference",
            {
                rate(lr): {effect.text: effect.estimate(runs, lr) for effect in controls}
                for lr in (None, RATES[-1])
            },
        ),
        "escape": ("share of seeds that leave the local optimum", {"": left}),
    }


def render(records: Sequence[Record]) -> dict[str, str]:
    """Text by file.

    Raises:
        ValueError: no run of the grid is there, or runs of a pool cannot be compared.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    grid = [record for record in records if record["part"] == "grid"]
    if not grid:
        raise ValueError("there is no run of the part grid; python scripts/study/run.py all makes them")
    runs, spec, found = Runs(records), yaml.safe_load((HERE / "study.yaml").read_text()), claims()
    methods, seconds = list(spec["methods"]), study.seconds_a_step(records)
    drawn = figures.draw(runs, RATES, seconds, dots(runs, methods, found["ours"]))
    functions = (rate, average, spread, count, share, steps_to, steps_to_best_of, less)
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["rate"] = rate
    document = environment.get_template("study.md.jinja").render(
        {function.__name__: function for function in functions},
        runs=runs, spec=spec, claims=found, methods=methods, labels=[*methods, *spec["controls"]],
        rates=RATES, seconds={label: seconds.get(label) for label in methods}, figures=drawn, study=study,
        grid=grid,
    )  # fmt: skip
    return {DOCUMENT: document} | {f"{FIGURES}/{name}.svg": text for name, text in drawn.items()}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, records: Path = study.RECORDS) -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    asked = parser.parse_args(arguments)
    files = render(study.read_all(records))
    stale = {path.relative_to(root).as_posix() for path in (root / FIGURES).glob("*")} - files.keys()
    if asked.check:
        there = {name: (root / name).read_text() for name in files if (root / name).is_file()}
        wrong = sorted(stale | {name for name, text in files.items() if there.get(name) != text})
        for name in wrong:
            print(
                f"{name} is not as the records have it; run python scripts/study/report.py", file=sys.stderr
            )
        return int(bool(wrong))
    (root / FIGURES).mkdir(parents=True, exist_ok=True)
    for name in stale:
        (root / name).unlink()
    for name, text in files.items():
        (root / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
