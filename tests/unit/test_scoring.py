"""Scorer: what goes in and comes out, limits, messages, penalties, and the checks of the config section."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mssr.config.data import RewardConfig
from mssr.errors import TrainingError, UserError
from mssr.rewards import RewardInput, ScoredBatch, Scorer, advice, check
from mssr.rewards.rules import RULES
from tests.unit import reward_lab as lab
from tests.unit.reward_lab import write

pytestmark = pytest.mark.unit

EXAMPLE = Path(__file__).parents[2] / "examples/custom_reward.py"


def think(solution: str) -> str:
    return f"<think>some thoughts</think>{solution}"


def score(responses: list[str], answers: list[str], name: str, **options: Any) -> ScoredBatch:
    return lab.score(name, inputs(responses, answers, options.pop("lengths", None)), **options)


def inputs(
    responses: list[str], answers: list[str] | None = None, lengths: list[int] | None = None
) -> list[RewardInput]:
    answers, lengths = answers or [""] * len(responses), lengths or [1] * len(responses)
    return [RewardInput(*row) for row in zip(responses, answers, lengths, strict=True)]


# --- batches ------------------------------------------------------------------------------------


def test_scoring_a_batch_with_a_named_rule() -> None:
    with Scorer(RewardConfig(workers=1), 10) as scorer:
        batch = scorer.score(inputs([think(r"\boxed{8}"), think(r"\boxed{7}"), "8"], ["8", "8", "8"]))
        empty = scorer.score([])
    assert batch.scores.dtype == np.float32 and batch.scores.tolist() == [1, 0, 0]
    assert {key: part.tolist() for key, part in batch.parts.items()} == {
        "accuracy": [1, 0, 0],
        "format": [1, 1, 0],
    }
    assert batch.parts["format"].dtype == np.float32
    assert (batch.errors, batch.timeouts) == (0, 0)
    assert empty.scores.shape == (0,) and empty.parts == {} and empty.errors == 0


def test_the_options_of_a_rule_reach_it() -> None:
    responses = [think(r"\boxed{8.05}"), r"\boxed{8}", think(r"\boxed{7}")]
    for tolerance, expected in ((0.001, [0, 0, 0]), (0.01, [1, 0, 0])):
        options = {"tolerance": tolerance}
        assert score(responses, ["8"] * 3, name="number", options=options).scores.tolist() == expected
    assert score(responses, ["8"] * 3, name="number", format="none").scores.tolist() == [1, 1, 0]
    weighted = score(responses, ["8"] * 3, name="number", format="weighted", format_weight=0.2)
    np.testing.assert_allclose(weighted.scores, [1, 0.8, 0.2], rtol=1e-6)


def test_results_are_in_order_and_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    name = write(
        tmp_path, "def f(response, answer): return {'score': float(response), 'set': hash(response)%97}\n"
    )
    responses = [str(i) for i in range(500)]
    batches = [score(responses, responses, name=name, workers=n) for n in (1, 3)]
    assert batches[0].scores.tolist() == list(range(500))
    for batch in batches[1:]:
        np.testing.assert_array_equal(batch.scores, batches[0].scores)
        np.testing.assert_array_equal(batch.parts["set"], batches[0].parts["set"])


def test_a_response_without_a_part_has_zero_there(tmp_path: Path) -> None:
    name = write(
        tmp_path,
        "def f(response, answer):\n"
        "    return {'score': 0.5, 'length': len(response)} if response else {'score': 1}\n",
    )
    batch = score(["abc", ""], ["", ""], name=name)
    assert batch.scores.tolist() == [0.5, 1.0]
    assert batch.parts["length"].tolist() == [3.0, 0.0]
    assert "score" not in batch.parts and batch.errors == 0


# --- failures -----------------------------------------------------------------------------------


def test_a_failing_reward_scores_zero_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = write(
        tmp_path,
        "def f(response, answer):\n"
        "    if response == 'raise': raise KeyError('lost')\n"
        "    return {'nan': float('nan'), 'inf': float('inf'), 'big': 1e300, 'none': None, 'text': '1',\n"
        "            'keyless': {'format': 1.0}, 'part': {'score': 1.0, 'format': float('nan')}}"
        ".get(response, 1.0)\n",
    )
    wrong = ["raise", "nan", "inf", "big", "none", "text", "keyless", "part"]
    with Scorer(RewardConfig(name=name, workers=2), 10) as scorer, caplog.at_level(logging.WARNING):
        batch = scorer.score(inputs([*wrong, "fine"]))
        scorer.score(inputs(["raise", "fine"]))
    assert batch.scores.tolist() == [0.0] * 8 + [1.0]
    assert batch.errors == 8 and batch.timeouts == 0 and batch.parts == {}
    assert len(caplog.records) == 1  # the first traceback only
    assert (
        "KeyError: 'lost'" in caplog.text
        and "Traceback" in caplog.text
        and name.removesuffix(":f") in caplog.text
    )


def test_failures_are_told_once_and_again_when_there_are_far_more(tmp_path: Path) -> None:
    name, told = write(tmp_path, "def f(response, answer): return 1.0 / len(response)\n"), list[str]()
    with Scorer(RewardConfig(name=name, workers=1), 10, on_failure=told.append) as scorer:
        scorer.score(inputs(["a"] * 16))
        assert told == []
        for failing in (3, 2, 6, 11, 12, 15):
            scorer.score(inputs([""] * failing + ["a"] * (16 - failing)))
    assert [line.partition(" failed on ")[2][:17].rstrip(",") for line in told] == [
        "3 of 16 responses",
        "12 of 16 response",
    ]
    assert told[0] == (
        f"the reward '{name}' failed on 3 of 16 responses, which score 0 "
        "(ZeroDivisionError: float division by zero); the log has the first traceback"
    )


def test_a_reward_that_always_fails_stops_the_run(tmp_path: Path) -> None:
    name = write(tmp_path, "def f(response, answer): return 1.0 / len(response)\n")
    config = RewardConfig(name=name, workers=1)
    with Scorer(config, 10) as scorer:
        assert scorer.score(inputs([""] * 7)).errors == 7  # too few to judge
        assert scorer.score(inputs([""] * 7 + ["a"])).errors == 7  # not all
        with pytest.raises(TrainingError, match=r"failed on 8 of 8 responses \(ZeroDivisionError") as error:
            scorer.score(inputs([""] * 8))
        assert "\n" not in str(error.value)


# --- penalties ----------------------------------------------------------------------------------

LENGTHS = [0, 5, 8, 10]


def test_penalties_are_taken_off_and_reported(tmp_path: Path) -> None:
    name = write(tmp_path, "def f(response, answer): return float(answer)\n")
    config: dict[str, Any] = {"name": name, "overlong_buffer": 4, "length_penalty": 0.5}
    batch = score([""] * 4, ["1", "1", "0", "0"], lengths=LENGTHS, **config)
    np.testing.assert_allclose(batch.parts["penalty_overlong"], [0, 0, 0.5, 1])
    np.testing.assert_allclose(batch.parts["penalty_length"], [0, 0.25, 0.4, 0.5])
    np.testing.assert_allclose(batch.scores, [1, 0.75, -0.9, -1.5], rtol=1e-6)
    for raw in ("score_raw", "accuracy"):  # accuracy stays what the function said
        assert batch.parts[raw].tolist() == [1, 1, 0, 0]
    repeated = score(
        ["a b a b a b", "a b c"], ["1", "1"], name=name, repetition_penalty=0.5, repetition_ngram=2
    )
    np.testing.assert_allclose(repeated.scores, [1 - 0.5 * 3 / 5, 1], rtol=1e-6)


def test_clipped_penalties_stay_in_the_unit_interval_and_hide_no_wrong_score(tmp_path: Path) -> None:
    name = write(tmp_path, "def f(response, answer): return float(answer)\n")
    answers = ["1", "0.25", "0", "3"]
    batch = score([""] * 4, answers, lengths=[10] * 4, clip=True, name=name, length_penalty=0.5)
    assert batch.scores.tolist() == [0.5, 0, 0, 2.5]
    assert batch.parts["score_raw"].tolist() == [1, 0.25, 0, 3]
    plain = score(["", ""], ["-1", "2"], clip=True, name=name)
    assert plain.scores.tolist() == [-1, 2]  # for the method to refuse


def test_a_failed_response_scores_zero_whatever_its_length(tmp_path: Path) -> None:
    name = write(tmp_path, "def f(response, answer): return 1 / 0\n")
    assert score([""], [""], lengths=[10], name=name, length_penalty=0.5).scores.tolist() == [0]


# --- the config section -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "exact_mach"}, r"'exact_mach', did you mean 'exact_match'\?"),
        ({"options": {"tolerance": 1}}, r"reward.options.tolerance is no option of exact_match \(.* none\)"),
        (
            {"name": "number", "options": {"tolerence": 1}},
            r"reward.options.tolerence is no option of number .*did you mean 'tolerance'\?",
        ),
        ({"format": "gated"}, "reward.format=gated must be one of gate, weighted, none"),
        ({"format_weight": 0.5}, "format_weight=0.5 is read by nothing with reward.format=gate"),
        ({"format": "weighted", "format_weight": 1.5}, "must lie in"),
        ({"overlong_penalty": 0.5}, "overlong_penalty=0.5 is read by nothing with reward.overlong_buffer=0"),
        ({"repetition_ngram": 3}, "repetition_ngram=3 is read by nothing with reward.repetition_penalty=0"),
        ({"length_penalty": -1.0}, "must not be negative"),
        ({"time_limit_s": 0}, "reward.time_limit_s=0 must be greater than 0"),
        ({"workers": 0}, "reward.workers=0 must be greater than 0"),
        (
            {"repetition_penalty": 0.1, "repetition_ngram": 0},
            "reward.repetition_ngram=0 must be greater than 0",
        ),
        ({"name": f"{EXAMPLE}:with_format_credit", "format": "none"}, "format=none is read by nothing with"),
        ({"name": f"{EXAMPLE}:with_format_credit", "options": {"credits": 1}}, "did you mean 'credit'"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(RewardConfig(**change))
    assert "\n" not in str(error.value)


def test_what_means_something_is_accepted() -> None:
    assert {"exact_match", "math", "choice", "number"} <= set(RULES)
    for name in RULES:
        check(RewardConfig(name=name))
    check(RewardConfig(format="weighted", format_weight=0.5, overlong_buffer=4, overlong_penalty=0.5))
    check(RewardConfig(name=f"{EXAMPLE}:with_format_credit", options={"credit": 0.2}))


def test_a_buffer_longer_than_the_responses_is_refused() -> None:
    with pytest.raises(UserError, match=r"overlong_buffer=11 exceeds rollout\.max_response_length=10"):
        Scorer(RewardConfig(overlong_buffer=11), 10)


def test_advice_says_what_a_beta_baseline_makes_of_the_rewards() -> None:
    weighted = RewardConfig(format="weighted")
    (line,) = advice(weighted, bounded=True)
    assert "reward.format=weighted" in line and "0.1" in line and "Beta baseline" in line
    (line,) = advice(RewardConfig(length_penalty=0.1), bounded=True)
    assert "reward.length_penalty" in line and "below 0" in line
    assert advice(RewardConfig(), bounded=True) == []


def test_names_that_are_taken_by_their_place_are_told(tmp_path: Path) -> None:
    name = write(tmp_path, "def f(x, y, *, scale=1): ...\ndef g(response, answer): ...\n")
    (line,) = advice(RewardConfig(name=name), bounded=False)
    assert line.endswith("f: x is taken for the response and y for the answer, by their place")
    assert advice(RewardConfig(name=name.removesuffix("f") + "g"), bounded=False) == []


def test_advice_says_nothing_where_rewards_may_be_anything() -> None:
    assert advice(RewardConfig(format="weighted", length_penalty=0.1), bounded=False) == []


# --- the example --------------------------------------------------------------------------------


def test_the_example_gives_credit_for_format_and_reports_its_parts() -> None:
    responses = [think(r"\boxed{8}"), think(r"\boxed{9}"), "8"]
    scored = score(responses, ["8"] * 3, name=f"{EXAMPLE}:with_format_credit")
    np.testing.assert_allclose(scored.scores, [1.0, 0.1, 0.0])
    assert scored.errors == 0
    np.testing.assert_array_equal(scored.parts["accuracy"], [1, 0, 0])
    np.testing.assert_array_equal(scored.parts["format"], [1, 1, 0])
    more = score(responses, ["8"] * 3, name=f"{EXAMPLE}:with_format_credit", options={"credit": 0.25})
    np.testing.assert_allclose(more.scores, [1.0, 0.25, 0.0])
