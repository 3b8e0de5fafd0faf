"""`mssr compare`: runs over steps, rollouts and hours, and evaluations item by item.

The first argument of a kind is what the others are compared with: when a run reaches the accuracy of
the first one, and whether an evaluation differs from the first one by more than chance.
"""

from __future__ import annotations

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
from mssr.tools.compare_figure import draw
from mssr.tools.run_curves import AXES, Point, RunCurves, ratio, read_run

SCHEMA = 1


def compare(
    paths: Sequence[str | Path],
    at: Sequence[float] = (),
    metric: str = "val/accuracy",
    out: str | Path = "compare",
) -> Path:
    """Write compare.md, compare.png and compare.json, and print the first; returns the directory.

    Args:
        paths: run directories and evaluation directories.
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
    text = render(
        "tools",
        "compare.jinja",
        FILTERS,
        runs=runs,
        reached=report.get("reached"),
        evaluations=evaluations,
        benchmarks=sorted({name for e in evaluations.values() for name in e.summary["benchmarks"]}),
        differences=report.get("differences"),
    )
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
        (out / "compare.md").write_text(text)
        draw(runs, evaluations, targets, metric, out / "compare.png")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror or error})") from error
    print(f"{text}\nwritten: {out / 'compare.md'}, compare.png, compare.json")
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
        length = 1
        while any(other[-length:] == path.parts[-length:] for other in others):
            length += 1
        names["/".join(path.parts[-length:])] = Path(given)
    return names


# Runs


def _run_json(name: str, run: RunCurves) -> dict[str, Any]:
    curves = {"validation": run.validation, "training": run.training, "entropy": run.entropy}
    return {
        "name": name,
        "method": run.method,
        "steps": run.last.step,
        "rollouts": run.last.rollouts,
        "hours": run.last.hours,
        "best": asdict(run.best),
        "curves": {key: [asdict(point) for point in points] for key, points in curves.items()},
    }


def _reached(runs: Mapping[str, RunCurves], accuracy: float) -> dict[str, Any]:
    """When each run reaches an accuracy, and the ratios to when the first one does."""
    points = {name: run.reaches(accuracy) for name, run in runs.items()}
    first = next(iter(points.values()))

    def of(point: Point | None) -> dict[str, Any] | None:
        if point is None:
            return None
        ratios = {axis: ratio(point, first, axis) if first else None for axis in AXES}
        return {axis: getattr(point, axis) for axis in AXES} | {"ratio": ratios}

    return {"accuracy": accuracy, "runs": {name: of(point) for name, point in points.items()}}


# Evaluations


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
            rows = [_of(first, benchmark), _of(evaluation, benchmark)]
            if not rows[1]:
                continue
            means = [results.item_means(r) for r in rows]
            pair = (f"{benchmark} in {first_name}", f"{benchmark} in {name}")
            parts[benchmark] = statistics.paired_bootstrap(
                means[0], means[1], pair, results.seed_of(benchmark)
            )
            _check_same_answers(rows[0], rows[1], pair)
        if not parts:
            raise UserError(f"{first_name} and {name} have no benchmark in common")
        differences = {benchmark: _difference(part) for benchmark, part in parts.items()}
        if len(parts) > 1:
            differences["average"] = _difference(statistics.average(list(parts.values())))
        found[name] = differences
    return found


def _of(evaluation: Evaluation, benchmark: str) -> list[dict[str, Any]]:
    return [row for row in evaluation.records if row["benchmark"] == benchmark]


def _check_same_answers(first: results.Records, second: results.Records, names: tuple[str, str]) -> None:
    truth = {row["id"]: row["answer"] for row in first}
    for row in second:
        if row["answer"] != truth[row["id"]]:
            raise UserError(
                f"item {row['id']} has the answer {truth[row['id']]!r:.40} for {names[0]} and "
                f"{row['answer']!r:.40} for {names[1]}: they are not over the same data"
            )


def _difference(part: statistics.Bootstrap) -> dict[str, Any]:
    low, high = part.interval()
    return {
        "difference": round(part.value, results.DECIMALS),
        "interval": [round(low, results.DECIMALS), round(high, results.DECIMALS)],
        "p_value": round(part.p_value(), results.DECIMALS),
    }
