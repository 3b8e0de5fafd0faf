"""`mssr compare`: runs over steps, rollouts and hours, and evaluations item by item.

The first argument of a kind is what the others are compared with: when a run reaches the accuracy of
the first one, and whether an evaluation differs from the first one by more than chance.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mssr.errors import UserError
from mssr.evaluation import results, statistics
from mssr.evaluation.results import Evaluation
from mssr.evaluation.tables import FILTERS
from mssr.runs.html import render
from mssr.tools import compare_page
from mssr.tools.run_curves import AXES, Point, RunCurves, read_run

SCHEMA = 1


def compare(
    paths: Sequence[str | Path],
    at: Sequence[float] = (),
    metric: str = "val/accuracy",
    out: str | Path = "compare",
) -> Path:
    """Write compare.html, compare.md and compare.json, and print the second; returns the directory.

    Args:
        paths: run and evaluation directories.
        at: accuracies; when does each run reach them. Empty for the best of the first run.
        metric: key of the validation accuracy in the runs' metrics.jsonl.

    Raises:
        UserError: a path is neither, a run has no validation, or evaluations differ in their items.
    """
    for accuracy in at:
        if not 0 < accuracy <= 1:
            raise UserError(f"--at: {accuracy:g} is no accuracy above 0 and up to 1")
    runs, evaluations = _read(paths, metric)
    if at and not runs:
        raise UserError("--at says when runs reach an accuracy, but no run is given")
    report: dict[str, Any] = {"schema": SCHEMA, "metric": metric}
    targets: list[float] = []
    if runs:
        targets = list(at) or [next(iter(runs.values())).best.value]
        report["runs"] = [_run_json(name, run) for name, run in runs.items()]
        report["reached"] = [_reached(runs, accuracy) for accuracy in targets]
    if evaluations:
        report["evaluations"] = {name: _numbers(e) for name, e in evaluations.items()}
        report["differences"] = _differences(evaluations)
    tables = {
        "runs": runs,
        "reached": report.get("reached"),
        "evaluations": evaluations,
        "benchmarks": sorted({name for e in evaluations.values() for name in e.summary["benchmarks"]}),
        "differences": report.get("differences"),
    }
    text = render("tools", "compare.jinja", FILTERS, **tables)
    page = render(
        "tools",
        "compare.html",
        FILTERS,
        **tables,
        groups=compare_page.groups(runs),
        curves=compare_page.curves(runs, targets),
        config_differences=compare_page.config_differences(runs),
        samples=compare_page.samples({name: run.path for name, run in runs.items()}),
    )
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        (out / "compare.md").write_text(text)
        (out / "compare.html").write_text(page)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror or error})") from error
    print(f"{text}\nwritten: {out / 'compare.html'}, compare.md, compare.json")
    return out


def _read(paths: Sequence[str | Path], metric: str) -> tuple[dict[str, RunCurves], dict[str, Evaluation]]:
    """Runs and evaluations by short names."""
    runs: dict[str, RunCurves] = {}
    evaluations: dict[str, Evaluation] = {}
    for name, path in _names(paths).items():
        if (path / "metrics.jsonl").is_file():
            runs[name] = read_run(path, metric)
        elif (path / results.RESULTS).is_file():
            evaluations[name] = results.read(path)
        else:
            raise UserError(
                f"{path} is neither a run directory (it has no metrics.jsonl) nor a finished evaluation (no "
                f"{results.RESULTS})"
            )
    return runs, evaluations


def _names(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Short names, in the given order: the last parts of the paths, as many as tell them apart."""
    resolved = [Path(path).resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"{path} is given twice")
    names: dict[str, Path] = {}
    for path, given in zip(resolved, paths, strict=True):
        others = [other.parts for other in resolved if other != path]
        lengths = (n for n in itertools.count(1) if all(o[-n:] != path.parts[-n:] for o in others))
        names["/".join(path.parts[-next(lengths) :])] = Path(given)
    return names


def _run_json(name: str, run: RunCurves) -> dict[str, Any]:
    points = asdict(run)
    return {
        "name": name,
        "method": run.method,
        "steps": run.last.step,
        "rollouts": run.last.rollouts,
        "hours": run.last.hours,
        "best": asdict(run.best),
        "curves": {key: points[key] for key in ("validation", "training", "entropy")},
    }


def _reached(runs: Mapping[str, RunCurves], accuracy: float) -> dict[str, Any]:
    """When each run reaches an accuracy, and the ratios to when the first one does, if that needed any."""
    points = {name: run.reaches(accuracy) for name, run in runs.items()}
    first = next(iter(points.values()))

    def of(point: Point) -> dict[str, Any]:
        needed = {axis: getattr(point, axis) for axis in AXES}
        ratios = {axis: n / base if (base := getattr(first, axis, 0)) else None for axis, n in needed.items()}
        return needed | {"ratio": ratios}

    return {"accuracy": accuracy, "runs": {name: point and of(point) for name, point in points.items()}}


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    keys = ("accuracy", "interval", "items", "samples")
    benchmarks = evaluation.summary["benchmarks"]
    return {
        "model": evaluation.summary.get("model"),
        "benchmarks": {name: {key: numbers[key] for key in keys} for name, numbers in benchmarks.items()},
    }


def _differences(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Name of each evaluation but the first -> benchmark -> its difference to the first.

    Of the benchmarks that both have; ``average`` is over these, where they are several.
    """
    (first_name, first), *others = evaluations.items()
    found = {}
    for name, evaluation in others:
        parts = {}
        for benchmark in sorted(first.summary["benchmarks"]):
            if benchmark not in evaluation.summary["benchmarks"]:
                continue
            rows = [[r for r in e.records if r["benchmark"] == benchmark] for e in (first, evaluation)]
            pair = (f"{benchmark} in {first_name}", f"{benchmark} in {name}")
            one, other = map(results.item_means, rows)
            parts[benchmark] = statistics.paired_bootstrap(one, other, pair, results.seed_of(benchmark))
            _check_same_answers(rows[0], rows[1], pair)
        if not parts:
            raise UserError(f"{first_name} and {name} have no benchmark in common")
        differences = {benchmark: _difference(part) for benchmark, part in parts.items()}
        if len(parts) > 1:
            differences["average"] = _difference(statistics.average(list(parts.values())))
        found[name] = differences
    return found


def _check_same_answers(first: results.Records, second: results.Records, names: tuple[str, str]) -> None:
    truth = {row["id"]: row["answer"] for row in first}
    for row in second:
        if row["answer"] != truth[row["id"]]:
            raise UserError(
                f"item {row['id']} has the answer {truth[row['id']]!r:.40} for {names[0]} and "
                f"{row['answer']!r:.40} for {names[1]}: they are not over the same data"
            )


def _difference(part: statistics.Bootstrap) -> dict[str, Any]:
    value, low, high, p = (round(n, results.DECIMALS) for n in (part.value, *part.interval(), part.p_value()))
    return {"difference": value, "interval": [low, high], "p_value": p}
