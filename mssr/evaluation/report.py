"""Verdicts -> the files of an evaluation directory."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mssr.evaluation import results
from mssr.evaluation.base import Counts
from mssr.evaluation.items import STATUSES
from mssr.evaluation.verdicts import VerdictBook


def write_results(
    out: Path, book: VerdictBook, n: int, meta: Mapping[str, Any], timing: Mapping[str, Any]
) -> dict[str, Any]:
    """Write everything that `mssr.evaluation.results.write` does; returns the content of results.json.

    Breakdowns and metrics are those of every sample apart, since pairs and figures are made of answers of
    the same one; then the counts are added and the metrics averaged.

    Args:
        n: responses of an item.
    """
    records = []
    breakdowns: dict[str, Counts] = {}
    metrics: dict[str, dict[str, float]] = {}
    for benchmark, questions in book.by_benchmark():
        items = [q.item for q in questions]
        counts = breakdowns[benchmark.name] = {}
        shares = metrics[benchmark.name] = defaultdict(float)
        for k in range(n):
            answers = [book.of(q, k) for q in questions]
            for q, (r, verdict) in zip(questions, answers, strict=True):
                row = results.record(q.item, k, r.text, r.tokens, r.finish_reason, verdict)
                records.append(row if q.note is None else row | {"note": q.note})
            verdicts = [verdict for _, verdict in answers]
            _add(counts, benchmark.breakdown(items, verdicts))
            for name, value in benchmark.metrics(items, verdicts).items():
                if name not in ("accuracy", *STATUSES):  # which are counted anyway
                    shares[name] += value / n
    images = {(q.benchmark.name, q.item.id): q.item.images for q in book.questions}

    def image_of(name: str, item: str) -> list[bytes]:
        found = []
        for image in images[name, item]:
            with contextlib.suppress(OSError, ValueError):  # noted in its record
                found.append(image.read())
        return found

    return results.write(
        out,
        records,
        {**meta, **book.flawed()},
        breakdowns=breakdowns,
        metrics=metrics,
        image_of=image_of,
        timing=timing,
    )


def _add(total: Counts, counts: Counts) -> None:
    for name, groups in counts.items():
        part = total.setdefault(name, {})
        for group, (right, count) in groups.items():
            before = part.get(group, (0, 0))
            part[group] = (before[0] + right, before[1] + count)
