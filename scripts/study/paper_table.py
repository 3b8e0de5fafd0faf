"""The table of paper.sh: what was measured beside the published numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mssr.evaluation import results, statistics
from mssr.evaluation.statistics import Bootstrap
from mssr.evaluation.tables import PAPER, PAPER_BENCHMARKS, SOURCE, WHOLE, paper_name
from mssr.models.files import replace_text

BENCHMARKS = ["mathverse", "mathvista", "mmk12", "r1_onevision", "hallusionbench"]
"""As `mssr eval` calls them, in the order of the paper's table."""
NOT_RUN = "not run"


def write_table(
    out: Path, size: str, places: Mapping[str, tuple[str | None, Path]], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Write table.md and table.json; returns the content of the second. Accuracies are percent.

    Args:
        size: of the model, "3b".
        places: row -> (method of `mssr.evaluation.tables.PAPER` or None, directory with an evaluation a
            benchmark).

    Raises:
        UserError: an evaluation is damaged.
    """
    rows: dict[str, Any] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, (published, directory) in places.items():
        measured, parts = {}, []
        for benchmark in BENCHMARKS:
            if not (directory / benchmark / results.RESULTS).is_file():
                continue
            evaluation = results.read(directory / benchmark)
            measured[benchmark], accuracy = _measured(benchmark, evaluation)
            settings[f"{name}/{benchmark}"] = evaluation.summary["config"]
            parts.append(accuracy)
        average = None
        if len(parts) == len(BENCHMARKS):
            average = _share(statistics.average(parts)) | {
                "whole": all(m["whole"] for m in measured.values())
            }
        rows[name] = _compared(measured, average, PAPER[size.upper()][published] if published else None)
    notes = [*notes, *_other_settings(settings)]
    table = {"size": size, "source": SOURCE, "benchmarks": BENCHMARKS, "rows": rows, "notes": notes}
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / "table.json", json.dumps(table, indent=1) + "\n")
    replace_text(out / "table.md", "\n".join(_lines(table)) + "\n")
    return table


def _measured(benchmark: str, evaluation: results.Evaluation) -> tuple[dict[str, Any], Bootstrap]:
    means = np.array(list(results.item_means(evaluation.records).values()))
    accuracy = statistics.bootstrap(means, results.seed_of(benchmark))
    numbers = evaluation.summary["benchmarks"][benchmark]
    key = paper_name(benchmark)
    assert key is not None
    whole = numbers["items"] == WHOLE[key]
    bold = numbers["response"]["bolded_steps"]
    return _share(accuracy) | {"items": numbers["items"], "whole": whole, "bolded_steps": bold}, accuracy


def _share(accuracy: Bootstrap) -> dict[str, Any]:
    """In percent."""
    return {
        "accuracy": round(100 * accuracy.value, 2),
        "interval": [round(100 * bound, 2) for bound in accuracy.interval()],
    }


def _compared(
    measured: dict[str, Any],
    average: dict[str, Any] | None,
    published: Mapping[str, float] | None,
) -> dict[str, Any]:
    """A row. The difference to a published number is that of a whole benchmark only."""
    row: dict[str, Any] = {"measured": measured, "average": average, "published": None, "difference": None}
    if published is None:
        return row
    of_paper = {name: published[key] for name, key in zip(BENCHMARKS, PAPER_BENCHMARKS, strict=True)}
    row["published"] = of_paper | {"average": round(fmean(of_paper.values()), 2)}
    row["difference"] = {
        name: round(numbers["accuracy"] - of_paper[name], 2)
        for name, numbers in measured.items()
        if numbers["whole"]
    }
    if average and average["whole"]:
        row["difference"]["average"] = round(average["accuracy"] - row["published"]["average"], 2)
    return row


def _other_settings(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each evaluation that was asked otherwise than the first."""
    first, *others = settings or [""]
    for name in others:
        mine, its = settings[first], settings[name]
        changed = [
            f"{key} {mine.get(key)!r} -> {its.get(key)!r}"
            for key in sorted(mine.keys() | its.keys())
            if mine.get(key) != its.get(key)
        ]
        if changed:
            yield f"{name} was evaluated with other settings than {first}: {'; '.join(changed)}."


def _lines(table: Mapping[str, Any]) -> Iterator[str]:
    """table.md."""
    columns = [*BENCHMARKS, "average"]
    yield f"# The paper's tables, Qwen2.5-VL-{table['size'].upper()}"
    yield ""
    yield f"| accuracy, % | {' | '.join([*PAPER_BENCHMARKS.values(), 'average'])} | bold steps, MMK12 |"
    yield "| --- " * (len(columns) + 2) + "|"
    partial = set()
    for name, row in table["rows"].items():
        measured = row["measured"] | {"average": row["average"]}
        cells = [_cell(measured.get(column)) for column in columns]
        partial |= {(n, m["items"]) for n, m in row["measured"].items() if not m["whole"]}
        bold = f"{row['measured']['mmk12']['bolded_steps']:.2f}" if "mmk12" in row["measured"] else NOT_RUN
        yield f"| {name} | {' | '.join(cells)} | {bold} |"
        if row["published"]:
            shown = [f"{row['published'][column]:.1f}" for column in columns]
            yield f"| *published* | {' | '.join(shown)} | |"
        if row["difference"]:
            shown = [f"{row['difference'][c]:+.1f}" if c in row["difference"] else "" for c in columns]
            yield f"| difference | {' | '.join(shown)} | |"
    yield ""
    yield (
        f"Published numbers are those of {SOURCE}, of which none for the ablations are known here. Intervals "
        "are 95%, bootstrap over items. The average is that of the five benchmarks. Bold steps: spans in "
        "bold a response."
    )
    for benchmark, items in sorted(partial):
        key = paper_name(benchmark)
        assert key is not None
        yield ""
        yield (
            f"**† {PAPER_BENCHMARKS[key]}: {items} items, the whole benchmark has {WHOLE[key]}; "
            "not comparable with the published number.**"
        )
    for note in table["notes"]:
        yield ""
        yield f"**{note}**"


def _cell(numbers: Mapping[str, Any] | None) -> str:
    if numbers is None:
        return NOT_RUN
    low, high = numbers["interval"]
    return f"{numbers['accuracy']:.1f} ({low:.1f} to {high:.1f}){'' if numbers['whole'] else ' †'}"
