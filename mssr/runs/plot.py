"""`mssr plot`: report.html of a run, one file to look at while it goes on and to send to somebody after."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import yaml
from rich.console import Console
from rich.table import Table

from mssr.config.run import flatten
from mssr.config.secrets import redact
from mssr.errors import UserError
from mssr.models.files import replace_text
from mssr.runs import glossary
from mssr.runs.charts import Series, chart
from mssr.runs.html import render
from mssr.runs.jsonl import read_records
from mssr.runs.run_directory import MACHINE, RECIPE
from mssr.runs.samples import recorded_prompts
from mssr.runs.verdict import WATCHED, judge

Records = Sequence[Mapping[str, Any]]

PANELS: Sequence[tuple[str, tuple[float | None, float | None], Sequence[tuple[str, str]]]] = (
    ("accuracy", (0, 1), (("reward/accuracy", "train (sampled)"), ("val/accuracy", "validation"))),
    ("entropy, nats per token", (0, None), (("policy/entropy", "policy"),)),
    (
        "KL, nats per token",
        (0, None),
        (("policy/kl_update", "of the update"), ("policy/kl_ref", "to the reference")),
    ),
    ("response length, tokens", (0, None), (("rollout/response_length", "mean"),)),
    ("Beta baseline", (0, 1), (("baseline/eta", "discount eta"), ("baseline/mean", "mean value"))),
)
"""Title, bounds of y, and the metrics with their names, of the first curves; those of accuracy follow it."""
SHADED = {
    "watch/entropy_collapsed": "entropy, nats per token",
    "watch/accuracy_dropped": "accuracy",
    "watch/length_exploded": "response length, tokens",
}
"""Flag -> the panel in which its steps are shaded."""
PHASES = ("rollout", "reward", "score", "update", "sync", "val", "save")
"""What a step's time is made of, stacked; ``save`` is of the checkpoint before it."""

SPEEDS = (
    ("perf/rollouts_per_s", "rollouts/s", "{:.1f}"),
    ("perf/tokens_per_s", "tokens/s", "{:.0f}"),
    ("perf/tokens_per_s_per_gpu", "tokens/s/GPU", "{:.0f}"),
    ("perf/mfu", "MFU of the update", "{:.1%}"),
)
MEMORY = (
    ("memory/total_rss_gib", "memory of driver and workers"),
    ("memory/actor_gpu_gib", "peak GPU memory of a rank"),
    ("memory/rollout_gpu_gib", "peak GPU memory of an engine"),
)
"""Rows of the summary, of keys that records have: of all steps the median, and the largest."""
EVENTS_SHOWN = 200
"""The last so many lines of events.jsonl are in the report."""


def plot(run_dir: str | Path, stream: TextIO = sys.stdout) -> Path:
    """Write the report of a run and print a short summary; returns the report's path.

    Raises:
        UserError: there are no metrics in the directory.
    """
    run_dir = Path(run_dir)
    rows = write_report(run_dir)
    table = Table(title=f"run {run_dir.name}", show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console(file=stream).print(table)
    return run_dir / "report.html"


def write_report(run_dir: Path, under_way: bool = False) -> list[tuple[str, str]]:
    """Write report.html; returns the rows of the summary, its path included.

    Args:
        under_way: the run may be writing: a last line that is not complete is left out.
    """
    records = read_metrics(run_dir, skip_damaged=under_way)
    rows, verdict = summary(records), judge(records)
    events_file = run_dir / "events.jsonl"
    events = read_records(events_file, skip_damaged=True) if events_file.is_file() else []
    config = flatten(_read(run_dir / "config.yaml"))
    prompts, left_out = recorded_prompts(run_dir)
    page = render(
        "runs",
        "report.html",
        {},
        name=run_dir.name,
        steps=f"step {records[-1]['step']} of {config.get('trainer.steps', '?')}",
        verdict=verdict,
        summary=rows,
        warnings=watch_sentences(records),
        curves=_panels(records),
        groups=_groups(records),
        prompts=prompts,
        left_out=left_out,
        sample_steps=sorted({v["step"] for p in prompts for v in p["visits"]}),
        events=[_event_cells(event) for event in events[-EVENTS_SHOWN:]],
        earlier=len(events) - EVENTS_SHOWN,
        recipe=_read(run_dir / RECIPE),
        config=config,
        machine=_read(run_dir / MACHINE),
    )
    replace_text(run_dir / "report.html", page)
    return [("verdict", verdict.name), *rows, ("report", str(run_dir / "report.html"))]


def read_metrics(run_dir: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The records of metrics.jsonl.

    Raises:
        UserError: there is no such file, it has no complete line, or a line is damaged.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no metrics.jsonl")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: no step is done yet")
    return read_records(path, skip_damaged)


def summary(records: Records) -> list[tuple[str, str]]:
    """Name and value of what a run came to."""
    rows = [("steps", str(records[-1]["step"]))]
    for key, name in (
        ("val/accuracy", "validation accuracy"),
        ("reward/accuracy", "train accuracy"),
        ("policy/entropy", "entropy"),
    ):
        values = [r[key] for r in records if r.get(key) is not None]
        if values:
            rows.append((f"{name}, before -> after", f"{values[0]:.3f} -> {values[-1]:.3f}"))
            if key == "val/accuracy":
                rows.append((f"{name}, best", f"{max(values):.3f}"))
    for key, name, form in SPEEDS:
        if values := sorted(r[key] for r in records if key in r):
            rows.append((f"{name}, median", form.format(values[len(values) // 2])))
    for key, name in MEMORY:
        if values := [r[key] for r in records if key in r]:
            rows.append((f"{name}, GiB", f"{max(values):.2f}"))
    return rows


def episodes(records: Records, flag: str) -> list[tuple[int, int]]:
    """First and last step of each stretch of records in which a flag is 1."""
    flagged = [r for r in records if flag in r]  # the validation before the first step has none
    spans = [list(group) for holds, group in groupby(flagged, key=lambda r: bool(r[flag])) if holds]
    return [(span[0]["step"], span[-1]["step"]) for span in spans]


def watch_sentences(records: Records) -> list[str]:
    """What the collapse watch saw, a sentence a sign."""
    sentences = []
    for flag, what in WATCHED.items():
        spans = [f"{a} to {b}" if a < b else str(a) for a, b in episodes(records, flag)]
        if spans:
            sentences.append(f"Collapse watch: {what}, noticed in steps {', '.join(spans)}.")
    return sentences


def curve(records: Records, key: str, name: str = "") -> Series:
    """A metric over the steps that have it; NaN, which is null in the file, leaves a gap."""
    there = [r for r in records if key in r]
    return Series(name or key, [r["step"] for r in there], [r[key] for r in there], dots=1 < len(there) <= 12)


def _panels(records: Records) -> list[str]:
    """The first curves of the page."""
    found = []
    for title, bounds, metrics in PANELS:
        named = [*metrics, *(_validation_sets(records) if title == "accuracy" else ())]
        series = [one for key, name in named if (one := curve(records, key, name)).x]
        spans = [
            (WATCHED[flag], first - 0.5, last + 0.5)
            for flag, panel in SHADED.items()
            for first, last in (episodes(records, flag) if panel == title else ())
        ]
        values = [v for one in series for v in one.y if v is not None]
        if values and bounds[1] is not None and max(values) > bounds[1]:
            bounds = (bounds[0], None)  # a score that is no share
        if values:
            found.append(chart(title, series, bounds=bounds, shaded=spans))
    return [*found, *_phases(records)]


def _phases(records: Records) -> list[str]:
    """The time of every step, phase on phase."""
    steps = [r for r in records if r.get("timing/step_s") is not None]
    low, series = [0.0] * len(steps), []
    for phase in PHASES:
        seconds = [r.get(f"timing/{phase}_s") or 0.0 for r in steps]
        if any(seconds):
            high = [a + b for a, b in zip(low, seconds, strict=True)]
            series.append(Series(phase, [r["step"] for r in steps], seconds, low, high, line=False))
            low = high
    return [chart("seconds a step", series, bounds=(0, None))] if series else []


def _groups(records: Records) -> dict[str, list[tuple[glossary.Metric | None, str]]]:
    """Heading -> what is known of each metric, and its curve."""
    order: dict[Any, int] = {metric: place for place, metric in enumerate(glossary.metrics())}
    keys = {key: glossary.find(key) for record in records for key in record if key != "step"}
    found: dict[str, list[tuple[glossary.Metric | None, str]]] = {}
    for key, about in sorted(keys.items(), key=lambda item: (order.get(item[1], len(order)), item[0])):
        title = f"{key}, {about.unit}" if about else key
        picture = chart(title, [curve(records, key)], about=about.meaning if about else "")
        found.setdefault(about.group if about else "Others", []).append((about, picture))
    return found


def _validation_sets(records: Records) -> list[tuple[str, str]]:
    """Metric and name of the validation sets that have one."""
    keys = {key: None for r in records for key in r if re.fullmatch(r"val/.+/accuracy", key)}
    return [(key, key.removeprefix("val/").removesuffix("/accuracy")) for key in keys]


def _event_cells(event: dict[str, Any]) -> list[str]:
    """Time, step, event and detail."""
    time, detail = event.get("time", ""), event.get("detail", "")
    if isinstance(time, int | float):
        time = datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if not isinstance(detail, str):
        detail = json.dumps(redact(detail), ensure_ascii=False)
    return [str(time), str(event.get("step", "")), str(event.get("event", "")), redact(detail)]


def _read(path: Path) -> dict[str, Any]:
    """What a start has written, JSON or YAML; nothing where that is missing or damaged."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return redact(found) if isinstance(found, dict) else {}
