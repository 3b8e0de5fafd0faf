"""`math` against a table of answer pairs with the verdict that each should get.

The table also records what math-verify 0.9 says of the two in boxes (of the whole response where there is
one; ``-`` where it could hang) and what string equality says: where the rule departs from both.
"""

from __future__ import annotations

import csv
import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from mssr.rewards.extraction import last_boxed, unwrap
from mssr.rewards.rules import RULES, score

pytestmark = pytest.mark.unit
TABLE = Path(__file__).parents[1] / "fixtures/answer_pairs.tsv"


@dataclass(frozen=True)
class Pair:
    topic: str
    truth: str
    answer: str
    """The final answer; of the topic "response" the whole response."""
    verdict: str
    math_verify: str
    equal: str


def pairs() -> list[Pair]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [Pair(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


PAIRS = pairs()


def verdict(pair: Pair) -> float:
    if pair.topic == "response":
        return score("math", pair.answer, pair.truth).score
    return float(RULES["math"](pair.answer, pair.truth))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.topic}: {p.truth[:40]} | {p.answer[:40]}")
def test_math_gives_the_verdict_of_the_table(pair: Pair) -> None:
    assert verdict(pair) == float(pair.verdict)


@pytest.mark.parametrize("wrap", ["${}$", r"\({}\)", " {} ", r"\left({}\right)", "{}."])
def test_delimiters_around_an_answer_change_no_verdict(wrap: str) -> None:
    # Left out: texts that are words or no expression, and sums that parentheses would turn into another form.
    skipped = {"response", "empty", "choice", "text", "zero", "words for sets"}
    for pair in PAIRS:
        if pair.topic in skipped or "$" in pair.answer or pair.answer.startswith(r"\("):
            continue
        if "(" in wrap and (not pair.answer[0].isdigit() or any(c in pair.answer for c in ",;<>=")):
            continue
        answer = wrap.replace("{}", pair.answer)
        assert float(RULES["math"](answer, pair.truth)) == float(pair.verdict), (pair.truth, answer)


def test_the_table_is_as_large_and_as_varied_as_promised() -> None:
    assert len(PAIRS) >= 150
    assert len({(p.topic, p.truth, p.answer) for p in PAIRS}) == len(PAIRS)
    assert {p.verdict for p in PAIRS} == {"0", "1"}
    rows = [p for p in PAIRS if p.math_verify != "-"]
    lax = [p for p in rows if (p.verdict, p.math_verify) == ("0", "1")]
    strict = [p for p in rows if (p.verdict, p.math_verify) == ("1", "0")]
    assert len(lax) >= 10 and len(strict) >= 40  # the rule is not a wrapper of math-verify


def test_string_equality_says_what_is_recorded() -> None:
    for pair in PAIRS:
        text = last_boxed(pair.answer) if pair.topic == "response" else pair.answer
        assert (text == unwrap(pair.truth)) == bool(int(pair.equal)), pair


def test_math_verify_says_what_is_recorded() -> None:
    if not importlib.metadata.version("math-verify").startswith("0.9."):
        pytest.skip("recorded with math-verify 0.9")
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def alone(text: str) -> list[object]:
        return parse(text, parsing_timeout=None)  # type: ignore[no-any-return]

    different = []
    for pair in PAIRS:
        if pair.math_verify == "-":
            continue
        truth = alone(rf"\boxed{{{unwrap(pair.truth)}}}")
        answer = alone(pair.answer if pair.topic == "response" else rf"\boxed{{{pair.answer}}}")
        if verify(truth, answer, timeout_seconds=None) != bool(int(pair.math_verify)):
            different.append(pair)
    assert not different
