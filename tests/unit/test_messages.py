"""Message lists become turns: roles, parts and images in order; what is not understood is a bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mssr.config.data import DataConfig
from mssr.data.dataset import PromptDataset
from mssr.data.encoder import PromptEncoder
from mssr.data.messages import Conversation, is_messages, read_messages
from mssr.errors import UserError
from tests.conftest import Workspace
from tests.unit import data_forms as forms

pytestmark = pytest.mark.unit
PICTURE = {"bytes": forms.encoded("PNG"), "path": None}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


SEVERAL = [
    {"role": "system", "content": "Be brief."},
    user([{"type": "image"}, {"type": "text", "text": "What is it?"}]),
    {"role": "assistant", "content": "A cup."},
    user(["And ", {"type": "image"}, {"type": "text", "text": " this?"}]),
]
HISTORY = (("system", "Be brief."), ("user", "<image>What is it?"), ("assistant", "A cup."))


def test_parts_and_turns_in_order() -> None:
    asked = Conversation("And <image> this?", HISTORY)
    assert read_messages(SEVERAL, "m") == asked
    answered = [*SEVERAL, {"role": "assistant", "content": [{"type": "text", "text": "A jug."}]}]
    assert read_messages(answered, "m") == Conversation(asked.question, HISTORY, "A jug.")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [{"from": names[r], "value": t} for r, t in (*HISTORY, ("user", asked.question))]
    assert read_messages(json.dumps(sharegpt), "m") == asked


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "input_image", "image_url": "a.png"},
        {"type": "image", "text": None, "path": "a.png"},
        {"image": "a.png"},
    ],
)
def test_images_inside_parts(part: dict[str, Any]) -> None:
    read = read_messages([user([{"type": "text", "text": "See "}, part])], "m")
    assert read == Conversation("See <image>", images=("a.png",))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([user([{"type": "video", "video": "a.mp4"}])], "type 'video'"),
        ([user([3])], "type 'int'"),
        ([{"role": "assistant", "content": "x"}], "no turn of the user"),
        ([user("a"), *[{"role": "assistant", "content": "x"}] * 2], "assistant, assistant"),
        ([user("a"), {"role": "system", "content": "x"}], "but system"),
    ],
)
def test_what_is_not_understood(messages: list[Any], words: str) -> None:
    assert is_messages(messages)
    with pytest.raises(ValueError, match=words) as error:
        read_messages(messages, "m")
    assert "column m" in str(error.value)


def test_what_is_no_message_list() -> None:
    for cell in ("[a] is a text", '["a"]', [], ["a"], [{"a": 1}], [PICTURE], None, 3, [{"role": "user"}]):
        assert not is_messages(cell), cell


@pytest.fixture
def rows(tmp_path: Path):
    def read(data: list[dict[str, Any]], **config: Any) -> tuple[list[Any], tuple[str, ...]]:
        path = forms.write_jsonl(tmp_path / "data.jsonl", data)
        settings = {"cache_dir": str(tmp_path / "cache"), "image_dir": str(tmp_path)}
        dataset = PromptDataset(str(path), DataConfig(**(settings | config)))
        dataset.check()
        assert [bad.reason for bad in dataset.bad_rows] == []
        return [dataset.row(i) for i in dataset.ids], dataset.parts[0].columns.notes

    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(forms.encoded("PNG", forms.picture(seed=ord(name[0]))))
    return read


def test_columns_are_found_and_told(rows) -> None:
    answer = {"role": "assistant", "content": "4"}
    found, (note,) = rows([{"messages": [user("<image>q"), answer], "image": "a.png", "id": 3}])
    assert (found[0].problem, found[0].answer, len(found[0].images)) == ("<image>q", "4", 1)
    assert "column messages holds messages" in note and "the user's last turn" in note
    assert "the truth is the assistant's turn" in note and "those of column image" in note
    found, (note,) = rows([{"prompt": [user("q")], "reward_model": {"ground_truth": [3]}, "answer_of": 1}])
    assert found[0].answer == "3" and "the truth is column reward_model.ground_truth" in note
    found, _ = rows([{"prompt": [user("q")], "reward_model": '{"ground_truth": 7}'}])
    assert found[0].answer == "7"
    # A name that the user gave counts, and of what is there by the default names nothing is guessed.
    data = [{"prompt": [user("p"), answer], "problem": "q", "answer": "7", "extra": {"a": {"b": 1.0}}}]
    found, notes = rows(data)
    assert (found[0].problem, found[0].answer, notes) == ("q", "7", ())
    found, (note,) = rows(data, problem_column="prompt", answer_column="extra.a.b")
    assert (found[0].problem, found[0].answer) == ("p", "1") and "extra.a.b" in note
    found, _ = rows(data, problem_column="prompt", answer_column="prompt")
    assert (found[0].problem, found[0].answer) == ("p", "4")
    with pytest.raises(UserError, match="no column 'truth'"):
        rows(data, answer_column="truth")
    with pytest.raises(UserError, match=r"no column 'problem'.*its columns are 'prompt', 'answer'"):
        rows([{"prompt": "text, and no messages", "answer": "1"}])


def test_images_of_parts_and_columns(rows, tmp_path: Path) -> None:
    inside = user([{"type": "image", "image": f"file://{tmp_path}/b.png"}, "q"])
    found, (note,) = rows([{"messages": [inside], "answer": "1"}])
    assert [i.path for i in found[0].images] == [str(tmp_path / "b.png")] and "those of their parts" in note
    with pytest.raises(AssertionError, match="images both within messages and in column image"):
        rows([{"messages": [inside], "answer": "1", "image": "a.png"}])


def test_turns_reach_the_model(rows, workspace: Workspace) -> None:
    """Images without marks stand before the user's first turn; data.system_prompt replaces theirs."""
    from mssr.models.loading import load_processor
    from mssr.runs.config import load_config

    config = load_config(workspace.config)
    encoder = PromptEncoder(load_processor(config.model), config.data)
    (row,), _ = rows([{"messages": SEVERAL, "answer": "1", "images": ["a.png", "b.png"]}])
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    text = encoder.chat_text(row)
    order = ["system\nBe brief.", f"user\n{image}What is it?", "assistant\nA cup.", f"And {image} this?"]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    sizes = [source.size() for source in row.images]
    assert len(encoder.encode(row).token_ids) == encoder.length(row, sizes)
    assert encoder.chat_text(row.without_images()) == text.replace(image, "")
    (row,), _ = rows([{"messages": [user("one"), {"role": "assistant", "content": "a"}, user("two")],
                       "answer": "1", "images": ["a.png"]}])  # fmt: skip
    assert f"user\n{image}one" in encoder.chat_text(row)
    config.data.system_prompt = "You are exact."
    other = PromptEncoder(load_processor(config.model), config.data)
    (row,), _ = rows([{"messages": SEVERAL, "answer": "1", "images": ["a.png", "b.png"]}])
    assert "You are exact." in other.chat_text(row) and "Be brief." not in other.chat_text(row)


@pytest.mark.parametrize(
    ("problem", "images", "expected"),
    [
        ("What is <image>?", [], "What is <image>?"),
        ("<image>What is <image>?", ["a.png"], "{}<image>What is <image>?"),
        ("And <video>?", ["a.png", "b.png"], "{}{}And <video>?"),
        ([user([{"type": "image"}, "Is it <image>? ", {"type": "image"}])], ["a.png", "b.png"],
         "{}Is it <image>? {}"),
        ([user([{"type": "image", "image": "a.png"}, "Is it <image>?"])], [], "{}Is it <image>?"),
        ([user(["<image>?"]), {"role": "assistant", "content": "A tag."}, user("Here?")], ["a.png"],
         "{}<image>?<|im_end|>\n<|im_start|>assistant\nA tag.<|im_end|>\n<|im_start|>user\nHere?"),
        ([user([{"type": "image"}, "What?"])], ["a.png"], "{}What?"),
    ],
)  # fmt: skip
def test_marks_that_are_text(
    rows, workspace: Workspace, problem: Any, images: list[str], expected: str
) -> None:
    """With data.image_marks=literal <image> reaches the model as it is, and images are where parts say, else
    before the question; also by way of the file that an evaluation writes, and without the images."""
    from mssr.data.rows import problem_cell, read_prompt
    from mssr.models.loading import load_processor
    from mssr.runs.config import load_config

    data = [{"problem": problem, "answer": "1", "images": images}]
    (row,), notes = rows(data, image_marks="literal")
    config = load_config(workspace.config)
    encoder = PromptEncoder(load_processor(config.model), config.data)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    asked = f"user\n{expected.format(*[image] * len(row.images))}<|im_end|>"
    assert asked in encoder.chat_text(row)
    assert f"user\n{expected.replace('{}', '')}<|im_end|>" in encoder.chat_text(row.without_images())
    sizes = [source.size() for source in row.images]
    assert len(encoder.encode(row).token_ids) == encoder.length(row, sizes)
    again = read_prompt({"problem": problem_cell(row)}, DataConfig(image_marks="literal"))
    assert (*again.turns, again.mark) == (*row.turns, row.mark)
    assert isinstance(problem, list) or row.question == problem
    assert any("it stays text" in note for note in notes) == bool(images and "<image>" in str(problem))
    if isinstance(problem, str):
        with pytest.raises(AssertionError, match=r"marks but \d images; data.image_marks=literal|<video>"):
            rows(data)
