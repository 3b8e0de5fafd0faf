"""Benchmarks by name, and data in the project's own form: ids and verdicts are those of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mssr.config import Config
from mssr.config.data import DataConfig, RewardConfig
from mssr.data.dataset import PromptDataset
from mssr.errors import UserError
from mssr.evaluation import registry
from mssr.evaluation.base import Benchmark
from mssr.evaluation.items import Verdict
from mssr.evaluation.own import Own
from mssr.evaluation.prompts import Question
from mssr.evaluation.responses import Response
from mssr.evaluation.verdicts import VerdictBook
from mssr.rewards import functions
from mssr.rewards.base import RewardInput
from tests.unit.data_forms import geometry3k, mmrl30k, vision_r1_rl, write_jsonl

pytestmark = pytest.mark.unit

RESPONSES = [
    "<think>2 + 2</think>\\boxed{4}",
    "\\boxed{4}",
    "<think>2 + 2</think>\\boxed{4.0}",
    "<think>2 + 2</think>\\boxed{5}",
    "<think>2 + 2</think>The answer is 4.",
    "<think>\\boxed{4}",
    "",
]


@pytest.fixture
def four(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "four.jsonl", [{"problem": "2 + 2?", "answer": "4"}])


def statuses(benchmark: Benchmark, truncated: bool = False) -> list[str]:
    item = benchmark.load()[0]
    return [benchmark.verdict(item, response, truncated).status for response in RESPONSES]


# Scoring --------------------------------------------------------------------------------------------

RIGHT, WRONG, NONE = "right", "wrong", "extraction_failed"


def test_by_default_equal_or_the_same_mathematics_is_right(four: Path) -> None:
    benchmark = registry.get(str(four))
    assert statuses(benchmark) == [RIGHT, RIGHT, RIGHT, WRONG, RIGHT, NONE, NONE]
    cut = "truncated"
    assert statuses(benchmark, truncated=True) == [RIGHT, RIGHT, RIGHT, WRONG, cut, cut, cut]


def test_a_named_rule_is_that_rule_alone(four: Path) -> None:
    assert statuses(Own(str(four), rule="exact_match")) == [RIGHT, RIGHT, WRONG, WRONG, RIGHT, NONE, NONE]
    assert statuses(Own(str(four), rule="choice"))[2:4] == [RIGHT, WRONG]


def rewarded(path: Path, reward: RewardConfig, *answers: tuple[str, int, str]) -> list[Verdict]:
    """By training's reward, of the first item's responses with their lengths and finish reasons."""
    config = Config(reward=replace(reward, workers=1))
    own = Own(str(path), reward=config.reward)
    question = Question(own, own.load()[0], True)
    with VerdictBook(config, [question], reward=True) as book:
        book.add([Response(own.name, question.item.id, k, *answer) for k, answer in enumerate(answers)])
    verdicts = [book.of(question, k)[1] for k in range(len(answers))]
    assert not any(own.undecided(question.item, verdict) for verdict in verdicts)
    return verdicts


@pytest.mark.parametrize("name", ["exact_match", "math", "number"])
@pytest.mark.parametrize("form", ["gate", "none", "weighted"])
def test_with_a_reward_the_verdict_is_that_of_training(name: str, form: str, four: Path) -> None:
    config = RewardConfig(name=name, format=form)
    reward = functions.load(config)
    in_training = [reward.call([RewardInput(r, "4", 9)])[0].parts["accuracy"] for r in RESPONSES]
    verdicts = rewarded(four, config, *((response, 9, "stop") for response in RESPONSES))
    assert [verdict.correct for verdict in verdicts] == [accuracy == 1 for accuracy in in_training]
    expected = {"exact_match": [1, 0, 0, 0, 0, 0, 0], "math": [1, 0, 1, 0, 0, 0, 0]}
    if form == "gate" and name in expected:
        assert [verdict.correct for verdict in verdicts] == expected[name]


def test_a_users_reward_scores_and_may_fail(four: Path, tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text(
        "def short(response, answer, response_length):\n    return float(response_length < 3)\n"
        "def broken(response, answer):\n    raise RuntimeError('no')\n"
    )
    short = RewardConfig(name=f"{file}:short")
    answers = [(RESPONSES[0], 2, "stop"), (RESPONSES[0], 3, "stop"), (RESPONSES[5], 9, "length")]
    assert [v.status for v in rewarded(four, short, *answers)] == [RIGHT, WRONG, "truncated"]
    (verdict,) = rewarded(four, RewardConfig(name=f"{file}:broken"), (RESPONSES[0], 9, "stop"))
    assert (verdict.status, verdict.rule) == (WRONG, "reward")


def test_a_users_reward_sees_the_row(tmp_path: Path) -> None:
    image = str(tmp_path / "red.png")
    rows = [{"problem": f"{k}?", "answer": k, "bbox": [k, 9], "images": [image]} for k in range(3)]
    Image.new("RGB", (64, 32), "red").save(image)
    path = write_jsonl(tmp_path / "boxes.jsonl", rows)
    (tmp_path / "reward.py").write_text(
        "def f(response, answer, bbox, images):\n"
        "    assert answer < 2, answer\n"
        "    return float(response == str(answer) and bbox == [answer, 9] and images[0].size == (64, 32))\n"
    )
    config = Config(reward=RewardConfig(name=f"{tmp_path}/reward.py:f", workers=1))
    own, told = Own(str(path), reward=config.reward, config=config.data), list[str]()
    questions = [Question(own, item, True) for item in own.load()]
    with VerdictBook(config, questions, reward=True, tell=told.append) as book:
        for question, text in zip(questions, "022", strict=True):
            book.add([Response("boxes", question.item.id, 0, text, 1, "stop")])
    assert [book.of(q, 0)[1].correct for q in questions] == [True, False, False]
    assert len(told) == 1 and "failed on 1 of 1 responses" in told[0]


def test_a_rule_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(UserError, match="unknown rule 'maths': one of choice, exact_match, math, number"):
        Own("a.parquet", rule="maths")
    with pytest.raises(UserError, match="cannot both"):
        Own("a.parquet", rule="math", reward=RewardConfig())


# Items ----------------------------------------------------------------------------------------------


def test_ids_prompts_and_answers_are_those_of_training(tmp_path: Path) -> None:
    for source in (
        str(vision_r1_rl(tmp_path)),
        str(mmrl30k(tmp_path)),
        f"{geometry3k(tmp_path)}@test",
        str(
            write_jsonl(
                tmp_path / "t.jsonl", [{"problem": "1?", "answer": 1}, {"problem": "2?", "answer": 2}]
            )
        ),
    ):
        trained = PromptDataset(source, DataConfig())
        benchmark = registry.get(source)
        items = benchmark.load()
        assert [item.id for item in items] == trained.ids
        for item in items:
            row, other = benchmark.prompt_row(item), trained.row(item.id)
            assert (row.problem, row.answer) == (other.problem, other.answer)
            pixels = [image.decode().tobytes() for image in row.images]
            assert pixels == [image.decode().tobytes() for image in other.images]


def test_configured_columns_are_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", [{"key": 7, "question": "2 + 2?", "truth": "4"}])
    config = DataConfig(id_column="key", problem_column="question", answer_column="truth")
    (item,) = Own(str(path), config=config).load()
    assert (item.id, item.question, item.answer) == ("7", "2 + 2?", "4")
    with pytest.raises(UserError, match=r"q.jsonl has no column 'problem' .*'key', 'question', 'truth'"):
        registry.get(str(path)).load()


def test_repeated_rows_are_items_of_their_own(tmp_path: Path) -> None:
    rows = [{"id": 1, "problem": "2 + 2?", "answer": "4"}] * 3
    path = write_jsonl(tmp_path / "twice.jsonl", rows)
    first, second, third = (item.id for item in registry.get(str(path)).load())
    assert (second, third) == (f"{first}-2", f"{first}-3")
    with pytest.raises(UserError, match=r"twice.jsonl row 1: the id 1 is also that of an earlier row"):
        Own(str(path), config=DataConfig(id_column="id")).load()


def test_a_source_may_be_relative_to_the_data_directory(four: Path) -> None:
    assert len(registry.get("four.jsonl").load(four.parent)) == 1
    with pytest.raises(UserError, match=r"four.jsonl does not exist"):
        registry.get("four.jsonl").load()


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "bad.jsonl", [{"problem": "q", "answer": "a"}, {"problem": "", "answer": "b"}]
    )
    with pytest.raises(UserError, match=r"bad.jsonl row 1: column problem is empty$"):
        registry.get(str(path)).load()


# Names ----------------------------------------------------------------------------------------------


def test_the_benchmarks_of_the_paper_are_registered() -> None:
    paper = {"mathverse", "mathvista", "mmk12", "r1_onevision", "hallusionbench"}
    assert set(registry.names()) == paper | {"geometry3k"}
    for name in registry.names():
        assert registry.get(name).name == name


def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown benchmark 'mathvers', did you mean 'mathverse'"):
        registry.get("mathvers")


def test_a_benchmark_of_a_users_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from mssr.evaluation.base import Benchmark\n"
        "from mssr.evaluation.items import Item\n"
        "from mssr.evaluation.local_data import Location\n"
        "class Mine(Benchmark):\n"
        "    location = Location('me/mine', 'test')\n"
        "    def item(self, cells, images, where):\n"
        "        return Item('mine', cells['key'], cells['q'], images, cells['a'])\n"
        "class Other: pass\n"
    )
    write_jsonl(tmp_path / "mine.jsonl", [{"key": "k", "q": "2 + 2?", "a": "4"}])
    benchmark = registry.get(f"{file}:Mine")
    (item,) = benchmark.load(tmp_path)
    assert item.benchmark == benchmark.name  # what its results go by
    assert benchmark.verdict(item, "\\boxed{4.0}").correct
    write_jsonl(tmp_path / "mine.jsonl", [{"key": "k", "q": "What is it?", "a": "4", "pictures": ["a.png"]}])
    with pytest.raises(UserError, match="no image in column image, but column pictures has images"):
        benchmark.load(tmp_path)
    with pytest.raises(UserError, match="is no subclass"):
        registry.get(f"{file}:Other")
    with pytest.raises(UserError, match="has no class 'Minee', did you mean 'Mine'"):
        registry.get(f"{file}:Minee")


def test_a_name_is_given_once() -> None:
    with pytest.raises(ValueError, match="taken by MathVerse"):

        @registry.register("mathverse")
        class Mine(Benchmark):
            pass

    for name in ("a.b", "a/b", "a@b", "a:b"):
        with pytest.raises(ValueError, match="must not contain"):
            registry.register(name)


def test_registering_adds_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.BENCHMARKS, "known", {})

    @registry.register("mine")
    class Mine(Benchmark):
        pass

    assert type(registry.get("mine")) is Mine and registry.get("mine").name == "mine"
