"""Markdown tables of results, beside the numbers that the paper reports for the same benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mssr.evaluation.items import STATUSES

SOURCE = "arXiv 2512.18215"
PAPER_BENCHMARKS = {
    "mathverse": "MathVerse",
    "mathvista": "MathVista",
    "mmk12": "MMK12",
    "r1onevision": "R1-OneVision",
    "hallusionbench": "HallusionBench",
}
"""In the order of the paper's table."""
WHOLE = dict(zip(PAPER_BENCHMARKS, (3940, 1000, 2000, 942, 951), strict=True))
"""Items of the splits that are evaluated."""
_ROWS = {
    "3B": {
        "base": (33.3, 59.5, 42.5, 27.6, 59.9),
        "GRPO": (36.8, 61.7, 46.1, 30.2, 62.3),
        "RLOO": (35.7, 59.7, 45.5, 28.8, 61.6),
        "REINFORCE++": (35.3, 47.7, 46.0, 21.7, 63.2),
        "MSSR": (39.6, 63.0, 49.2, 29.0, 66.6),
    },
    "7B": {
        "base": (45.8, 67.2, 48.1, 34.6, 68.4),
        "GRPO": (48.5, 70.0, 55.8, 37.7, 69.7),
        "RLOO": (47.8, 69.2, 56.0, 38.5, 68.5),
        "REINFORCE++": (42.7, 68.5, 51.3, 34.0, 69.2),
        "MSSR": (49.8, 71.1, 62.5, 39.2, 70.6),
    },
}
PAPER: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    size: {method: dict(zip(PAPER_BENCHMARKS, row, strict=True)) for method, row in rows.items()}
    for size, rows in _ROWS.items()
}
"""Size of Qwen2.5-VL -> method -> benchmark -> accuracy in percent."""


def paper_name(benchmark: str) -> str | None:
    """Key in `PAPER_BENCHMARKS`, or None: ``r1_onevision``, ``R1-Onevision-Bench`` -> ``r1onevision``."""
    plain = "".join(c for c in benchmark.casefold() if c.isalnum())
    return next((key for key in PAPER_BENCHMARKS if plain in (key, key + "bench")), None)


def results_table(summary: Mapping[str, Any]) -> str:
    """table.md of the content of results.json."""
    benchmarks = dict(sorted(summary["benchmarks"].items()))
    parts = [f"# Evaluation of {cell(summary['model'])}"]
    of_paper = {key: name for name in benchmarks if (key := paper_name(name))}
    if of_paper:
        columns = {key: benchmarks[of_paper[key]] for key in PAPER_BENCHMARKS if key in of_paper}
        parts += _beside_paper(columns, summary["averages"].get("paper"))
    others = [name for name in benchmarks if name not in of_paper.values()]
    rows = [[n, with_interval(benchmarks[n]), benchmarks[n]["items"]] for n in others]
    if rows:
        parts.append(markdown_table(["benchmark", "accuracy, %", "items"], rows))
    parts.append(
        "Accuracy in percent with its 95% interval (bootstrap over items). Every item counts: a response "
        "without an answer, a cut-off response and a failed judge call are wrong."
    )
    parts += ["## Responses", _responses(benchmarks)]
    several = {name: b for name, b in benchmarks.items() if b["samples"] > 1}
    if several:
        parts += ["## Several samples", _several(several)]
    for name, numbers in benchmarks.items():
        details = _details(numbers)
        parts += [f"## {cell(name)}", *details] if details else []
    return "\n\n".join(parts) + "\n"


def _beside_paper(benchmarks: Mapping[str, Any], average: Mapping[str, Any] | None) -> list[str]:
    """Ours in the first row, then the paper's for the same benchmarks; averages over these columns."""
    keys = list(benchmarks)
    header = ["accuracy, %", *(PAPER_BENCHMARKS[key] for key in keys)]
    ours = ["**this evaluation**", *map(with_interval, benchmarks.values())]
    if average:
        header.append("average" if len(keys) == len(PAPER_BENCHMARKS) else f"average of these {len(keys)}")
        ours.append(with_interval(average))
    rows = [ours]
    for size, methods in PAPER.items():
        for method, numbers in methods.items():
            values = [numbers[key] for key in keys]
            values += [sum(values) / len(values)] if average else []
            rows.append([f"*paper, {size}, {method}*", *(f"{value:.1f}" for value in values)])
    notes = [
        f"Rows in italics are the numbers that the paper ({SOURCE}) reports for Qwen2.5-VL 3B and 7B; they "
        "were not measured here."
    ]
    if "hallusionbench" in keys:
        notes.append("HallusionBench is accuracy over all questions (aAcc).")
    notes += [
        f"**{PAPER_BENCHMARKS[key]}: {numbers['items']} items, the whole benchmark has {WHOLE[key]}; "
        "not comparable with the paper.**"
        for key, numbers in benchmarks.items()
        if numbers["items"] != WHOLE[key]
    ]
    return [markdown_table(header, rows), " ".join(notes)]


def _responses(benchmarks: Mapping[str, Any]) -> str:
    header = (
        "benchmark, items, samples, right, wrong, extraction failed, truncated, judge failed, mean tokens, "
        "cut off at the limit, format kept, bolded steps"
    ).split(", ")
    rows = []
    for name, numbers in benchmarks.items():
        counts = [numbers["items"], numbers["total"], *(numbers["status"][status] for status in STATUSES)]
        response = numbers["response"]
        shares = [f"{percent(response[key])}%" for key in ("truncated", "format")]
        rows.append([name, *counts, f"{response['tokens']:.1f}", *shares, f"{response['bolded_steps']:.2f}"])
    return markdown_table(header, rows)


def _several(benchmarks: Mapping[str, Any]) -> str:
    """pass@k and maj@k, a table with a column a k."""
    ks = sorted({int(k) for b in benchmarks.values() for k in b["pass_at_k"]})
    rows = [
        [name, label, *(percent(b[key][str(k)]) if str(k) in b[key] else "" for k in ks)]
        for name, b in benchmarks.items()
        for label, key in (("pass@k", "pass_at_k"), ("maj@k", "maj_at_k"))
    ]
    return markdown_table(["benchmark", "%", *(f"k = {k}" for k in ks)], rows)


def _details(numbers: Mapping[str, Any]) -> list[str]:
    """Breakdowns of a benchmark, and those of its metrics that no other table has."""
    shown = ("accuracy", *STATUSES)
    rows = [[name, percent(value)] for name, value in sorted(numbers["metrics"].items()) if name not in shown]
    parts = [markdown_table(["metric", "%"], rows)] if rows else []
    for title, groups in sorted(numbers["breakdowns"].items()):
        rows = [
            [group, f"{g['correct']} / {g['total']}", percent(g["accuracy"])]
            for group, g in sorted(groups.items())
        ]
        parts.append(markdown_table([title.replace("_", " "), "right", "%"], rows))
    return parts


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose cells may hold anything: bars are escaped, and a line break becomes a space."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def percent(share: float | None, digits: int = 1) -> str:
    """0.3956 -> ``39.6``; a dash for None."""
    return "–" if share is None else f"{100 * share:.{digits}f}"


def with_interval(numbers: Mapping[str, Any]) -> str:
    """``39.6 (38.1 to 41.2)``, of an object with ``accuracy`` and ``interval``."""
    low, high = numbers["interval"]
    return f"{percent(numbers['accuracy'])} ({percent(low)} to {percent(high)})"


def cell(text: Any) -> str:
    """Anything as the text of a table's cell."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
