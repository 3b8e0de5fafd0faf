"""The report: what the watch saw, and what happened to the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from mssr.runs.plot import EVENTS_SHOWN, episodes, write_report

pytestmark = pytest.mark.unit


def report(run_dir: Path, records: list[dict[str, Any]]) -> str:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report(run_dir)
    return (run_dir / "report.html").read_text()


def series(flag: str, steps: set[int]) -> list[dict[str, Any]]:
    before: dict[str, Any] = {"step": 0, "val/accuracy": 0.2}
    return [before] + [
        {"step": k, "reward/accuracy": 0.5, "policy/entropy": 0.3, flag: float(k in steps)}
        for k in range(1, 13)
    ]


def test_steps_of_a_collapse_are_named_and_shaded(tmp_path: Path) -> None:
    records = series("watch/entropy_collapsed", {3, 4, 5, 9})
    assert episodes(records, "watch/entropy_collapsed") == [(3, 5), (9, 9)]
    page = report(tmp_path / "collapsed/run", records)
    assert "entropy collapsed, noticed in steps 3 to 5, 9." in page
    healthy = report(tmp_path / "healthy/run", series("watch/entropy_collapsed", set()))
    assert "Collapse watch" not in healthy
    first, second = (
        Image.open(tmp_path / d / "run/plots/curves.png").convert("RGB") for d in ("collapsed", "healthy")
    )
    left, upper, right, lower = ImageChops.difference(first, second).getbbox() or (0, 0, 0, 0)
    # Only the panel of the entropy differs, the middle one of the upper row.
    assert first.width // 3 <= left < right <= 2 * first.width // 3 and upper < lower <= first.height // 2


def test_events_are_listed(tmp_path: Path) -> None:
    events = [
        {"time": 1.7e9, "step": 7, "event": "restart", "detail": "rollout worker <2> died"},
        {"time": "2026-01-01T00:00:00", "step": 8, "event": "collapse", "detail": {"flag": "entropy"}},
    ]
    text = "".join(json.dumps(e) + "\n" for e in events) + '{"time": 3, "st'  # cut off by a crash
    (tmp_path / "events.jsonl").write_text(text)
    page = report(tmp_path, series("watch/entropy_collapsed", set()))
    assert "<td>2023-11-14 22:13:20 UTC</td><td>7</td><td>restart</td>" in page
    assert "rollout worker &lt;2&gt; died" in page and "<2>" not in page
    assert "2026-01-01T00:00:00" in page and "{&#34;flag&#34;: &#34;entropy&#34;}" in page
    many = [{"time": 0, "step": k, "event": f"event-{k}."} for k in range(EVENTS_SHOWN + 5)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in many))
    page = report(tmp_path, series("watch/entropy_collapsed", set()))
    assert "event-4." not in page and "event-5." in page and "5 earlier ones" in page


def test_a_run_without_events_has_no_such_section(tmp_path: Path) -> None:
    assert "Events" not in report(tmp_path, series("watch/entropy_collapsed", set()))
