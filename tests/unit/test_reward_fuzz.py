"""Random and hostile responses through every rule: no exception, no long item, no score out of range."""

from __future__ import annotations

import csv
import math
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mssr.rewards.rules import FORMATS, RULES, score
from tests.unit.wrong_answers import wrong_answers

pytestmark = pytest.mark.unit
RESPONSES = 5_000
LIMIT_S = 5.0
"""CPU seconds of one item; the slowest takes about a tenth of it, imports aside."""

VOCABULARY = (
    r"\frac \sqrt \boxed{ \text{ \left( \right) \{ \} { } ( ) [ ] | \pi \sin \log_2 \infty \cup \pm "
    r"\begin{pmatrix} \end{pmatrix} \\ & ^ _ ^{ ! + - * / = < > \le , ; : . % \% $ $$ \( \) 0 1 2 12 3.14 "
    r"1,000 99999999 x y e i cm m° ^\circ A B (A) yes no and or <think> </think> <answer> </answer> "
    r"½ ² √ ٣ − ∞ \int \sum \lim \binom \mathbb{R}"
).split()
TRUTHS = [
    *(
        "8",
        "0.5",
        r"\frac{1}{2}",
        "A",
        "B. 12 cm",
        "12 cm",
        "(2, 3)",
        r"\{1, 2\}",
        "x=3",
        "x>3",
        "50%",
        "yes",
        "",
    ),
    *(
        r"\begin{pmatrix}1\\2\end{pmatrix}",
        "no solution",
        "x^2+1",
        "9^{9^{9}}",
        r"\frac{1}{0}",
        "7" * 3_000,
        "}{",
    ),
]
BOMBS = [
    "9^{9^{9^{9}}}",
    "9" + "^9" * 80,
    "9**9**9**9",
    "2^{2^{2^{2^{2^{2^2}}}}}",
    "10^{-10^{10}}",
    "(((9!)!)!)!",
    "3" + "!" * 200,
    r"\binom{10^{9}}{5\cdot 10^{8}}",
    r"\exp(\exp(\exp(\exp(99))))",
    r"e^{e^{e^{e^{e}}}}",
    r"\sin(10^{10^{8}})",
    r"\sqrt[99999999]{2}",
    r"\log_{1}{0}",
    r"0^{-1}",
    r"0^{0}",
    "1" * 5_000,
    "0." + "1" * 5_000,
    "1/" * 400 + "1",
    "-" * 900 + "1",
    "1" + "+1" * 450,
    "(" * 450 + "1" + ")" * 450,
    "{" * 450 + "1" + "}" * 450,
    r"\frac{" * 60 + "1" + "}{2}" * 60,
    r"\sqrt{" * 90 + "2" + "}" * 90,
    "|" * 300,
    "(x+1)^{99999}",
    "(x+y+z)^{40}" * 9,
    "x^{x^{x^{x^{x}}}}",
    r"\int_0^{\infty} e^{-x^2} dx",
    r"\sum_{n=1}^{\infty} \frac{1}{n^{2}}",
    r"\prod_{n=1}^{10^9} n",
    r"\lim_{x\to 0} \frac{\sin x}{x}",
    r"\begin{pmatrix}" + "1&" * 200 + r"1\end{pmatrix}",
    r"\begin{pmatrix}" * 20,
    ",".join(map(str, range(300))),
    ",".join(["x^2+1"] * 30),
    r"\pm" * 100 + "1",
    "A,B," * 100,
    "1e999999999",
    "1 000" * 150,
    "1,000" * 150,
    "12 " + "cm " * 200,
    "a" * 900,
    " " * 900,
    "$" * 900,
    r"\text{" * 100 + "x" + "}" * 100,
    "½" * 900,
    "\u0663" * 900,
    "\x00\ud800\uffff",
    "answer is " * 200,
    "<answer>" * 5_000,
    "<think>" * 20_000,
    "</think>" * 20_000,
    r"\boxed{" * 20_000,
    "yes no " * 2_000,
    "1:" * 300,
]


def answers() -> list[str]:
    with (Path(__file__).parents[1] / "fixtures/answer_pairs.tsv").open(encoding="utf-8", newline="") as file:
        return [row["answer"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def responses(rng: random.Random) -> Iterator[str]:
    """Bombs and their mutations, mutated answers, soups of LaTeX, ASCII and Unicode; most of them boxed."""
    known = answers()
    for i in range(RESPONSES):
        kind = i % 5
        if kind == 0:
            text = BOMBS[i // 5 % len(BOMBS)]
            if i >= 5 * len(BOMBS):
                text = mutated(text, rng)
        elif kind == 1:
            text = mutated(rng.choice(known), rng)
        elif kind == 2:
            text = rng.choice(["", " "]).join(rng.choices(VOCABULARY, k=rng.randrange(1, 40)))
        elif kind == 3:
            text = "".join(rng.choices(string.printable, k=rng.randrange(60)))
        else:
            text = "".join(
                chr(rng.choice([rng.randrange(0x250), rng.randrange(0x11_0000)])) for _ in range(30)
            )
        frame = rng.choice(
            ["<think>x</think>\\boxed{{{}}}", "<think>{}</think>\\boxed{{{}}}", "{}", "answer: {}"]
        )
        yield frame.replace("{{", "{").replace("}}", "}").replace("{}", text, 2)


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randrange(1, 5)):
        position = rng.randrange(len(text) + 1)
        piece = rng.choice(["", rng.choice(VOCABULARY), text[position : position + rng.randrange(9)] * 2])
        text = text[:position] + piece + text[position + rng.randrange(4) :]
    return text


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_response_breaks_a_rule(rule: str) -> None:
    rng = random.Random(f"fuzz {rule}")
    for i, response in enumerate(responses(rng)):
        truth = TRUTHS[i % len(TRUTHS)] if i % 7 else rng.choice(BOMBS)
        form = FORMATS[i % 3]
        started = time.process_time()
        result = score(rule, response, truth, format=form)
        seconds = time.process_time() - started
        assert seconds < LIMIT_S, (response[:300], truth[:100], seconds)
        assert 0 <= result.score <= 1 and math.isfinite(result.score)
        assert set(result.parts) == {"accuracy", "format"}
        assert all(part in (0.0, 1.0) for part in result.parts.values())


def test_no_wrong_answer_made_from_a_right_one_counts() -> None:
    # A sample; `python -m tests.unit.wrong_answers` tries 20,000 in a minute.
    assert not [x for x in wrong_answers(2_000, seed=0) if RULES["math"](x[2], x[1])]


def test_a_bomb_equals_itself_and_nothing_else() -> None:
    for bomb in BOMBS[:12]:
        assert RULES["math"](bomb, bomb)
        assert not RULES["math"](bomb, "3") and not RULES["math"]("3", bomb)
        assert not RULES["number"](bomb, "3")


def test_what_only_sympy_could_read_is_refused_if_sympy_could_hang_on_it() -> None:
    for bomb in BOMBS:
        for text in (rf"\lfloor {bomb} \rfloor", rf"\max({bomb}, 1)", rf"\foo {{ {bomb} }}}}"):
            for answer, truth in ((text, bomb), (bomb, text), (text, "3")):
                started = time.process_time()
                RULES["math"](answer, truth)
                assert time.process_time() - started < LIMIT_S, (answer[:200], truth[:200])


def test_verdicts_do_not_depend_on_what_was_scored_before() -> None:
    rng = random.Random(5)
    items = [(r, TRUTHS[i % len(TRUTHS)]) for i, r in enumerate(responses(random.Random(6))) if i % 10 == 2]
    first = [score("math", r, t, format="none").score for r, t in items]
    order = list(range(len(items)))
    rng.shuffle(order)
    again = {i: score("math", *items[i], format="none").score for i in order}
    assert first == [again[i] for i in range(len(items))]
