"""Several validation sets: each with its own frequency, sampling and scoring."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

from mssr.config import Config
from mssr.data.encoder import PromptEncoder
from mssr.data.prompt_source import PromptSource
from mssr.data.validation_sets import validation_sets
from mssr.errors import UserError
from mssr.models.loading import load_processor
from mssr.rewards import Scorer
from mssr.runs.config import load_config
from mssr.trainer.validation import Validation, describe, load_validation
from mssr.types import Rollout, RolloutRequest, SamplingParams
from tests.conftest import Workspace

pytestmark = pytest.mark.unit


class Answers:
    """A cluster that answers as it is told, and remembers what it was asked."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.texts = texts
        self.requests: list[RolloutRequest] = []
        self.params: list[SamplingParams] = []

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Rollout]:
        self.requests += requests
        self.params.append(params)
        tokens = np.arange(3, dtype=np.int32)
        values = np.zeros(3, np.float32)
        texts = [self.texts.get(r.prompt_id, "a") for r in requests]
        return [
            Rollout(r.prompt_id, r.sample_index, tokens, tokens, values, "stop", 0, text)
            for r, text in zip(requests, texts, strict=True)
        ]


@pytest.fixture
def mmk12(tmp_path: Path) -> Path:
    """Three items in the public columns, the last one too long to be asked."""
    import datasets

    picture = Image.new("RGB", (56, 56))
    rows = [
        {"id": str(k), "question": q, "answer": a, "subject": "math", "image": picture}
        for k, (q, a) in enumerate(
            [("Which? (A) 1 (B) 2", "A"), ("Which? (A) 1 (B) 2", "B"), ("long " * 500, "A")]
        )
    ]
    features = datasets.Features(
        {k: datasets.Value("string") for k in ("id", "question", "answer", "subject")}
        | {"image": datasets.Image()}
    )
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "data/mmk12.parquet"))
    return tmp_path / "data"


@pytest.fixture
def config(workspace: Workspace, tmp_path: Path, mmk12: Path) -> Config:
    base = load_config(workspace.config, [f"trainer.run_dir={tmp_path / 'run'}", "trainer.val_every=10"])
    (tmp_path / "run").mkdir()
    val = {
        "plain": str(workspace.path / "val.parquet"),
        "sampled": {"path": str(workspace.path / "train.parquet"), "every": 4, "n": 3, "limit": 5},
        "bench": {"benchmark": "mmk12", "data_dir": str(mmk12), "every": 20},
    }
    return replace(base, data=replace(base.data, val=val))


@pytest.fixture
def validation(config: Config) -> Iterator[tuple[Validation, Answers]]:
    encoder = PromptEncoder(load_processor(config.model), config.data)
    sets = load_validation(config, encoder, config.run_dir / "bad_rows.jsonl")
    cluster = Answers({})
    with Scorer(config.reward, config.rollout.max_response_length) as scorer:
        yield Validation(config, sets, scorer, cluster), cluster  # type: ignore[arg-type]


def test_each_set_is_due_by_its_own_frequency(validation: tuple[Validation, Answers]) -> None:
    due = {step: [p.set.name for p in validation[0].due(step)] for step in (0, 4, 5, 10, 20)}
    assert due[0] == due[20] == ["plain", "sampled", "bench"]
    assert due[4] == ["sampled"] and due[5] == [] and due[10] == ["plain"]
    last = validation[0].config.trainer.steps
    assert [p.set.name for p in validation[0].due(last)] == ["plain", "sampled", "bench"]
    assert describe(validation[0].sets) == "plain: 4 prompts; sampled: 8 prompts; bench: 3 items"


def test_each_set_is_sampled_by_its_own_settings(
    validation: tuple[Validation, Answers], config: Config
) -> None:
    asked, cluster = validation
    for prompts in asked.due(0):
        asked.ask(prompts)
    assert [p.greedy for p in cluster.params] == [True, False, True]
    by_set = {
        name: [r for r in cluster.requests if r.prompt_id.startswith(f"val/{name}/")]
        for name in ("plain", "sampled", "bench")
    }
    assert [len(v) for v in by_set.values()] == [4, 15, 2]
    seeds = [r.seed for r in by_set["sampled"]]
    assert len(set(seeds)) == 15 and {r.seed for r in by_set["plain"]} == {0}
    cluster.requests.clear()
    asked.ask(asked.due(4)[0])
    assert [r.seed for r in cluster.requests] == seeds  # two validations differ by the policy alone
    # What the engines are told to answer, they can read.
    source = PromptSource(config)
    assert "Which? (A) 1 (B) 2" in source.encoder.chat_text(source.row(by_set["bench"][0].prompt_id))
    assert all(
        len(p.token_ids) for p in source.get([r.prompt_id for r in by_set["plain"] + by_set["sampled"]])
    )


def test_accuracy_by_set_and_every_item_of_a_benchmark_counts(
    validation: tuple[Validation, Answers],
) -> None:
    asked, cluster = validation
    plain, sampled, bench = asked.due(0)
    ids = bench.ids
    cluster.texts = {ids[0]: "<think>x</think>\\boxed{A}", ids[1]: "<think>x</think>\\boxed{A}"}
    metrics = asked.ask(bench)[2]
    assert metrics["val/bench/accuracy"] == pytest.approx(1 / 3)  # the long one was not asked, and is wrong
    assert "val/accuracy" not in metrics
    # The reward of the tests is right where the sum of a text's characters divides by 3.
    cluster.texts = {i: "c" if k % 2 else "a" for k, i in enumerate(plain.ids)}
    metrics = asked.ask(plain)[2]
    assert metrics["val/plain/accuracy"] == metrics["val/accuracy"] == 0.5
    cluster.texts = {i: "c" if k == 0 else "a" for k, i in enumerate(sampled.ids)}
    metrics = asked.ask(sampled)[2]
    assert metrics["val/sampled/accuracy"] == pytest.approx(1 / 5)
    assert metrics["val/sampled/pass_at_3"] == pytest.approx(1 / 5)


def test_pass_at_n_counts_right_answers_whatever_the_score_is(config: Config) -> None:
    """With weights below 1, a penalty or a share for the format a right answer scores less than 1."""
    accuracy = np.array([1, 0, 0, 0, np.nan, 1], np.float32)
    prompts = MagicMock(ids=["a", "b", "c"], set=MagicMock(n=2, greedy=False, temperature=1.0, key="val/x"))
    prompts.score.side_effect = lambda rollouts, _: (accuracy * 0.7, accuracy, {"accuracy": 0.4})
    asked = Validation(config, [MagicMock(), prompts], MagicMock(), Answers({}))  # type: ignore[arg-type]
    assert asked.ask(prompts)[2]["val/x/pass_at_2"] == pytest.approx(2 / 3)
    accuracy[:] = np.nan
    assert np.isnan(asked.ask(prompts)[2]["val/x/pass_at_2"])


def test_several_sources_of_the_only_set_have_their_own_accuracy(
    config: Config, workspace: Workspace
) -> None:
    sources = [str(workspace.path / "train.parquet"), str(workspace.path / "val.parquet")]
    config = replace(config, data=replace(config.data, val=sources))
    encoder = PromptEncoder(load_processor(config.model), config.data)
    sets = load_validation(config, encoder, config.run_dir / "bad_rows.jsonl")
    assert [s.set.key for s in sets] == ["val"]
    cluster = Answers({i: "c" for i in sets[0].ids[:8]})  # all of the first source
    with Scorer(config.reward, config.rollout.max_response_length) as scorer:
        metrics = Validation(config, sets, scorer, cluster).ask(sets[0])[2]  # type: ignore[arg-type]
    by_source = [v for k, v in sorted(metrics.items()) if k.endswith("/accuracy") and k.count("/") == 2]
    assert metrics["val/accuracy"] == pytest.approx(8 / 12)
    assert by_source == [1.0, 0.0]  # train-..., val-...


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"pth": "x.parquet"}}, r"data\.val\.a: unknown key 'pth': one of path, benchmark"),
        ({"a": {"every": 3}}, r"data\.val\.a: give either path"),
        ({"a": {"path": "x.parquet", "benchmark": "mmk12"}}, "give either path"),
        ({"a": {"path": "x.parquet", "n": 0}}, r"data\.val\.a\.n=0 must be an integer"),
        ({"a": {"path": "x.parquet", "every": 2.5}}, r"data\.val\.a\.every=2\.5"),
        ({"a": {"path": "x.parquet", "n": 2, "temperature": 0}}, "same response 2 times"),
        ({"a": {"path": "x.parquet", "temperature": -1}}, "must not be negative"),
        ({"a/b": "x.parquet"}, "the name of a set"),
        ({"a": {"path": "x.parquet", "data_dir": "/data"}}, r"data_dir is read by benchmarks only"),
        ({"path": "x.parquet", "weight": 2.0}, "only data.train is drawn by weights"),
    ],
)
def test_a_set_that_contradicts_itself_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validation_sets(value)


def test_a_config_names_them(workspace: Workspace, tmp_path: Path) -> None:
    lines = json.dumps({"base": str(workspace.config), "data": {"val": {"a": "x.parquet"}}})
    (tmp_path / "config.yaml").write_text(lines)
    config = load_config(tmp_path / "config.yaml", ["data.val.b={benchmark: mmk12, every: 7}"])
    # The value of the base file is replaced, not merged with.
    assert [(s.name, s.every) for s in validation_sets(config.data.val)] == [("a", None), ("b", 7)]
