"""The recorder: what of a step is written down, images once and small, and a report that holds nothing up."""

from __future__ import annotations

import json
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from mssr.data.dataset import PromptDataset
from mssr.runs.jsonl import read_records
from mssr.trainer import samples
from mssr.trainer.collect import Collected
from mssr.trainer.samples import SampleRecorder
from mssr.types import Rollout, TrainBatch

pytestmark = pytest.mark.unit


class Picture:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def decode(self) -> Image.Image:
        if self.fails:
            raise OSError("gone")
        return Image.new("RGB", (600, 300), "red")


class Rows:
    """Two images a prompt, of which the second cannot be read."""

    def row(self, prompt_id: str) -> Any:
        images = (Picture(False), Picture(True))
        return SimpleNamespace(question=f"{prompt_id}?", answer="8", images=images)


DATASET = cast(PromptDataset, Rows())


def rollouts(*ids: str) -> list[Rollout]:
    tokens = np.zeros(3, np.int32)
    return [Rollout(i, 0, tokens, tokens, np.zeros(3, np.float32), "stop", 0, f"to {i}") for i in ids]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/accuracy": 0.5}\n')
    return tmp_path


def test_what_is_written_of_a_step(run_dir: Path) -> None:
    found = rollouts("a", "b")
    batch = TrainBatch.of(found)
    batch.advantages[:] = [1.5, -1.5]
    with closing(SampleRecorder(run_dir, pytest.fail)) as recorder:
        recorder.train(
            4, DATASET, Collected(found, np.array([1.0, 0.0]), {}, 0.0), batch, np.array([0.25, 0.75])
        )
        scores = np.array([np.nan, 1.0])
        recorder.validation(4, "val", DATASET, rollouts("val/a", "val/b"), scores)
        recorder.begin_report()
    lines = read_records(run_dir / "samples/step-000004.jsonl")
    facts = [[r[key] for key in ("split", "id", "score", "chosen")] for r in lines]
    assert facts == [
        ["train", "a", 1.0, "best"], ["train", "b", 0.0, "worst"],
        ["val", "a", None, "followed"], ["val", "b", 1.0, "followed"],
    ]  # fmt: skip
    assert [(r["advantage"], r["baseline"]) for r in lines[:2]] == [(1.5, 0.25), (-1.5, 0.75)]
    assert "baseline" not in lines[2] and all(len(r["images"]) == 2 for r in lines)
    # Prompts of one id in both sets have images of their own; what cannot be read is left out.
    files = sorted((run_dir / "images").iterdir())
    assert len(files) == 4 and {r["images"][0] for r in lines} == {f"images/{f.name}" for f in files}
    assert Image.open(files[0]).size == (256, 128)
    page = (run_dir / "report.html").read_text()
    assert page.count("data:image/jpeg") == 4 and "baseline 0.250, advantage +1.500" in page


def test_advantages_of_tokens_are_not_told_as_one_of_the_response(run_dir: Path) -> None:
    found = rollouts("a", "b")
    batch = TrainBatch.of(found)
    object.__setattr__(batch, "token_advantages", np.ones(6, np.float32))
    with closing(SampleRecorder(run_dir, pytest.fail)) as recorder:
        recorder.train(1, DATASET, Collected(found, np.array([1.0, 0.0]), {}, 0.0), batch, None)
    lines = read_records(run_dir / "samples/step-000001.jsonl")
    assert [r["advantage"] for r in lines] == [None, None] and lines[0]["baseline"] is None
    assert len(list((run_dir / "images").iterdir())) == 2  # also without a report


def test_a_verdict_that_changed_since_the_last_validation_is_shown(run_dir: Path) -> None:
    ids = [f"val/{k}" for k in range(100)]
    with closing(SampleRecorder(run_dir, pytest.fail)) as recorder:
        for step in (0, 10):
            scores = np.zeros(100) + (step == 10)
            recorder.validation(step, "val", DATASET, rollouts(*ids), scores)
        recorder.validation(20, "val", DATASET, rollouts(*ids), scores)
    count = []
    for step in (0, 10, 20):
        lines = read_records(run_dir / f"samples/step-{step:06d}.jsonl")
        assert len(lines) == 100
        count.append(sum(r.get("chosen") == "changed" for r in lines))
    assert count == [0, 8, 0]


def test_a_report_that_fails_costs_a_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def fails(run_dir: Path, under_way: bool) -> None:
        raise RuntimeError("no space\nat all")

    monkeypatch.setattr(samples, "write_report", fails)
    with closing(SampleRecorder(run_dir, said.append)) as recorder:
        recorder.begin_report()
    assert said == ["RuntimeError: no space"]


def test_a_report_that_takes_long_holds_nothing_up(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, written = threading.Event(), []

    def slow(run_dir: Path, under_way: bool) -> None:
        assert go_on.wait(60)
        written.append(len((run_dir / "metrics.jsonl").read_text().splitlines()))

    monkeypatch.setattr(samples, "write_report", slow)
    with closing(SampleRecorder(run_dir, pytest.fail)) as recorder:
        for step in range(3):
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step}) + "\n")
            recorder.begin_report()  # the second and third find the first at work
        go_on.set()
    assert written == [4]
