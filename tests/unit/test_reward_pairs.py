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
FIXTURES = Path(__file__).parents[1] / "fixtures"
LOST = {
    ("100,200", "100, 200"): "a number with a separator is not also a list of two",
    ("3.14", "3,14"): "a comma between digits is not also a decimal point",
    (r"\ln(xy)", r"\ln x+\ln y"): "not equal where both are negative; math-verify says the same",
    (r"\frac{1}{3}", r"0.\overline{3}"): "repeating decimals are not read",
    (r"\frac{1}{6}", r"0.1\overline{6}"): "repeating decimals are not read",
    ("x>3", "2x>6"): "math-verify does not divide an inequality",
    (r"\{x \mid x>3\}", r"(3,\infty)"): "sets are not read from what their members meet",
    (r"\{1,2,3\}", r"\{1,2\}\cup\{3\}"): "finite sets are not united",
}
LOST_REPORTED = {("2 h 30 min", "2.5 h"): "sums of units are not read"}
LOST_MORE = {
    ("2 h 30 min", "150 min"): "sums of units are not read",
    ("2 h 30 min", "2.5 hours"): "sums of units are not read",
    ("2 hours and 30 minutes", "2.5 h"): "sums of units are not read",
    ("1 min 30 s", "90 s"): "sums of units are not read",
    ("5 ft 6 in", "66 in"): "sums of units are not read",
    ("2.5 h", "2 h 30 min"): "sums of units are not read",
    ("2.5 h", "2 hours 30 minutes"): "sums of units are not read",
    ("90 min", "1 h 30 min"): "sums of units are not read",
    ("1 h 30 min", "1.5 hours"): "sums of units are not read",
    ("|x|<3", "-3<x<3"): "math-verify compares no absolute value with a chain, but either with an interval",
    ("|x|<5", "-5<x<5"): "math-verify compares no absolute value with a chain, but either with an interval",
    ("AB∥CD", "AB//CD"): "two strokes are no sign",
    ("7", r"\{x : x = 7\}"): "sets are not read from what their members meet",
    ('["a", "b"]', "a and b"): "two single letters in brackets are the ends of an interval",
}
"""The pairs of truth and answer in each table that `math` gets wrong, right answers all of them, and why."""
EXPLOITABLE = {"guess-all", "tiny numbers", "hedge", "number words", "clock"}
"""The topics of wrong answers that a policy would find."""


@dataclass(frozen=True)
class Pair:
    topic: str
    truth: str
    answer: str
    """The final answer; of the topic "response" the whole response."""
    verdict: str
    math_verify: str
    equal: str


def rows(name: str) -> list[dict[str, str]]:
    with (FIXTURES / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


PAIRS = [Pair(**row) for row in rows("answer_pairs.tsv")]
REPORTED = rows("reward_pairs.tsv")
MORE = rows("more_pairs.tsv")


def verdict(pair: Pair) -> float:
    if pair.topic == "response":
        return score("math", pair.answer, pair.truth).score
    return float(RULES["math"](pair.answer, pair.truth))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.topic}: {p.truth[:40]} | {p.answer[:40]}")
def test_math_gives_the_verdict_of_the_table_or_is_listed_as_lost(pair: Pair) -> None:
    lost = (pair.truth, pair.answer) in LOST
    assert (verdict(pair) == float(pair.verdict)) is not lost
    assert not (lost and pair.verdict == "0")  # what is lost is a right answer, never a wrong one that counts


@pytest.mark.parametrize(
    "row", REPORTED, ids=lambda r: f"{r['group']}: {r['truth'][:40]} | {r['answer'][:40]}"
)
def test_reported_faults_stay_mended_or_are_listed_as_lost(row: dict[str, str]) -> None:
    lost = (row["truth"], row["answer"]) in LOST_REPORTED
    assert (float(RULES[row["rule"]](row["answer"], row["truth"])) == float(row["want"])) is not lost
    assert not (lost and row["group"] in EXPLOITABLE)


def test_more_of_the_reported_kinds() -> None:
    wrong = [r for r in MORE if float(RULES[r["rule"]](r["answer"], r["truth"])) != float(r["want"])]
    assert {(r["truth"], r["answer"]) for r in wrong} == set(LOST_MORE)
    assert all(r["want"] == "1" for r in wrong)


@pytest.mark.parametrize("wrap", ["${}$", r"\({}\)", " {} ", r"\left({}\right)", "{}."])
def test_delimiters_around_an_answer_change_no_verdict(wrap: str) -> None:
    # Left out: texts that are words or no expression, and sums that parentheses would turn into another form.
    skipped = {"response", "empty", "choice", "text", "zero", "words for sets"}
    for pair in PAIRS:
        if pair.topic in skipped or "$" in pair.answer or (pair.truth, pair.answer) in LOST:
            continue
        if "(" in wrap and (not pair.answer[0].isdigit() or any(c in pair.answer for c in ",;<>=")):
            continue
        answer = wrap.replace("{}", pair.answer)
        assert float(RULES["math"](answer, pair.truth)) == float(pair.verdict), (pair.truth, answer)


def test_the_table_is_as_large_and_as_varied_as_promised() -> None:
    assert len(PAIRS) >= 380 and len(REPORTED) >= 60 and len(MORE) >= 800
    assert len(LOST) <= 0.03 * len(PAIRS) and set(LOST) <= {(p.truth, p.answer) for p in PAIRS}
    assert {r["group"] for r in REPORTED} >= EXPLOITABLE and len(LOST_REPORTED) <= 4
    assert len(LOST_MORE) <= 0.05 * sum(r["want"] == "1" for r in MORE)
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


def test_a_long_decimal_must_round_the_exact_value() -> None:
    assert RULES["math"]("1.414214", r"\sqrt2") and RULES["math"]("0.333333", "1/3")
    assert not RULES["math"]("1.41421399", r"\sqrt2") and not RULES["math"]("1.414215", r"\sqrt2")
