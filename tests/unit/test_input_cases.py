"""What people bring: read as they mean it, or refused in one line, by `mssr data` and training alike."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mssr.cli import main
from mssr.config import Config
from mssr.data.prompt_source import PromptSource
from tests.conftest import Workspace

pytestmark = pytest.mark.unit
FIXTURES = Path(__file__).parents[1] / "fixtures" / "inputs"
SOME_BAD = "data.max_bad_fraction=0.2"


class FirstStep(BaseException):
    """Training has come as far as starting its workers."""


Seen = dict[str, Any]
Both = Callable[..., tuple[Seen | str, str]]


@pytest.fixture
def both(
    workspace: Workspace, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Both:
    """Run `mssr data` and `mssr train` up to its first step, every prompt encoded as a worker does.

    Returns what both say: prompts by id and their texts, or the line that refuses; and what was printed.
    """
    seen: Seen = {}

    def workers(config: Config, *_: object) -> None:
        source = PromptSource(config)
        ids = [i for i in source._datasets[0].ids if i in kept()]
        prompts = zip(ids, source.encode(ids), map(source.row, ids), strict=True)
        seen.update({i: (source.encoder.chat_text(row), prompt, row) for i, prompt, row in prompts})
        raise FirstStep

    loaded: list[Any] = []

    def kept() -> set[str]:
        return set(loaded[-1].train.dataset.ids)

    from mssr.trainer import session

    load_data = session.load_data
    monkeypatch.setattr(session, "load_data", lambda config: loaded.append(load_data(config)) or loaded[-1])
    monkeypatch.setattr(session, "launch", workers)
    monkeypatch.setattr(session, "Scorer", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setenv("MSSR_CACHE", str(tmp_path / "cache"))

    def run(train: str | Path, *overrides: str) -> tuple[Seen | str, str]:
        seen.clear()
        path = train if "://" in str(train) else FIXTURES / train
        arguments = [
            *(str(workspace.config), f"data.train={path}", "data.val=null", "data.id_column=null"),
            *(f"data.image_dir={FIXTURES}", "reward.name=math", "rollout.rollouts_per_step=2"),
            *("actor.num_ranks=1", "actor.updates_per_step=1", *overrides),
        ]
        code = main(["data", *arguments, f"trainer.run_dir={tmp_path / 'data'}"])
        shown = capfd.readouterr()
        try:
            trained = main(["train", *arguments, f"trainer.run_dir={tmp_path / 'train'}"])
        except FirstStep:
            trained = 0
        trained_shown = capfd.readouterr()
        shutil.rmtree(tmp_path / "train", ignore_errors=True)
        assert code == trained, (shown, trained_shown)
        if code == 2:
            for text in (shown.err, trained_shown.err):
                assert text.startswith("mssr: error: ") and text.count("\n") == 1, text
            same = trained_shown.err.replace(f"{tmp_path / 'train'}", f"{tmp_path / 'data'}")
            assert shown.err == same
            return shown.err, shown.out
        assert code == 0, (shown, trained_shown)
        return dict(seen), shown.out

    return run


TEMPLATE = "data.chat_template="
REFUSED = {
    "no images": (
        "blind.parquet",
        [],
        "no column 'images' (data.images_column), but there is a column 'image'",
    ),
    "no images in a folder": ("blind_imagefolder", [], "a column 'image' with images"),
    "half of a surrogate pair": (
        "surrogate.jsonl",
        [],
        "surrogate.jsonl row 20: column problem is no valid text",
    ),
    "a template for text": (
        "good.jsonl",
        [f"{TEMPLATE}{FIXTURES}/tpl_text.jinja"],
        "data.chat_template cannot",
    ),
    "a template without images": (
        "good.jsonl",
        [f"{TEMPLATE}{FIXTURES}/tpl_list.jinja"],
        "1 image, 0 placeholders",
    ),
    "a gap": ("nullable.parquet", [], "nullable.parquet row 1: column answer is empty"),
    "boxes for a rule": (
        "boxans.jsonl",
        [],
        "column answer is a list or dict, not text for reward.name=math",
    ),
    "a column twice": ("dup.csv", [], "dup.csv has 2 columns 'answer'"),
    "an address": ("https://x.org/a.parquet", [], "data https://x.org/a.parquet is an address"),
    "another name": (
        "good.jsonl",
        ["data.answer_column=truth"],
        "its columns are 'problem', 'images', 'answer'",
    ),
    "epochs and steps": ("good.jsonl", ["trainer.epochs=2", "trainer.steps=3"], "both say how long to train"),
    "an epoch of no step": (
        "good.jsonl",
        ["trainer.epochs=2", "rollout.rollouts_per_step=64"],
        "fewer than the 64",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_alike(both: Both, case: str) -> None:
    train, overrides, words = REFUSED[case]
    said, _ = both(train, *overrides)
    assert isinstance(said, str) and words in said


TO_USER = "<|im_end|>\n<|im_start|>user\n"
BARS = "<|vision_end|>How many bars are drawn?"
READ = {
    "good": ("good.jsonl", [], 20, "<|vision_end|>How many 0?", "4"),
    "images named": (
        "blind.parquet",
        ["data.images_column=image"],
        20,
        "<|vision_end|>How many items 0?",
        "4",
    ),
    "images left out": ("blind.parquet", ["data.images_column=null"], 20, "user\nHow many items 0?", "4"),
    "a folder": ("blind_imagefolder", ["data.images_column=image"], 2, "<|vision_end|>How many?", "4"),
    "a strip": ("ratio.jsonl", [], 21, "<|vision_end|>How many 0?", "4"),
    "but for one": ("surrogate.jsonl", [SOME_BAD], 20, "<|vision_end|>How many 0?", "4"),
    "a gap allowed": ("nullable.parquet", ["data.max_bad_fraction=0.5"], 2, "user\na?", "3"),
    "integers": ("intans.jsonl", [], 20, "<|vision_end|>How many 0?", "4"),
    "verl": ("verl.parquet", [], 1, f"system\nBe brief.{TO_USER}<|vision_start|><|image_pad|>{BARS}", "4"),
    "verl by names": (
        "verl.parquet",
        ["data.problem_column=prompt", "data.answer_column=extra_info.answer"],
        1,
        BARS,
        "4",
    ),
    "swift": ("swift.jsonl", [], 1, BARS, "4"),
    "trl": ("trl.parquet", [], 1, "<|vision_end|>How many?", "$4$"),
    "vlm-r1": ("vlmr1.jsonl", [], 1, "<|vision_end|>\nHow many bars?", "4"),
    "an object around": ("wrapped.json", [], 3, BARS, "0"),
    "columns": ("columns.json", [], 3, BARS, "1"),
    "an array": ("array.jsonl", [], 3, BARS, "0"),
    "over several lines": ("pretty.jsonl", [], 3, BARS, "0"),
    "spaces": ("spaces.csv", [], 1, "user\n2+2?", "4"),
    "images in structs": ("hf_struct.parquet", [], 1, BARS, "4"),
    "a template that thinks": (
        "good.jsonl",
        [f"{TEMPLATE}{FIXTURES}/tpl_think.jinja"],
        20,
        "assistant\n<think>\n",
        "4",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_read_alike(both: Both, case: str) -> None:
    train, overrides, count, words, answer = READ[case]
    seen, _ = both(train, "rollout.rollouts_per_step=1", *overrides)
    assert isinstance(seen, dict) and len(seen) == count, seen
    text, prompt, row = next(iter(seen.values()))
    assert words in text and row.answer == answer
    assert (prompt.image_grid_thw is not None) == ("<|image_pad|>" in text) == bool(row.images)
