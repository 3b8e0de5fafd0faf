#!/usr/bin/env python
"""docs/study.md and its figures, byte for byte from the records.

python scripts/study/report.py           # writes them
python scripts/study/report.py --check   # fails with the name of a file that is not as the records have it

The prose is that of study.md.jinja, the claims are those of claims.yaml.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from scripts.study import figures, records as study  # noqa: E402
from scripts.study.records import Estimate, Record, Runs  # noqa: E402

DOCUMENT = "docs/study.md"
FIGURES = "docs/study"
NOT_RUN = "not run"


def speed(first: Record, second: Record, level: float | None = None) -> float:
    """log2 of how many times as many steps the second needs to a level; None: its own best."""
    level = study.best(second) if level is None else level
    return math.log2(study.reach_or_after(second, level) / study.reach_or_after(first, level))


MEASURES: dict[str, Callable[..., float]] = {
    "mean": study.mean,
    "end": study.end,
    "fall": study.fall,
    "entropy": partial(study.end, curve="entropy"),
    "bold": lambda record: record["final"]["bold"],
    "escaped": lambda record: study.end(record, "careful") >= study.ESCAPED,
}
RATIOS: dict[str, Callable[[Record, Record], float]] = {"speed": speed, "speed80": partial(speed, level=0.8)}
"""Measures of two runs, log2 of a ratio."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Of claims.yaml, which says what it is."""

    text: str
    measure: str
    of: str
    than: str | None = None
    above: float | None = None
    """0, and for a ratio 1, where it is not given."""
    pool: str = "grid"

    @property
    def threshold(self) -> float:
        """In the unit of the estimate."""
        ratio = self.measure in RATIOS
        return math.log2(self.above or 1) if ratio else self.above or 0.0

    def estimate(self, runs: Runs, lr: float | None) -> Estimate | None:
        """Over the seeds that both methods have; None: fewer than two."""
        first = runs.of(self.of, lr, self.pool)
        if self.than is None:
            return study.t_interval([MEASURES[self.measure](run) for run in first.values()])
        second = runs.of(self.than, lr, self.pool)
        pairs = [(first[seed], second[seed]) for seed in first if seed in second]
        if self.measure in RATIOS:
            return study.t_interval([RATIOS[self.measure](a, b) for a, b in pairs])
        values = [[MEASURES[self.measure](run) for run in pair] for pair in pairs]
        if self.measure == "escaped":
            return study.paired_shares(*zip(*values, strict=True)) if values else None
        return study.t_interval([a - b for a, b in values])

    def verdict(self, runs: Runs, lr: float | None) -> str:
        estimate = self.estimate(runs, lr)
        return estimate.verdict(self.threshold) if estimate else NOT_RUN

    def shown(self, estimate: Estimate) -> str:
        """Value and interval."""
        numbers = (estimate.value, estimate.low, estimate.high)
        if self.measure in RATIOS:
            return "{:.2f} times ({:.2f} to {:.2f})".format(*(2**x for x in numbers))
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(*numbers)


@dataclass(frozen=True, slots=True)
class Claim:
    text: str
    decides: list[Effect]
    beside: list[Effect]

    def verdict(self, runs: Runs, lr: float | None) -> str:
        """Does not hold where one of the deciding effects does not; holds where all do."""
        found = {effect.verdict(runs, lr) for effect in self.decides}
        return next(word for word in ("does not hold", NOT_RUN, "not decided", "holds") if word in found)

    def rates(self) -> list[float | None]:
        """At which it is decided; None, each method at its own best, is first."""
        return RATES[self.decides[0].pool]


GRID = [1e-4, 2e-4, 3e-4]
RATES: dict[str, list[float | None]] = {"grid": [None, *GRID], "published": [1e-4], "escape": [None]}


def claims(file: Path = HERE / "claims.yaml") -> dict[str, dict[str, Claim]]:
    """By group (paper, ours) and key."""
    return {
        group: {
            key: Claim(c["claim"], *([Effect(**effect) for effect in c[part]] for part in ("decides", "beside")))
            for key, c in found.items()
        }
        for group, found in yaml.safe_load(file.read_text()).items()
    }


# Tables


def table(header: str, rows: Sequence[Sequence[object]]) -> str:
    """Markdown; the header's cells are parted by |."""
    cells = header.split("|")
    lines = [cells, ["---"] * len(cells), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def rate(lr: float | None) -> str:
    return "own best" if lr is None else f"{lr:.0e}".replace("e-0", "e-")


def verdicts(runs: Runs, found: Mapping[str, Claim]) -> str:
    """A line a claim: decided at its own rates, and at the highest of the grid."""
    rows = []
    for claim in found.values():
        first, last = claim.rates()[0], claim.rates()[-1]
        high = "" if first == last else f"**{claim.verdict(runs, last)}**"
        rows.append((claim.text, f"**{claim.verdict(runs, first)}**", high))
    return table(f"claim|each method at its own best rate|at {rate(GRID[-1])}", rows)


def effects(runs: Runs, claim: Claim) -> str:
    """A line an effect and learning rate."""
    rows = []
    for effect in [*claim.decides, *claim.beside]:
        for lr in RATES[effect.pool]:
            estimate = effect.estimate(runs, lr)
            if estimate is None:
                continue
            word = f"**{effect.verdict(runs, lr)}**" if effect in claim.decides else ""
            above = "" if effect.above is None else f"{effect.above:g}"
            rows.append((effect.text, rate(lr), estimate.n, effect.shown(estimate), above, word))
    if not rows:
        return f"*{NOT_RUN}*"
    return table("|rate|seeds|value and interval|claimed above|", rows)


def spread(values: Sequence[float]) -> str:
    """Mean and half of its interval."""
    estimate = study.t_interval(values)
    return f"{estimate.value:.2f} ± {estimate.high - estimate.value:.2f}" if estimate else f"{values[0]:.2f}"


def first_steps(found: Sequence[Record], level: float) -> str:
    """Median over seeds of the first step at the level, and how many seeds reach it where some do not."""
    steps = [study.reach(record["curves"]["accuracy"], level) for record in found]
    reached = sum(step is not None for step in steps)
    middle = median(math.inf if step is None else step for step in steps)
    shown = "–" if math.isinf(middle) else f"{middle:g}"
    return shown if reached == len(steps) else f"{shown} ({reached}/{len(steps)})"


MEASURED = "seeds|to .6|to .8|best|last 10|fell|validation|pass@8|entropy|written out|bold"


def measured(found: Sequence[Record]) -> list[object]:
    """The cells of MEASURED for the runs of a method."""
    finals = [record["final"] for record in found]
    collapsed = sum(study.fall(record) > study.COLLAPSE for record in found)
    return [
        len(found),
        *(first_steps(found, level) for level in (0.6, 0.8)),
        f"{fmean(map(study.best, found)):.2f}",
        spread([study.end(record) for record in found]),
        f"{collapsed}/{len(found)}",
        spread([final["val"] for final in finals]),
        f"{fmean(final['pass@8'] for final in finals):.2f}",
        f"{fmean(MEASURES['entropy'](record) for record in found):.2f}",
        f"{fmean(study.end(record, 'careful') for record in found):.2f}",
        f"{fmean(final['bold'] for final in finals):.2f}",
    ]


def at_rate(runs: Runs, labels: Sequence[str], lr: float | None, pool: str = "grid") -> str:
    """A line a method that has runs; with lr None the rates and the seconds, too."""
    seconds = study.seconds_a_step(runs.records)
    rows = []
    for label in labels:
        if found := list(runs.of(label, lr, pool).values()):
            own = [] if lr else [rate(runs.own[label]), f"{seconds[label]:.2f}" if label in seconds else ""]
            rows.append([f"`{label}`", *own, *measured(found)])
    own_header = "" if lr else "rate|s a step|"
    return table(f"|{own_header}{MEASURED}", rows) if rows else f"*{NOT_RUN}*"


def choices(runs: Runs, labels: Sequence[str]) -> str:
    """Mean validation accuracy of the selection seed by rate, the chosen in bold."""
    found = {
        (r["label"], r["lr"]): f"{fmean(r['curves']['val']['accuracy']):.3f}"
        for r in runs.records
        if r["part"] == "grid" and r["seed"] == study.SELECTION_SEED
    }
    rows = []
    for label in labels:
        cells = [found.get((label, lr), "") for lr in GRID]
        if any(cells):
            chosen = runs.own[label]
            rows.append([f"`{label}`", *(f"**{c}**" if lr == chosen else c for lr, c in zip(GRID, cells, strict=True))])
    return table("|" + "|".join(map(rate, GRID)), rows) if rows else f"*{NOT_RUN}*"


def escapes(runs: Runs, labels: Sequence[str]) -> str:
    """Share of seeds that leave the local optimum."""
    rows = []
    for label in labels:
        if found := runs.of(label, None, "escape"):
            out = [MEASURES["escaped"](record) for record in found.values()]
            share = study.wilson(sum(map(bool, out)), len(out))
            ends = f"{fmean(map(study.end, found.values())):.2f}"
            rows.append([f"`{label}`", rate(runs.own[label]), f"{sum(out)} of {len(out)}",
                         f"{share.low:.2f} to {share.high:.2f}", ends])  # fmt: skip
    return table("|rate|seeds that leave it|interval of the share|last 10", rows) if rows else f"*{NOT_RUN}*"


def facts(runs: Runs) -> dict[str, Any]:
    """What was run, on what."""
    records = runs.records
    grid = [record for record in records if record["part"] == "grid"]
    return {
        "runs": len(records),
        "hours": f"{sum(record['wall_s'] for record in records) / 3600:.1f}",
        "seconds_a_run": f"{median(r['wall_s'] for r in grid):.0f}" if grid else "",
        "machines": sorted({record["machine"] for record in records}),
        "commits": sorted({record["commit"] for record in records}),
        "versions": sorted({f"{k} {v}" for record in records for k, v in record["versions"].items()}),
        "budget": grid[0] if grid else {},
        "seeds": sorted({record["seed"] for record in grid} - {study.SELECTION_SEED}),
    }


def render(records: Sequence[Record]) -> dict[str, str]:
    """Text by file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    runs, spec = Runs(records), yaml.safe_load((HERE / "study.yaml").read_text())
    drawn = figures.draw(runs, study.seconds_a_step(records))
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    functions = (verdicts, effects, at_rate, choices, escapes)
    document = environment.get_template("study.md.jinja").render(
        {function.__name__: partial(function, runs) for function in functions},
        claims=claims(), facts=facts(runs), spec=spec, methods=list(spec["methods"]), figures=drawn, study=study,
        labels=[*spec["methods"], *spec["controls"]], ran=sorted(runs.own), rates=GRID,
    )  # fmt: skip
    return {DOCUMENT: document} | {f"{FIGURES}/{name}.svg": text for name, text in drawn.items()}


def main(arguments: Sequence[str] | None = None, root: Path = ROOT, records: Path = study.RECORDS) -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    asked = parser.parse_args(arguments)
    files = render(study.read_all(records))
    there = {path.relative_to(root).as_posix() for path in (root / FIGURES).glob("*")}
    if asked.check:
        different = sorted(there - files.keys()) + [
            name for name, text in files.items() if not (root / name).is_file() or (root / name).read_text() != text
        ]
        for name in different:
            print(f"{name} is not as the records have it; run python scripts/study/report.py", file=sys.stderr)
        return int(bool(different))
    for name in there - files.keys():
        (root / name).unlink()
    (root / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
