"""Rewards that see the row: images, their sizes, the question, any column, read in the reward processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mssr.config import Config, ModelConfig
from mssr.config.data import DataConfig, RewardConfig
from mssr.data.dataset import PromptDataset
from mssr.errors import UserError
from mssr.rewards import RewardInput, RowAccess, ScoredBatch, Scorer
from mssr.trainer.collect import reward_inputs
from mssr.trainer.data import load_data
from mssr.types import Rollout
from tests.conftest import Workspace
from tests.unit.reward_lab import write

pytestmark = pytest.mark.unit

INPUTS = Path(__file__).parents[1] / "fixtures/inputs"
BOX = [10, 20, 110, 220]


@pytest.fixture
def access(tmp_path: Path, workspace: Workspace) -> RowAccess:
    """To two rows of training and, with the same ids, of validation, which has a column less."""
    Image.new("RGB", (1000, 500), "red").save(tmp_path / "red.png")
    Image.new("RGB", (56, 112), "blue").save(tmp_path / "blue.png")
    rows = [
        {
            "id": str(k),
            "problem": f"Where is {k}?",
            "images": [str(tmp_path / name) for name in names],
            "answer": "yes",
            "bbox": [*BOX, k],
            "solution": f"long {k}",
            "only_here": 1,
        }
        for k, names in enumerate((["red.png"], ["red.png", "blue.png"]))
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for row in rows:
        row["problem"], row["bbox"] = "Which one?", [0]
        del row["only_here"]
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(id_column="id", min_pixels=3136, max_pixels=50176)
    datasets = [
        PromptDataset(str(tmp_path / f"{name}.jsonl"), config, prefix)
        for name, prefix in (("train", ""), ("val", "val/"))
    ]
    return RowAccess.of(datasets, ModelConfig(path=str(workspace.path / "model")))


def score(
    folder: Path, access: RowAccess, body: str, ids: Sequence[str] = ("0", "1", "val/1"), **options: Any
) -> ScoredBatch:
    config = RewardConfig(name=write(folder, body), workers=1, options=options)
    with Scorer(config, 10, rows=access) as scorer:
        return scorer.score([RewardInput(f"to {i}", "yes", 2, i) for i in ids])


FUNCTIONS = {
    "row": """
def f(response, row, image_sizes, resized_image_sizes):
    count = 1 + int(response[-1])
    assert row["image_sizes"] == image_sizes == [(1000, 500), (56, 112)][:count], row
    assert row["resized_image_sizes"] == resized_image_sizes == [(308, 140), (56, 112)][:count], row
    assert row["id"] == response[-1] and row["bbox"] in ([10, 20, 110, 220, int(row["id"])], [0])
    return 0.5
""",
    "images": """
def f(response, images):
    assert images[0].mode == "RGB" and images[0].size == (1000, 500)
    assert [i.getpixel((9, 9)) for i in images] == [(255, 0, 0), (0, 0, 255)][:len(images)]
    return 0.5 if len(images) == 1 + int(response[-1]) else 0
""",
    "column": """
import sys
def f(response, answer, bbox, *, scale=1.0):
    assert "transformers" not in sys.modules
    expected = [0] if "val" in response else [10, 20, 110, 220, int(response[-1])]
    return scale / 2 if bbox == expected and answer == "yes" else 0
""",
    "prompt": """
def f(response, question, data_source, extra_info):
    assert extra_info == {} and data_source.endswith("val.jsonl" if "val" in response else "train.jsonl")
    return 0.5 if question == ("Which one?" if "val" in response else f"Where is {response[-1]}?") else 0
""",
    "batch": """
def f(responses, prompts, bboxs=None, bbox=None):
    assert bboxs is None and len(bbox) == len(prompts) == len(responses)
    rows = zip(responses, prompts, bbox, strict=True)
    return [0.5 if b[-1] == int(r[-1]) or p == "Which one?" else 0 for r, p, b in rows]
""",
    "trl": """
def f(prompts, completions, solution, **kwargs):
    assert set(kwargs) == {"answer", "bbox", "id", "problem"}, kwargs
    return [0.5 * (s == f"long {c[-1]}") for c, s in zip(completions, solution, strict=True)]
""",
    "two_truths": "def f(response, answer, solution):\n"
    "    return 0.5 * ((answer, solution[:4]) == ('yes', 'long'))",
    "one_truth": "def f(response, solution): return 0.5 * (solution == 'yes')",
    "async": "async def f(response, bbox): return 0.5 if bbox else 0",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_gets_what_its_parameters_name(tmp_path: Path, access: RowAccess, name: str) -> None:
    batch = score(tmp_path, access, FUNCTIONS[name])
    assert batch.scores.tolist() == [0.5] * 3 and batch.errors == 0


def test_data_that_nobody_asks_for_is_not_opened(tmp_path: Path) -> None:
    nowhere = RowAccess(((str(tmp_path / "nowhere.jsonl"), DataConfig(), ""),))
    assert score(tmp_path, nowhere, "def f(response, answer): return 0.5").errors == 0
    batch = score(tmp_path, nowhere, "def f(response, prompt): return 0.5")
    assert batch.errors == 3


def test_a_row_that_is_not_there_fails_its_response_only(tmp_path: Path, access: RowAccess) -> None:
    body = "def f(response, bbox): return 0.5"
    assert score(tmp_path, access, body, ids=("0", "7", "1")).scores.tolist() == [0.5, 0, 0.5]


def test_an_option_goes_before_a_column(tmp_path: Path, access: RowAccess) -> None:
    body = "def f(response, bbox, prompt): return 0.5 if (bbox, prompt) == (3, 'be kind') else 0"
    assert score(tmp_path, access, body, bbox=3, prompt="be kind").scores.tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["bboxes", "only_here"])
def test_a_name_that_not_every_table_has_is_refused(tmp_path: Path, access: RowAccess, name: str) -> None:
    message = f"f needs {name}; set reward.options.{name} or have a column of that name"
    with pytest.raises(UserError, match=message) as error:
        score(tmp_path, access, f"def f(response, {name}): return 0.5")
    assert "\n" not in str(error.value)


def test_conversations_stay_conversations_for_functions_of_trl(tmp_path: Path) -> None:
    rows = [{"id": str(k), "problem": f"Say {k}", "answer": str(k), "images": []} for k in range(2)]
    talk = [{"role": "user", "content": "Say it"}]
    body = """
def f(prompts, completions, **kwargs):
    return [0.5 * (p == [{"role": "user", "content": "Say it"}]
                   and c == [{"role": "assistant", "content": "to 0"}]) for p, c in zip(prompts, completions)]
"""
    found = []
    for problem in (talk, "Say it"):
        path = tmp_path / f"{type(problem).__name__}.jsonl"
        path.write_text("\n".join(json.dumps(row | {"problem": problem}) for row in rows))
        dataset = PromptDataset(str(path), DataConfig(id_column="id"))
        found.append(score(tmp_path, RowAccess.of([dataset], ModelConfig()), body, ids=("0",)).scores.item())
    assert found == [0.5, 0]


def test_functions_of_a_user_get_answers_as_the_data_has_them_and_rules_text(tmp_path: Path) -> None:
    answers = [4, "<answer>four</answer>", True]
    rows = [{"id": str(k), "problem": "How many?", "answer": a} for k, a in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = PromptDataset(str(tmp_path / "rows.jsonl"), DataConfig(id_column="id"))
    none = np.zeros(2, np.float32)
    rollouts = [
        Rollout(i, 0, np.zeros(3, np.int32), np.zeros(2, np.int32), none, "stop", 0, "So") for i in "210"
    ]
    found = [reward_inputs(dataset, rollouts, takes_cells=takes_cells) for takes_cells in (True, False)]
    assert found[0] == [RewardInput("So", a, 2, i) for a, i in zip([True, "four", 4], "210", strict=True)]
    assert [item.answer for item in found[1]] == ["True", "four", "4"]
    own = write(tmp_path, "def f(response, answer): return 1.0")
    for name, takes_cells in (("exact_match", False), (own, True)):
        with Scorer(RewardConfig(name=name, workers=1), 10) as scorer:
            assert scorer.takes_cells == takes_cells


@pytest.mark.parametrize("answer", [4, [10, 20, 110, 220], {"box": [1, 2]}])
def test_what_training_opens_knows_the_columns_and_takes_any_truth(
    tmp_path: Path, workspace: Workspace, answer: Any
) -> None:
    """As `mssr data` does; a named rule would have to compare text."""
    rows = [{"problem": f"Where is {k}?", "answer": answer} for k in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text("def f(response, answer): ...\ndef g(response, bbox): ...\n")
    config = Config(model=ModelConfig(path=str(workspace.path / "model")))
    config.data.train, config.trainer.run_dir = str(tmp_path / "rows.jsonl"), str(tmp_path)
    config.reward.name = f"{tmp_path}/reward.py:f"
    dataset = load_data(config).train.dataset
    assert dataset.answers(dataset.ids, as_cells=True) == [answer] * 2
    config.reward.name = f"{tmp_path}/reward.py:g"
    with pytest.raises(UserError, match=r"g needs bbox; set reward\.options\.bbox or have a column"):
        load_data(config)


OF_OTHERS = {
    "verl": """
def f(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "bars" and extra_info["question"].endswith("drawn?"), (data_source, extra_info)
    return {"score": float(solution_str == ground_truth == extra_info["answer"]), "pred": solution_str}
""",
    "trl": """
def f(prompts, completions, solution, image, **kwargs):
    assert all(p[0]["role"] == "user" and i.size == (112, 56) for p, i in zip(prompts, image, strict=True))
    assert kwargs == {}
    return [float(s == f"${c[0]['content']}$") for c, s in zip(completions, solution, strict=True)]
""",
}


@pytest.mark.parametrize("name", OF_OTHERS)
def test_functions_and_tables_of_others_fit_together(tmp_path: Path, name: str) -> None:
    dataset = PromptDataset(str(INPUTS / f"{name}.parquet"), DataConfig())
    truths = dataset.answers(dataset.ids, as_cells=True)
    config = RewardConfig(name=write(tmp_path, OF_OTHERS[name]), workers=1)
    with Scorer(config, 10, rows=RowAccess.of([dataset], ModelConfig())) as scorer:
        items = [RewardInput(str(t).strip("$"), t, 1, i) for i, t in zip(dataset.ids, truths, strict=True)]
        items.append(RewardInput("wrong", truths[0], 1, dataset.ids[0]))
        batch = scorer.score(items)
    assert batch.errors == 0 and batch.parts == {} and batch.scores.tolist() == [1] * len(truths) + [0]
