"""`mssr plot`: the curves of a run as plots/curves.png, and report.html with table and samples."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from mssr.config.secrets import redact
from mssr.errors import UserError
from mssr.runs.html import data_uri, render
from mssr.runs.jsonl import last_samples, read_records

REPORT_SAMPLES = 12

PANELS: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("accuracy", (("reward/accuracy", "train (sampled)"), ("val/accuracy", "validation (greedy)"))),
    ("entropy, nats per token", (("policy/entropy", "policy"),)),
    ("KL, nats per token", (("policy/kl_update", "of the update"), ("policy/kl_ref", "to the reference"))),
    ("response length, tokens", (("rollout/response_length", "mean"),)),
    ("Beta baseline", (("baseline/eta", "discount eta"), ("baseline/mean", "mean value"))),
    ("seconds a step", ()),
)
PHASES = ("rollout", "reward", "score", "update", "sync", "val", "save")
"""What a step's time is made of, stacked in the last panel; ``save`` is of the checkpoint before it."""

SPEEDS = (
    ("perf/rollouts_per_s", "rollouts/s", "{:.1f}"),
    ("perf/tokens_per_s_per_gpu", "tokens/s/GPU", "{:.0f}"),
    ("perf/mfu", "MFU of the update", "{:.1%}"),
)
MEMORY = (
    ("memory/total_rss_gib", "memory of driver and workers"),
    ("memory/actor_gpu_gib", "peak GPU memory of a rank"),
    ("memory/rollout_gpu_gib", "peak GPU memory of an engine"),
)
"""Rows of the summary, of keys that records have: of all steps the median, and the largest."""

WATCHED: dict[str, tuple[str, str]] = {
    "watch/entropy_collapsed": ("entropy, nats per token", "entropy collapsed"),
    "watch/accuracy_dropped": ("accuracy", "train accuracy dropped"),
    "watch/length_exploded": ("response length, tokens", "responses grew until they were cut"),
}
"""Flag in metrics.jsonl (0 or 1) -> panel in which its steps are shaded, and what it says."""
EVENTS_SHOWN = 200
"""The last so many lines of events.jsonl are in the report."""


def plot(run_dir: str | Path, stream: TextIO = sys.stdout) -> Path:
    """Draw the run, write its report and print a short summary; returns the report's path.

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


def write_report(run_dir: Path) -> list[tuple[str, str]]:
    """Write plots/curves.png and report.html; returns the rows of the summary, files included."""
    records = read_metrics(run_dir)
    picture = run_dir / "plots" / "curves.png"
    picture.parent.mkdir(exist_ok=True)
    _draw(records, picture, title=run_dir.name)
    rows = summary(records)
    events_file = run_dir / "events.jsonl"
    events = read_records(events_file, skip_damaged=True) if events_file.is_file() else []
    samples_of, samples = last_samples(run_dir, "val")
    page = render(
        "runs",
        "report.html",
        {},
        name=run_dir.name,
        summary=rows,
        warnings=watch_sentences(records),
        picture=data_uri(picture.read_bytes(), "png"),
        events=[_event_cells(event) for event in events[-EVENTS_SHOWN:]],
        earlier=len(events) - EVENTS_SHOWN,
        samples_of=samples_of,
        samples=samples[:REPORT_SAMPLES],
    )
    (run_dir / "report.html").write_text(page)
    return [*rows, ("report", str(run_dir / "report.html")), ("curves", str(picture))]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl.

    Raises:
        UserError: there is no such file, it has no complete line, or a line is damaged.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no metrics.jsonl")
    if not path.stat().st_size:
        raise UserError(f"{path} is empty: no step is done yet")
    return read_records(path)


def summary(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
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


def episodes(records: list[dict[str, Any]], flag: str) -> list[tuple[int, int]]:
    """First and last step of each stretch of records in which a flag is 1."""
    flagged = [r for r in records if flag in r]  # the validation before the first step has none
    spans = [list(group) for holds, group in groupby(flagged, key=lambda r: bool(r[flag])) if holds]
    return [(span[0]["step"], span[-1]["step"]) for span in spans]


def watch_sentences(records: list[dict[str, Any]]) -> list[str]:
    """What the collapse watch saw, a sentence a sign."""
    sentences = []
    for flag, (_, what) in WATCHED.items():
        spans = [f"{a} to {b}" if a < b else str(a) for a, b in episodes(records, flag)]
        if spans:
            sentences.append(f"Collapse watch: {what}, noticed in steps {', '.join(spans)}.")
    return sentences


def _draw(records: list[dict[str, Any]], path: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(title)
    for axis, (name, curves) in zip(axes.flat, PANELS, strict=True):
        if not curves:
            _draw_phases(axis, records)
        for key, label in (*curves, *(_validation_sets(records) if name == "accuracy" else ())):
            points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
            if points:
                marker = "o" if len(points) <= 12 else ""
                axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
        for flag, (panel, what) in WATCHED.items():
            for number, (first, last) in enumerate(episodes(records, flag) if panel == name else ()):
                # A label that begins with _ stays out of the legend.
                label = "_again" if number else what
                axis.axvspan(first - 0.5, last + 0.5, color="#b3261e", alpha=0.18, label=label)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.set_ylim(0, 1 if name == "accuracy" else None)
    figure.savefig(path, dpi=110)


def _draw_phases(axis: Any, records: list[dict[str, Any]]) -> None:
    """The time of every step, phase on phase."""
    steps = [r for r in records if r.get("timing/step_s") is not None]
    seconds = {p: [r.get(f"timing/{p}_s") or 0.0 for r in steps] for p in PHASES}
    shown = {phase: values for phase, values in seconds.items() if any(values)}
    if shown:
        axis.stackplot([r["step"] for r in steps], *shown.values(), labels=shown, alpha=0.8)


def _validation_sets(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
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
