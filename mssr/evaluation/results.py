"""An evaluation on disk: what was answered, what came of it, and how to read both.

A directory holds

- items.jsonl: one object per item and sample, see `record`; sorted by benchmark, id and sample
- results.json: the numbers, see `summarize`; written last, so that it stands for a whole evaluation
- table.md: the same for people, beside the paper's numbers
- items.html: a page to read items
- timing.json: clocks and speeds, if the caller gave any

All but timing.json follow from the records alone: the same bytes whatever order the records came in.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from mssr.data.messages import IMAGE_MARK
from mssr.errors import UserError
from mssr.evaluation import statistics
from mssr.evaluation.base import Counts
from mssr.evaluation.items import STATUSES, Item, Verdict
from mssr.evaluation.page import ImageOf, items_page
from mssr.evaluation.responses import Response
from mssr.evaluation.statistics import Bootstrap, count_right
from mssr.evaluation.tables import paper_name, results_table
from mssr.models.files import replace_text
from mssr.runs.jsonl import read_records

SCHEMA = 1
ITEMS, RESULTS, TABLE, PAGE, TIMING = "items.jsonl", "results.json", "table.md", "items.html", "timing.json"
DECIMALS = 6

Records = Sequence[Mapping[str, Any]]
Breakdowns = Mapping[str, Counts]
"""Of benchmarks: ``{"mmk12": {"subject": {"physics": (3, 5)}}}``."""

_TYPES: Mapping[str, Any] = {
    **dict.fromkeys("benchmark id question answer response finish_reason status rule".split(), str),
    **dict.fromkeys(("sample", "response_tokens"), int),
    "extracted": str | None,
    "correct": bool,
    "tags": dict,
}
"""Of the values of a record."""
_KEY = itemgetter("benchmark", "id", "sample")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation read back."""

    summary: dict[str, Any]
    """results.json."""
    records: list[dict[str, Any]]
    """items.jsonl."""


def record(item: Item, response: Response, verdict: Verdict) -> dict[str, Any]:
    """A line of items.jsonl: one response to an item and its verdict. A caller may add keys."""
    return {
        "benchmark": item.benchmark,
        "id": item.id,
        "sample": response.sample,
        "question": item.question.replace(item.mark, IMAGE_MARK),
        "answer": item.answer,
        "tags": dict(item.tags),
        "response": response.text,
        "response_tokens": response.tokens,
        "finish_reason": response.finish_reason,
        **asdict(verdict),
    }


def write(
    directory: str | Path,
    records: Records,
    meta: Mapping[str, Any],
    *,
    breakdowns: Breakdowns | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    image_of: ImageOf | None = None,
    timing: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write an evaluation; a file that is there is replaced as a whole. Returns the content of results.json.

    Args:
        records: of `record`, in any order; every item of a benchmark with the same number of samples.
        meta: ``model`` (str), ``config`` (JSON values), and whatever else results.json is to name, but no
            clocks or paths of this run.
        breakdowns: of the benchmarks that have some.
        metrics: further shares of 1 of a benchmark, ``{"hallusionbench": {"qAcc": 0.31}}``.
        image_of: for the page.
        timing: for timing.json.

    Raises:
        UserError: a record is incomplete or there twice, items differ in their number of samples, or
            the directory cannot be written.
    """
    summary = summarize(records, meta, breakdowns, metrics)
    ordered = sorted(records, key=_KEY)
    texts = {
        ITEMS: "".join(_json(row) + "\n" for row in ordered),
        TABLE: results_table(summary),
        PAGE: items_page(ordered, str(summary["model"]), image_of),
        RESULTS: _json(summary, indent=1) + "\n",
    }
    if timing is not None:
        texts = {TIMING: _json(timing, indent=1) + "\n"} | texts
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            # Half a surrogate pair becomes its escape, which JSON reads back.
            replace_text(directory / name, text.encode("utf-8", "backslashreplace").decode())
    except OSError as error:
        raise UserError(f"{directory} cannot be written ({error.strerror or error})") from error
    return summary


def summarize(
    records: Records,
    meta: Mapping[str, Any],
    breakdowns: Breakdowns | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """The content of results.json; see `write` for the arguments.

    ``schema``, what ``meta`` has, ``benchmarks`` and ``averages``. Of a benchmark: ``items``, ``samples``
    (of an item), ``correct``, ``total`` (samples of all items), ``accuracy`` (correct / total),
    ``interval`` (95%, bootstrap over items), ``status`` (counts), ``breakdowns`` (correct, total and
    accuracy of every group), ``metrics``, ``pass_at_k`` and ``maj_at_k`` for several samples, and
    ``response`` (mean ``tokens`` and ``bolded_steps``, ``truncated`` and ``format`` rates). ``averages``
    are unweighted means of accuracies: ``all`` of several benchmarks, ``paper`` of those of the paper.
    Shares are fractions of 1, rounded to 6 decimals.
    """
    if not records:
        raise UserError("an evaluation without items has no results")
    for number, row in enumerate(records, 1):
        _check_record(row, f"record {number}")
    ordered = sorted(records, key=_KEY)
    for before, row in pairwise(ordered):
        if _KEY(before) == _KEY(row):
            raise UserError("{} item {} has two records of sample {}".format(*_KEY(row)))
    benchmarks: dict[str, Any] = {}
    accuracies: dict[str, Bootstrap] = {}
    for name, part in groupby(ordered, itemgetter("benchmark")):
        rows = list(part)
        means = np.array(list(item_means(rows).values()))
        accuracies[name] = statistics.bootstrap(means, seed_of(name))
        benchmarks[name] = {
            **_share(accuracies[name]),
            **_counts(rows),
            "breakdowns": {
                breakdown: {
                    group: {"correct": right, "total": total, "accuracy": right / total if total else None}
                    for group, (right, total) in groups.items()
                }
                for breakdown, groups in (breakdowns or {}).get(name, {}).items()
            },
            "metrics": dict((metrics or {}).get(name, {})),
        }
    of_paper = [name for name in accuracies if paper_name(name)]
    averages = {
        label: _share(statistics.average([accuracies[name] for name in names])) | {"benchmarks": names}
        for label, names in (("all", list(accuracies)), ("paper", of_paper))
        if len(names) > 1
    }
    own = {"schema": SCHEMA, "benchmarks": benchmarks, "averages": averages}
    assert "model" in meta and not own.keys() & meta.keys(), meta.keys()
    summary = _json({**meta, **own})
    return dict(json.loads(summary, parse_float=lambda text: round(float(text), DECIMALS)))


def item_means(rows: Records) -> dict[str, float]:
    """Item id -> share of right samples, of the records of one benchmark.

    Raises:
        UserError: an item has another number of samples than the first.
    """
    counts = count_right((row["id"], row["correct"]) for row in rows)
    _, samples = counts[rows[0]["id"]]
    for item, (_, count) in counts.items():
        if count != samples:
            raise UserError(
                f"{rows[0]['benchmark']} item {item} has {count} samples, but others have {samples}"
            )
    return {item: right / samples for item, (right, _) in counts.items()}


def seed_of(benchmark: str) -> int:
    """Seed of a benchmark's bootstrap: another one for every benchmark, as their draws are independent."""
    return zlib.crc32(benchmark.encode())


def read(directory: str | Path) -> Evaluation:
    """An evaluation as `write` left it.

    Raises:
        UserError: a file is missing, damaged, or not of the same evaluation as the other.
    """
    path, items = Path(directory, RESULTS), Path(directory, ITEMS)
    if not path.is_file():
        raise UserError(f"{directory} is no finished evaluation: it has no {RESULTS}")
    try:
        summary = json.loads(path.read_bytes())
        schema = summary.get("schema")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version of mssr reads {SCHEMA}")
    if not items.is_file():
        raise UserError(f"{items} does not exist")
    records = read_records(items)
    if not records:
        raise UserError(f"{items} is empty")
    for number, row in enumerate(records, 1):
        _check_record(row, f"{items} line {number}")
    counted = count_right((row["benchmark"], row["correct"]) for row in records)
    try:
        stated = {name: (b["correct"], b["total"]) for name, b in summary["benchmarks"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: a benchmark lacks its counts ({error})") from error
    if counted != stated:
        raise UserError(f"{path} does not have the counts of {ITEMS} beside it; write the evaluation again")
    return Evaluation(summary, records)


def _check_record(row: Mapping[str, Any], where: str) -> None:
    for key, kind in _TYPES.items():
        if key not in row:
            raise UserError(f"{where} has no key {key}")
        # A bool is an int for Python.
        if not isinstance(row[key], kind) or (isinstance(row[key], bool) and kind is not bool):
            name = getattr(kind, "__name__", kind)
            raise UserError(f"{where}: {key} is {row[key]!r:.60}, not of type {name}")
    if row["status"] not in STATUSES:
        raise UserError(f"{where}: status is {row['status']!r:.60}, not one of {', '.join(STATUSES)}")
    if row["correct"] != (row["status"] == "right"):
        raise UserError(f"{where}: correct is {row['correct']}, but status is {row['status']}")


def _counts(rows: Records) -> dict[str, Any]:
    """Of a benchmark's sorted records."""
    items = [list(group) for _, group in groupby(rows, itemgetter("id"))]
    samples = len(items[0])
    counts = Counter(row["status"] for row in rows)
    responses = [row["response"] for row in rows]
    numbers: dict[str, Any] = {
        "items": len(items),
        "samples": samples,
        "correct": counts["right"],
        "total": len(rows),
        "status": {status: counts[status] for status in STATUSES},
        "response": {
            "tokens": fmean(row["response_tokens"] for row in rows),
            "truncated": fmean(row["finish_reason"] == "length" for row in rows),
            "format": fmean(map(statistics.keeps_format, responses)),
            "bolded_steps": fmean(map(statistics.bolded_steps, responses)),
        },
    }
    if samples > 1:
        answers = [[row["extracted"] for row in item] for item in items]
        correct = [[row["correct"] for row in item] for item in items]
        right = [sum(item) for item in correct]
        ks = statistics.ks(samples)
        numbers["pass_at_k"] = {str(k): statistics.pass_at_k(right, samples, k) for k in ks}
        numbers["maj_at_k"] = {str(k): statistics.maj_at_k(answers, correct, k) for k in ks}
    return numbers


def _share(accuracy: Bootstrap) -> dict[str, Any]:
    return {"accuracy": accuracy.value, "interval": list(accuracy.interval())}


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent)
