"""Evaluations on disk: numbers by value, the same bytes in every order, and readable errors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mssr.errors import UserError
from mssr.evaluation import results
from mssr.evaluation.items import Item, Verdict
from mssr.evaluation.responses import Response
from mssr.evaluation.tables import PAPER, PAPER_BENCHMARKS, paper_name, results_table
from tests.unit.evaluation_records import a_record

pytestmark = pytest.mark.unit

META = {"model": "Qwen/Qwen2.5-VL-3B-Instruct", "config": {"temperature": 0.0, "seed": 0}}
RIGHT = r"<think>**Look.** 3 and **5**</think> \boxed{8}"


def make(item: str, status: str = "right", **changes: Any) -> dict[str, Any]:
    """A record whose response and answer are as its verdict says."""
    of_status = {
        "response": RIGHT if status == "right" else "no idea",
        "finish_reason": "length" if status == "truncated" else "stop",
        "extracted": {"right": "8", "wrong": "9"}.get(status),
    }
    return a_record(item, status, **of_status | changes)


def several() -> list[dict[str, Any]]:
    """Two benchmarks, one of them with every verdict."""
    statuses = ["right", "right", "wrong", "extraction_failed", "truncated", "judge_failed", "right", "wrong"]
    rows = [make(str(i), status) for i, status in enumerate(statuses)]
    return rows + [make(f"v{i}", "right" if i < 3 else "wrong", benchmark="mathvista") for i in range(4)]


def summary_of(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return results.summarize(rows, META, **more)


def test_the_numbers_of_an_evaluation() -> None:
    rows = several()
    rows[0]["response_tokens"] = 90
    breakdowns = {"mmk12": {"subject": {"physics": (3, 8), "none": (0, 0)}}}
    summary = summary_of(rows, breakdowns=breakdowns, metrics={"mmk12": {"qAcc": 1 / 3}})
    assert (
        summary["model"] == META["model"] and summary["config"] == META["config"] and summary["schema"] == 1
    )
    mmk12 = summary["benchmarks"]["mmk12"]
    # Failed extraction, cut-off responses and failed judge calls are wrong and stay in the denominator.
    assert (mmk12["items"], mmk12["correct"], mmk12["total"], mmk12["accuracy"]) == (8, 3, 8, 0.375)
    assert mmk12["status"] == {
        "right": 3,
        "wrong": 2,
        "extraction_failed": 1,
        "truncated": 1,
        "judge_failed": 1,
    }
    assert mmk12["response"] == {"tokens": 20.0, "truncated": 0.125, "format": 0.375, "bolded_steps": 0.75}
    assert mmk12["breakdowns"]["subject"]["physics"] == {"correct": 3, "total": 8, "accuracy": 0.375}
    assert mmk12["breakdowns"]["subject"]["none"]["accuracy"] is None
    assert mmk12["metrics"] == {"qAcc": 0.333333}
    # Quantiles of B(8, 3/8) / 8, whose distribution function is .023 at 0, .135 at 1, .964 at 5, .994 at 6.
    assert mmk12["interval"] == [0.125, 0.75]
    assert "pass_at_k" not in mmk12
    for average in summary["averages"].values():
        assert average["accuracy"] == 0.5625 and average["benchmarks"] == ["mathvista", "mmk12"]
        assert 0.25 <= average["interval"][0] < 0.5625 < average["interval"][1] < 0.85


def test_several_samples() -> None:
    votes = {"a": ["right", "right", "wrong", "wrong"], "b": ["wrong", "right", "wrong", "extraction_failed"]}
    rows = [make(i, status, sample=k) for i, item in votes.items() for k, status in enumerate(item)]
    mmk12 = summary_of(rows)["benchmarks"]["mmk12"]
    assert (mmk12["items"], mmk12["samples"], mmk12["total"], mmk12["accuracy"]) == (2, 4, 8, 0.375)
    # a: 1, 1 - 1/6, 1; b: 1/4, 1 - 3/6, 1.
    assert mmk12["pass_at_k"] == {"1": 0.375, "2": round((5 / 6 + 1 / 2) / 2, 6), "4": 1.0}
    # a: a tie of two; b: "9" has two votes of three.
    assert mmk12["maj_at_k"]["1"] == 0.375 and mmk12["maj_at_k"]["4"] == 0.25
    # Items are resampled, not samples: 2 items of 0.5 and 0.25 have means 0.25, 0.375 and 0.5.
    assert mmk12["interval"] == [0.25, 0.5]


def test_items_need_the_same_number_of_samples() -> None:
    with pytest.raises(UserError, match="mmk12 item b has 2 samples, but others have 1"):
        summary_of([make("a"), make("b"), make("b", sample=1)])
    with pytest.raises(UserError, match="mmk12 item a has two records of sample 0"):
        summary_of([make("a"), make("a")])
    with pytest.raises(UserError, match="without items"):
        summary_of([])


def test_the_same_items_give_the_same_bytes_in_every_order(tmp_path: Path) -> None:
    rows = several() + [make(str(i), "wrong", benchmark="own.parquet") for i in range(30)]
    breakdowns = {"mmk12": {"subject": {"x": (1, 2), "a": (2, 6)}}}
    other_breakdowns = {"mmk12": {"subject": {"a": (2, 6), "x": (1, 2)}}}
    results.write(tmp_path / "a", rows, META, breakdowns=breakdowns, timing={"seconds": 12.5})
    shuffled = [dict(random.Random(i).sample(sorted(row.items()), len(row))) for i, row in enumerate(rows)]
    random.Random(0).shuffle(shuffled)
    meta = dict(reversed(META.items()))
    results.write(tmp_path / "b", shuffled, meta, breakdowns=other_breakdowns, timing={"seconds": 99.0})
    names = {"items.jsonl", "results.json", "table.md", "items.html", "timing.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    for name in names - {"timing.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert json.loads((tmp_path / "b/timing.json").read_text()) == {"seconds": 99.0}


def test_written_and_read(tmp_path: Path) -> None:
    odd = 'a "quote"\u2028line\x85 \ud800 三角形 </script>\r\n'
    rows = [make("a", "wrong", response=odd, extracted=odd), make("b", judge="said no")]
    written = results.write(tmp_path, rows, META)
    evaluation = results.read(tmp_path)
    assert evaluation.records == rows and evaluation.summary == written
    assert "三角形" in (tmp_path / "items.jsonl").read_text()


def test_a_record_of_an_item_and_its_verdict() -> None:
    item = Item("mmk12", "7", "How many?", (), "8", tags={"subject": "physics"})
    row = results.record(
        item, Response("mmk12", "7", 0, RIGHT, 10, "stop"), Verdict(True, "8", "right", "choice")
    )
    assert row == make("7")


def test_an_evaluation_that_broke_off_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "items_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        results.write(tmp_path, several(), META)
    with pytest.raises(UserError, match=r"is no finished evaluation: it has no results\.json"):
        results.read(tmp_path)


def _damage(directory: Path, name: str, old: str, new: str) -> None:
    text = (directory / name).read_text()
    assert old in text
    (directory / name).write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "results.json",
            '"schema": 1',
            '"schema": 9',
            "results.json has schema 9, this version of mssr reads 1",
        ),
        ("results.json", '"schema"', "schema", "results.json is damaged: "),
        ("results.json", '"total": 8', '"total": 9', "results.json does not have the counts of items.jsonl"),
        ("results.json", '"total": 8', '"all": 8', "results.json is damaged: a benchmark lacks its counts"),
        ("items.jsonl", '{"answer"', '"answer"', "items.jsonl line 1 is damaged: "),
        ("items.jsonl", '"rule": "choice", ', "", "items.jsonl line 1 has no key rule"),
        (
            "items.jsonl",
            '"sample": 0',
            '"sample": true',
            "items.jsonl line 1: sample is True, not of type int",
        ),
        ("items.jsonl", '"id": "v0"', '"id": 5', "items.jsonl line 1: id is 5, not of type str"),
        (
            "items.jsonl",
            '"status": "right"',
            '"status": "good"',
            "line 1: status is 'good', not one of right, ",
        ),
        (
            "items.jsonl",
            '"correct": true',
            '"correct": false',
            "line 1: correct is False, but status is right",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    results.write(tmp_path, several(), META)
    _damage(tmp_path, name, old, new)
    with pytest.raises(UserError) as error:
        results.read(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_lines_and_files_are_noticed(tmp_path: Path) -> None:
    results.write(tmp_path, several(), META)
    path = tmp_path / "items.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="does not have the counts"):
        results.read(tmp_path)
    path.write_text("")
    with pytest.raises(UserError, match=r"items\.jsonl is empty"):
        results.read(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"items\.jsonl does not exist"):
        results.read(tmp_path)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file cannot be written \(File exists\)|Not a directory"):
        results.write(tmp_path / "file", several(), META)


# Tables


def test_the_paper_numbers_have_the_averages_that_the_paper_states() -> None:
    stated = {
        "3B": {"base": 44.6, "GRPO": 47.4, "RLOO": 46.3, "REINFORCE++": 42.8, "MSSR": 49.5},
        "7B": {"base": 52.8, "GRPO": 56.3, "RLOO": 56.0, "REINFORCE++": 53.1, "MSSR": 58.6},
    }
    ours = {
        size: {name: round(sum(row.values()) / 5 + 1e-9, 1) for name, row in rows.items()}
        for size, rows in PAPER.items()
    }
    assert ours == stated


@pytest.mark.parametrize(
    "name", ["mathverse", "MathVista", "mmk12", "r1_onevision", "R1-Onevision-Bench", "HallusionBench"]
)
def test_names_of_the_paper_benchmarks(name: str) -> None:
    assert paper_name(name) in PAPER_BENCHMARKS


@pytest.mark.parametrize("name", ["geometry3k", "math", "mathverse.parquet", "bench", ""])
def test_other_benchmarks_are_not_the_paper_s(name: str) -> None:
    assert paper_name(name) is None


def test_the_table_stands_beside_the_paper_and_says_so() -> None:
    rows = [*several(), make("g", benchmark="geometry3k")]
    breakdowns = {"mmk12": {"by_subject": {"a | b": (3, 8)}}}
    table = results_table(
        summary_of(rows, breakdowns=breakdowns, metrics={"mmk12": {"qAcc": 0.25, "truncated": 0.1}})
    )
    lines = table.splitlines()
    assert lines[2] == "| accuracy, % | MathVista | MMK12 | average of these 2 |"
    assert lines[4].startswith("| **this evaluation** | 75.0 (25.0 to 100.0) | 37.5 (12.5 to 75.0) | 56.2 (")
    assert lines[5] == "| *paper, 3B, base* | 59.5 | 42.5 | 51.0 |"
    assert lines[14] == "| *paper, 7B, MSSR* | 71.1 | 62.5 | 66.8 |"
    assert "they were not measured here" in table
    assert "MMK12: 8 items, the whole benchmark has 2000; not comparable with the paper." in table
    assert "| geometry3k | 100.0 (100.0 to 100.0) | 1 |" in lines
    assert "| mmk12 | 8 | 8 | 3 | 2 | 1 | 1 | 1 | 10.0 | 12.5% | 37.5% | 0.75 |" in lines
    assert r"| a \| b | 3 / 8 | 37.5 |" in lines and "| by subject | right | % |" in lines
    assert "| qAcc | 25.0 |" in lines and "| truncated | 10.0 |" not in lines
    assert "Several samples" not in table


def test_the_whole_set_has_the_paper_average_and_no_warning() -> None:
    sizes = {"mathverse": 3940, "mathvista": 1000, "mmk12": 2000, "r1_onevision": 942, "hallusionbench": 951}
    rows = [make(str(i), benchmark=name) for name, size in sizes.items() for i in range(size)]
    table = results_table(summary_of(rows))
    assert "| MathVerse | MathVista | MMK12 | R1-OneVision | HallusionBench | average |" in table
    assert "| *paper, 3B, MSSR* | 39.6 | 63.0 | 49.2 | 29.0 | 66.6 | 49.5 |" in table
    assert "not comparable" not in table and "aAcc" in table


def test_the_table_of_several_samples() -> None:
    rows = [make("a", s, sample=k) for k, s in enumerate(["right", "wrong", "wrong"])]
    table = results_table(summary_of(rows))
    assert "| benchmark | % | k = 1 | k = 2 | k = 3 |" in table
    assert "| mmk12 | pass@k | 33.3 | 66.7 | 100.0 |" in table
    assert "| mmk12 | maj@k | 33.3 | 33.3 | 0.0 |" in table


def test_table_cells_hold_anything() -> None:
    table = results_table(summary_of([make("a", benchmark="x|y\nz")]))
    assert "| x\\|y z | 100.0 (100.0 to 100.0) | 1 |" in table.splitlines()
