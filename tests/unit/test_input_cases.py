"""What people bring: read as they mean it, or refused in one line, by `mssr data` and training alike."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mssr.config import Config
from mssr.config.data import DataConfig
from mssr.data.prompt_source import PromptSource
from mssr.data.sampler import EpochSampler
from mssr.errors import UserError
from mssr.evaluation.own import Own
from mssr.evaluation.prompts import Question
from mssr.evaluation.responses import Response
from mssr.evaluation.verdicts import VerdictBook
from mssr.rewards import Scorer
from mssr.runs.config import load_config
from mssr.tools import errors
from mssr.tools.cli import main
from mssr.trainer.collect import RolloutCollector
from mssr.trainer.data import load_data
from mssr.types import Rollout, RolloutRequest, SamplingParams
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
                assert errors.find(text.strip()), f"mssr explain does not know {text}"
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
    "nothing left": (
        "surrogate.jsonl",
        ["data.max_bad_fraction=1", "data.max_prompt_length=5"],
        "no prompt left of 21 rows, 1 are bad (the first: ",
    ),
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


def test_images_by_paths_of_another_machine(both: Both, tmp_path: Path) -> None:
    """What is not there, or is HEIC, is a bad row; the others are read."""
    said, _ = both("utf16.jsonl")
    assert (
        isinstance(said, str) and "utf16.jsonl row 0: file /tmp/field/data/img/a.png does not exist" in said
    )
    text = (FIXTURES / "utf16.jsonl").read_text("utf-16").replace("/tmp/field/data/img", str(FIXTURES))
    (tmp_path / "utf16.jsonl").write_text(text, "utf-16")
    seen, _ = both(tmp_path / "utf16.jsonl")
    assert isinstance(seen, dict) and [row.answer for _, _, row in seen.values()] == ["0", "1", "2"]
    text = (FIXTURES / "image_forms.jsonl").read_text().replace("/absolute", str(FIXTURES))
    (tmp_path / "forms.jsonl").write_text(text)
    said, _ = both(tmp_path / "forms.jsonl")
    assert isinstance(said, str) and "forms.jsonl row 4: image 0 cannot be read (it is HEIC" in said
    seen, printed = both(tmp_path / "forms.jsonl", "data.max_bad_fraction=0.2")
    assert isinstance(seen, dict) and all(len(row.images) == 1 for _, _, row in seen.values())
    assert "4 prompts (1 bad dropped)" in printed and "pip install pillow-heif" in printed


class Told:
    """A cluster that answers every prompt with one text."""

    ranks_idle_in_rollout = False

    def __init__(self, text: str) -> None:
        self.text = text

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, on_finished: Any, stoppable: bool
    ) -> list[Rollout]:
        tokens, values = np.arange(3, dtype=np.int32), np.zeros(3, np.float32)
        rollouts = [Rollout(r.prompt_id, 0, tokens, tokens, values, "stop", 0, self.text) for r in requests]
        for place, rollout in enumerate(rollouts):
            on_finished(place, rollout)
        return rollouts


@pytest.mark.parametrize(("template", "right"), [("tpl_think.jinja", 1.0), (None, 0.0)])
def test_the_tag_of_the_prompt_counts_as_the_responses(
    workspace: Workspace, tmp_path: Path, template: str | None, right: float
) -> None:
    """In training, validation and evaluation; functions of a user get the response as it is."""
    good, chat = FIXTURES / "good.jsonl", f"{FIXTURES / template}" if template else "null"
    overrides = [
        f"data.train={good}",
        f"data.val={good}",
        f"data.image_dir={FIXTURES}",
        "data.id_column=null",
    ]
    overrides += [f"data.chat_template={chat}", "rollout.rollouts_per_step=4", f"trainer.run_dir={tmp_path}"]
    config = load_config(workspace.config, [*overrides, "reward.name=exact_match", "reward.workers=1"])
    data = load_data(config)
    text = "so many</think>\\boxed{4}"
    sampler = EpochSampler(data.train.dataset.ids, 0)
    with Scorer(config.reward, 12) as scorer:
        collector = RolloutCollector(config, data.train.dataset, sampler, scorer, Told(text))  # type: ignore[arg-type]
        rollouts, rewards, _ = collector.generate(collector.requests(collector.draw(), 0, 1))
        assert rewards.scores.tolist() == [right] * 4 and {r.text for r in rollouts} == {text}
        (prompts,) = data.val
        pairs = zip(rollouts, prompts.ids[:4], strict=True)
        asked = [replace(rollout, prompt_id=i) for rollout, i in pairs]
        assert prompts.score(asked, scorer)[0].tolist() == [right] * 4
    own = Own(str(good), reward=config.reward, config=config.data)
    (item, *_) = own.load()
    with VerdictBook(config, [Question(own, item, True)], True, data.encoder.response_prefix) as book:
        book.add([Response(own.name, item.id, 0, text, 3, "stop")])
    assert book.of(Question(own, item, True), 0)[1].correct == bool(right)
    config = load_config(workspace.config, overrides)
    assert load_data(config).train.dataset.response_prefix == ""


def test_boxes_for_a_function_of_the_user(workspace: Workspace, tmp_path: Path) -> None:
    overrides = [f"data.train={FIXTURES / 'boxans.jsonl'}", f"data.image_dir={FIXTURES}", "data.val=null"]
    config = load_config(workspace.config, [*overrides, "data.id_column=null", f"trainer.run_dir={tmp_path}"])
    dataset = load_data(config).train.dataset
    assert dataset.answers(dataset.ids[:1], as_cells=True) == [[10, 20, 110, 220]]
    assert dataset.row(dataset.ids[0]).answer == "[10, 20, 110, 220]"


def test_epochs_are_steps_once_prompts_are_counted(workspace: Workspace, tmp_path: Path) -> None:
    overrides = ["trainer.epochs=3", "rollout.rollouts_per_step=6", f"trainer.run_dir={tmp_path}"]
    overrides += ["data.max_prompt_length=60", "actor.updates_per_step=1"]
    config = load_config(workspace.config, overrides)
    data = load_data(config)
    assert len(data.train.dataset) == 8 and data.train.overlong == 0
    trained = data.config
    assert (trained.trainer.steps, trained.trainer.epochs, config.trainer.steps) == (3, 3, 0)


@pytest.mark.parametrize("steps", [4, 5])
def test_a_resume_with_nothing_to_do_says_so(
    workspace: Workspace,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    from mssr.trainer import session

    checkpoint = tmp_path / "step-000005"
    monkeypatch.setattr(session.CheckpointStore, "find", lambda *_: checkpoint)
    monkeypatch.setattr(session, "check_checkpoint", lambda *_: ())
    monkeypatch.setattr(session, "step_of", lambda _: 5)
    arguments = [str(workspace.config), f"trainer.run_dir={tmp_path / 'run'}", f"trainer.steps={steps}"]
    assert main(["train", *arguments]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[1:] == [f"mssr: nothing to do: {checkpoint} is of step 5, and trainer.steps={steps}"]


def test_an_evaluation_without_the_id_column_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "q", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"no column 'id' \(data\.id_column; null takes a hash"):
        Own(str(path), config=DataConfig(id_column="id")).load()
    assert len(Own(str(path), config=DataConfig(id_column=None)).load()) == 1


def test_an_evaluation_is_not_blind_either(tmp_path: Path) -> None:
    config = DataConfig(image_dir=str(FIXTURES))
    with pytest.raises(UserError, match="a column 'image' with images"):
        Own(str(FIXTURES / "blind.parquet"), config=config).load()
    with pytest.raises(UserError, match="row 0: column answer is a list or dict, not text"):
        Own(str(FIXTURES / "boxans.jsonl"), config=config).load()
    (item, *_) = Own(str(FIXTURES / "verl.parquet"), config=config).load()
    assert (item.history, item.answer, len(item.images)) == ((("system", "Be brief."),), "4", 1)


def test_written_weights_may_be_read_by_others(workspace: Workspace) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (workspace.path / "model").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes
