"""Markdown tables of results, beside the numbers that the paper reports for the same benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mssr.evaluation.items import STATUSES
from mssr.runs.html import render

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
    of_paper = {key: name for name in benchmarks if (key := paper_name(name))}
    columns = {key: benchmarks[of_paper[key]] for key in PAPER_BENCHMARKS if key in of_paper}
    whole_paper = len(columns) == len(PAPER_BENCHMARKS)
    return render(
        "evaluation",
        "table.jinja",
        FILTERS,
        model=summary["model"],
        benchmarks=benchmarks,
        columns=columns,
        average=summary["averages"].get("paper"),
        average_name="average" if whole_paper else f"average of these {len(columns)}",
        others={name: b for name, b in benchmarks.items() if name not in of_paper.values()},
        ks=sorted({int(k) for b in benchmarks.values() for k in b.get("pass_at_k", ())}),
        statuses=STATUSES,
        counted=("accuracy", *STATUSES),
        paper=[
            (size, method, [numbers[key] for key in columns])
            for size, methods in PAPER.items()
            for method, numbers in methods.items()
        ],
        names=PAPER_BENCHMARKS,
        whole=WHOLE,
        source=SOURCE,
    )


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


FILTERS: Mapping[str, Callable[[Any], Any]] = {
    "cell": cell,
    "percent": percent,
    "with_interval": with_interval,
}
"""Of the templates of tables."""
