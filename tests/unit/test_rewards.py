"""The exact-match reward; the other rules, user functions and processes have test files of their own."""

from __future__ import annotations

import random
import time

import pytest

from mssr.rewards import RewardResult
from mssr.rewards.extraction import last_boxed
from mssr.rewards.rules import normalise, score

pytestmark = pytest.mark.unit


def think(solution: str) -> str:
    return f"<think>some thoughts</think>{solution}"


def exact_match(response: str, answer: str) -> RewardResult:
    return score("exact_match", response, answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (think(r"\boxed{8}"), "8"),
        (think("\n\nThe answer is $\\boxed{8}$.\n"), " 8 "),
        (" \n<think></think>\\boxed{8}", "8"),
        (think(r"\boxed{8}"), "<answer> 8 </answer>"),
        (think(r"\boxed {8}"), "$8$"),
        (think(r"\boxed{\frac{1}{2}}"), r"\frac{1}{2}"),
        (think(r"\boxed{3} no, \boxed{8}"), "8"),
        (think(r"\boxed{8} and \boxed{9"), "8"),
        (think(r"\boxed{\boxed{8}}"), "8"),
        (think(r"\boxed{\{1, 2\}}"), r"\{1, 2\}"),
        (think(r"\boxed{\left\{ x \right.}"), r"\left\{ x \right."),
        (think(r"} \boxed{8}"), "8"),
        (think("\\boxed{two\n words.}"), "Two words"),
        (think(r"\boxed{b}"), "B."),
        (r"<think>I try \boxed{3}</think>\boxed{8}", "8"),
    ],
)
def test_right_answers_score_one(response: str, answer: str) -> None:
    assert exact_match(response, answer) == RewardResult(1.0, {"accuracy": 1.0, "format": 1.0})


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{8}",
        r"</think>\boxed{8}",
        r"<think>\boxed{8}",
        r"<think>\boxed{8}</think>",  # the box is part of the thinking
        r"<think>\boxed{8}</think> so it is 8",
        r"First, <think></think>\boxed{8}",
        think("8"),
        think(r"\boxed{8"),
        think(r"\boxed{}"),
        think(r"\boxed{ }"),
        think(r"boxed{8}"),
        "",
    ],
)
def test_a_right_answer_without_the_format_scores_zero(response: str) -> None:
    assert exact_match(response, "8") == RewardResult(0.0, {"accuracy": 0.0, "format": 0.0})


@pytest.mark.parametrize(
    ("boxed", "answer"), [("9", "8"), ("-8", "8"), ("88", "8"), ("8.5", "8"), ("0.5", "5"), ("8", "")]
)
def test_a_wrong_answer_keeps_the_format_part(boxed: str, answer: str) -> None:
    result = exact_match(think(rf"\boxed{{{boxed}}}"), answer)
    assert result == RewardResult(0.0, {"accuracy": 0.0, "format": 1.0})


def test_an_empty_box_does_not_match_an_empty_answer() -> None:
    assert exact_match(think(r"\boxed{}"), "").score == 0.0


def test_normalise_is_idempotent_and_takes_off_only_what_it_says() -> None:
    assert normalise(" $X  = 3$. ") == "x = 3"
    assert normalise("$ $4.$ $ ..") == "4"
    assert normalise("$5") == "$5"
    assert normalise("3.50") == "3.50"
    assert normalise("$") == "$" and normalise("$$") == "" and normalise(" . ") == ""
    rng = random.Random(0)
    for _ in range(2_000):
        text = "".join(rng.choice("aB $.\n{}\\") for _ in range(rng.randrange(12)))
        once = normalise(text)
        assert normalise(once) == once


def test_last_boxed_gives_back_any_balanced_content() -> None:
    rng = random.Random(1)

    def balanced(depth: int) -> str:
        parts = [rng.choice(["x", r"\frac", r"\{", r"\}", r"\\", " "]) for _ in range(rng.randrange(3))]
        if depth:
            parts.insert(rng.randrange(len(parts) + 1), "{" + balanced(depth - 1) + "}")
        return "".join(parts)

    for _ in range(500):
        content = balanced(rng.randrange(5))
        assert last_boxed(r"text {} \boxed{1} \boxed{" + content + "} more {text}") == content


@pytest.mark.parametrize(
    "solution",
    [
        r"\boxed{" * 40_000,
        "{" * 200_000,
        r"\boxed{" * 20_000 + "}" * 20_000,
        r"\boxed" + " " * 200_000,
        (r"\boxed" + " " * 20) * 10_000,
        "<think>" * 30_000 + "</think>" * 30_000,
        r"\boxed{" + "$" * 200_000 + "}",
        r"\boxed{" + "." * 200_000 + "}",
        r"\boxed{" + " ." * 100_000 + "}",
        r"\boxed{a" + " " * 200_000 + "b}",
    ],
)
def test_hostile_texts_take_linear_time(solution: str) -> None:
    start = time.process_time()
    exact_match(think(solution), "8")
    assert time.process_time() - start < 1.0  # takes about 0.1 s; quadratic time is over ten
