"""The chains task: honest rows, demonstrations in the shares they claim, bases that repeat."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from mssr.data import prepared
from mssr.data.chains import ChainsSettings, prepare, task
from mssr.data.chains.responses import Habit, demonstration, steps
from mssr.data.chains.rows import KINDS, LENGTHS, ChainScans, draw_chains, running_totals
from mssr.data.digits.rows import load_scans
from mssr.errors import UserError
from mssr.evaluation.statistics import bolded_steps
from mssr.tools.cli import main

pytestmark = pytest.mark.unit

SMALL = ChainsSettings(
    train_rows=20,
    val_rows=16,
    lessons=8,
    ability_steps=2,
    habit_steps=2,
    batch_size=4,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chains")
    prepare(out, seed=0, quiet=True, settings=SMALL)
    return out


@pytest.mark.parametrize(
    ("kind", "totals"),
    [
        ("sum", [7, 6, 0, 8]),  # 7, 16, 20, 28
        ("alternating", [7, 8, 2, 4]),  # 7, -2, 2, -6
        ("largest", [7, 9, 9, 9]),
        ("evens", [0, 0, 1, 2]),
    ],
)
def test_running_totals_of_every_kind(kind: str, totals: list[int]) -> None:
    assert running_totals(kind, [7, 9, 4, 8]) == totals


def test_answers_follow_from_the_labels_of_scikit_learn(made: Path) -> None:
    from datasets import load_dataset
    from sklearn.datasets import load_digits

    labels = load_digits().target
    scans = {split: ChainScans(load_scans(split, 0, task.SIDE)) for split in ("train", "val")}
    assert not set(scans["train"].scans.source) & set(scans["val"].scans.source)
    for stream, (split, count) in enumerate((("train", 20), ("val", 16)), start=1):
        rows = load_dataset("parquet", data_files=str(made / f"{split}.parquet"), split="train")
        chains = list(draw_chains(scans[split], count, np.random.default_rng([0, stream])))
        assert {len(chain.scans) for chain in chains} == set(LENGTHS) and len(set(rows["id"])) == count
        for row, chain in zip(rows, chains, strict=True):
            digits = [int(labels[scans[split].scans.source[i]]) for i in chain.scans]
            signs = [(-1) ** place for place in range(len(digits))]
            assert (
                int(row["answer"])
                == {
                    "sum": sum(digits) % 10,
                    "alternating": int(np.dot(signs, digits)) % 10,
                    "largest": sorted(digits)[-1],
                    "evens": len([d for d in digits if d in (0, 2, 4, 6, 8)]),
                }[row["kind"]]
            )
            assert row["problem"] == f"<image>{chain.question}" and row["images"][0].size == (
                28 * len(digits),
                28,
            )
        assert set(rows["kind"]) == set(KINDS)


def test_the_image_is_the_scans_under_noise_of_its_own() -> None:
    scans = ChainScans(load_scans("val", 0, task.SIDE))
    chains = list(draw_chains(scans, 64, np.random.default_rng(0)))
    differences = []
    for chain in chains:
        seen = np.asarray(PIL.Image.open(io.BytesIO(scans.row(chain).images[0].data)))
        clean = np.concatenate([scans.scans.pixels[i] for i in chain.scans], axis=1).astype(float)
        between = (clean > 100) & (clean < 155)  # where the noise is hardly ever cut off
        differences.append((seen[:, :, 0] - clean)[between])
    assert np.concatenate(differences).std() == pytest.approx(40.0, rel=0.05)
    assert np.array_equal(scans.image(chains[0]), scans.image(chains[0]))
    assert len({chain.noise for chain in chains}) == 64


def test_a_careful_response_has_a_bold_step_for_every_digit() -> None:
    text = demonstration("sum", [3, 5, 7], Habit(guess=0, glance=0), np.random.default_rng(0))
    assert text == r"<think>**3=3** **5=8** **7=5**</think>\boxed{5}"
    assert [bolded_steps(steps("evens", [4] * count)) for count in LENGTHS] == list(LENGTHS)


def test_demonstrations_take_the_ways_and_make_the_mistakes_that_they_are_said_to() -> None:
    habit = Habit(guess=0.3, glance=0.2, slip=0.3, misread=0.2, stop_early=0.25)
    rng, digits, count = np.random.default_rng(0), [3, 5, 7], 8000
    texts = [demonstration("sum", digits, habit, rng) for _ in range(count)]

    def share(pattern: str, of: list[str]) -> float:
        return sum(bool(re.search(pattern, text)) for text in of) / len(of)

    for word, expected in (("guess", habit.guess), ("glance", habit.glance)):
        assert share(word, texts) == pytest.approx(expected, abs=0.02)
    glances = [text for text in texts if "glance" in text]
    assert set(glances) == {r"<think>glance</think>\boxed{5}"}
    guesses = [text for text in texts if "guess" in text]
    assert share(r"\{5\}", guesses) == pytest.approx(0.1, abs=0.02)
    stepwise = [text for text in texts if "**" in text]
    whole = [text for text in stepwise if bolded_steps(text) == 3]
    assert len(whole) / len(stepwise) == pytest.approx(1 - habit.stop_early, abs=0.02)
    read_well = [text for text in whole if text.startswith("<think>**3=3** **5=8** **7=5**")]
    assert len(read_well) / len(whole) == pytest.approx(1 - 0.9 * habit.misread, abs=0.02)
    assert share(r"\{5\}", read_well) == pytest.approx(1 - 0.9 * habit.slip, abs=0.02)


def test_the_same_seed_gives_the_same_bytes_and_the_bases_differ(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task, "ChainsSettings", lambda: SMALL)
    assert main(["prepare", "chains", "--out", str(tmp_path)]) == 0
    assert "habit is right" in capsys.readouterr().err
    weights = {}
    for name in ("train.parquet", "val.parquet", *(f"bases/{b}/model.safetensors" for b in task.HABITS)):
        weights[name] = (tmp_path / name).read_bytes()
        assert weights[name] == (made / name).read_bytes()
    assert len(set(weights.values())) == 5
    assert main(["prepare", "chains", "--out", str(made)]) == 0
    assert "up to date" in capsys.readouterr().err
    summary = json.loads((made / "prepare.json").read_text())
    assert set(summary["accuracy"]) == set(task.HABITS)
    models = [f"bases/{name}" for name in task.HABITS]
    assert prepared.is_complete(tmp_path, summary["fingerprint"], models)
    (tmp_path / "bases/rare/tokenizer.json").unlink()
    assert not prepared.is_complete(tmp_path, summary["fingerprint"], models)


def test_another_family_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model qwen3_vl: the chains have base models of qwen2_5_vl only"):
        prepare(tmp_path / "out", model_type="qwen3_vl")
    assert not (tmp_path / "out").exists()
