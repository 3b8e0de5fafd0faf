"""compare.html: curves with a band where runs differ in the seed only, configs, and samples side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mssr.runs.charts import Series, chart
from mssr.runs.samples import recorded_prompts
from mssr.tools.run_curves import AXES, Point, RunCurves

OF_A_SEED = ("seed", "experiment_name", "trainer.run_dir")
"""Options in which runs of one group may differ."""
MOST_SAMPLES = 40
CURVES = {
    "validation": "validation accuracy",
    "training": "training accuracy",
    "entropy": "entropy, nats per token",
}


def groups(runs: Mapping[str, RunCurves]) -> dict[str, list[str]]:
    """Name of the first run of a group -> names of its runs: their configs differ in the seed only."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for name, run in runs.items():
        options = sorted((k, repr(v)) for k, v in run.config.items() if k not in OF_A_SEED)
        found.setdefault(tuple(options), []).append(name)
    return {names[0]: names for names in found.values()}


def curves(runs: Mapping[str, RunCurves], targets: Sequence[float]) -> list[str]:
    """A chart for each metric and axis; of a group the mean over its runs, from the smallest to the largest.

    Args:
        targets: accuracies that are marked in those of validation.
    """
    found = []
    for key, title in CURVES.items():
        for axis, label in AXES.items():
            of = {name: getattr(run, key) for name, run in runs.items()}
            lines = [_line(names, [of[n] for n in names], axis) for names in groups(runs).values()]
            lines = [line for line in lines if line.x]
            ends = [x for line in lines for x in (line.x[0], line.x[-1])]
            for target in targets if key == "validation" else ():
                lines.append(Series(f"{target:.4g}", [min(ends), max(ends)], [target, target]))
            if lines:
                bounds = (0, None) if key == "entropy" else (None, None)
                found.append(chart(f"{title} over {label}", lines, x_label=label, bounds=bounds))
    return found


def _line(names: Sequence[str], points: Sequence[Sequence[Point]], axis: str) -> Series:
    """At the steps that all runs of a group have."""
    by_step = [{point.step: point for point in run} for run in points]
    steps = sorted(set.intersection(*(set(run) for run in by_step)))
    at = [[run[step] for run in by_step] for step in steps]
    values = [[point.value for point in row] for row in at]
    several = len(names) > 1
    return Series(
        f"{names[0]} ({len(names)} seeds)" if several else names[0],
        [sum(getattr(point, axis) for point in row) / len(row) for row in at],
        [sum(row) / len(row) for row in values],
        [min(row) for row in values] if several else (),
        [max(row) for row in values] if several else (),
        dots=len(steps) <= 30,
    )


def config_differences(runs: Mapping[str, RunCurves]) -> list[tuple[str, list[Any]]]:
    """Option and its value in the first run of every group, where these differ."""
    configs = [runs[name].config for name in groups(runs)]
    keys = dict.fromkeys(key for config in configs for key in config if key not in OF_A_SEED)
    rows = [(key, [config.get(key) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(map(repr, values))) > 1]


def samples(paths: Mapping[str, Path]) -> list[tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]]:
    """Prompts that several runs have recorded, and their last visits; those of different verdicts first."""
    recorded = {
        name: {(p["split"], p["id"], p["question"]): p for p in recorded_prompts(path)[0]}
        for name, path in paths.items()
    }
    found = []
    for key in dict.fromkeys(key for prompts in recorded.values() for key in prompts):
        shown = [(name, prompts[key]) for name, prompts in recorded.items() if key in prompts]
        if len(shown) > 1:
            visits = [(name, prompt["visits"][-1]) for name, prompt in shown]
            found.append((shown[0][1], visits))
    found.sort(key=lambda pair: len({visit["verdict"] for _, visit in pair[1]}), reverse=True)
    return found[:MOST_SAMPLES]
