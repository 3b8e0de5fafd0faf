"""The reward rules: where the answer is found, what the format is worth, choices, numbers, expressions."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
from fractions import Fraction

import pytest

from mssr.rewards import latex, symbolic, units
from mssr.rewards.base import RewardResult
from mssr.rewards.extraction import last_boxed, lenient_answer, outside_thinking, unwrap
from mssr.rewards.rules import RULES, score

pytestmark = pytest.mark.unit
math_rule, choice, number = RULES["math"], RULES["choice"], RULES["number"]


# --- where the answer is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"<think>\boxed{3}</think>\boxed{8}", "8"),
        (r"<think>a</think>\boxed{3}<think>b</think>\boxed{8}", "8"),
        (r"\boxed{8}<think>\boxed{3}</think> done", "8"),
        (r"\boxed{8}<think>\boxed{3}", "8"),
        (r"\boxed{3}</think>\boxed{8}", "8"),
        (r"\boxed{8}", "8"),
        (r"<think>\boxed{3}</think> The answer is 8.", "8"),
        ("<think>x</think><answer> 8 </answer>", "8"),
        ("<answer>3</answer> or <answer>8</answer>", "8"),
        ("Answer: 3\nFinal answer: 8 cm\nThat is all.", "8 cm"),
        ("So the answer is **8**", "8"),
        ("The answer is 3.5. I am sure.", "3.5"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("答案：5", "5"),
        ("因此答案为5。", "5"),
        ("The answer is 5 (see figure 3)", "5"),
        ("The answer is 5, not 6.", "5"),
        ("The answer is 5 because 2 + 3 = 5.", "5"),
        ("The answer is 5 (or 6)", "5 (or 6)"),
        ("The answer is 5 or 6, not 7.", "5 or 6"),
        ("The answer is not 5", "not 5"),
        ("The value of $x$ is 5.", "5"),
        ("8", "8"),
        (r"\boxed{} 8", r"\boxed{} 8"),
        (r"\boxed{3}</think>", None),
        (r"<think>\boxed{3}", None),
        (r"<think>\boxed{3}</think>", None),
        ("", None),
        ("first line\nsecond line", None),
        ("word " * 100, None),
    ],
)
def test_lenient_answers(response: str, answer: str | None) -> None:
    assert lenient_answer(response) == answer


def test_boxes_only() -> None:
    assert lenient_answer("The answer is 8", boxed_only=True) is None
    assert lenient_answer(r"text \boxed{8}", boxed_only=True) == "8"


def test_outside_thinking() -> None:
    assert outside_thinking("a<think>b</think>c<think>d</think>e").split() == ["a", "c", "e"]
    assert outside_thinking("a</think>b<think>c") == "b"
    assert outside_thinking("abc") == "abc"


def test_unwrap_takes_off_the_tags_of_vision_r1() -> None:
    assert unwrap("<answer> 8 </answer>") == "8" and unwrap("8 </answer>") == "8 </answer>"
    for rule in RULES:
        assert score(rule, r"<think></think>\boxed{8}", "<answer>8</answer>").score == 1.0


# --- the format ---------------------------------------------------------------------------------

GOOD, WRONG, UNFORMATTED, UNBOXED = (
    r"<think>x</think>\boxed{8}",
    r"<think>x</think>\boxed{9}",
    r"so \boxed{8}",
    "The answer is 8.",
)


@pytest.mark.parametrize(
    ("form", "response", "total", "accuracy", "kept"),
    [
        ("gate", GOOD, 1.0, 1.0, 1.0),
        ("gate", WRONG, 0.0, 0.0, 1.0),
        ("gate", UNFORMATTED, 0.0, 0.0, 0.0),
        ("weighted", GOOD, 1.0, 1.0, 1.0),
        ("weighted", WRONG, 0.2, 0.0, 1.0),
        ("weighted", UNFORMATTED, 0.8, 1.0, 0.0),
        ("weighted", UNBOXED, 0.8, 1.0, 0.0),
        ("weighted", "no idea", 0.0, 0.0, 0.0),
        ("none", GOOD, 1.0, 1.0, 1.0),
        ("none", WRONG, 0.0, 0.0, 1.0),
        ("none", UNFORMATTED, 1.0, 1.0, 0.0),
        ("none", UNBOXED, 1.0, 1.0, 0.0),
    ],
)
def test_what_the_format_is_worth(
    form: str, response: str, total: float, accuracy: float, kept: float
) -> None:
    result = score("math", response, "8", format=form, format_weight=0.2)
    assert result.score == pytest.approx(total)
    assert result.parts == {"accuracy": accuracy, "format": kept}


def test_exact_match_wants_a_box_in_every_format() -> None:
    for form in ("weighted", "none"):
        assert score("exact_match", UNBOXED, "8", format=form).score == 0.0
        assert score("exact_match", UNFORMATTED, "8", format=form).parts["accuracy"] == 1.0


def test_exact_match_compares_text_and_math_values() -> None:
    blank = RewardResult(0.0, {"accuracy": 0.0, "format": 0.0})
    assert score("exact_match", r"<think></think>\boxed{}", "8") == blank
    assert score("exact_match", r" <think></think>\boxed{ 8 }", "8").score == 1.0
    assert score("exact_match", r"<think></think>\boxed{8.0}", "8").score == 0.0
    assert score("math", r"<think></think>\boxed{8.0}", "8") == RewardResult(
        1.0, {"accuracy": 1.0, "format": 1.0}
    )


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown reward rule 'maths'"):
        score("maths", GOOD, "8")
    with pytest.raises(ValueError, match="format must be one of"):
        score("math", GOOD, "8", format="strict")
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="format_weight"):
            score("math", GOOD, "8", format_weight=weight)
    with pytest.raises(TypeError, match="tolerence"):
        score("number", GOOD, "8", tolerence=0.1)


# --- choices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("B", "B", True),
        ("B", "b", True),
        ("B", "(b).", True),
        ("B", r"\text{(B)}", True),
        ("B", "Ｂ", True),
        ("B", "option B", True),
        ("B", "The correct answer is (B)", True),
        ("B", "B: because of A", True),
        ("B", "B and C", False),
        ("B", "(A) or (B)", False),
        ("B", "Bar", False),
        ("B", "", False),
        ("B", "选B", True),
        ("B", "I choose B.", True),
        ("B", "B is correct", True),
        ("B", "B, not C", True),
        ("B", "C, not B", False),
        ("B", "It is not B", False),
        ("B", "B. or maybe C", False),
        ("ACD", "A, C, D", True),
        ("ACD", "DCA", True),
        ("A,C", "(A) and (C)", True),
        ("A,C", "A", False),
        ("B. 12 cm", "B", True),
        ("B. 12 cm", "A", False),
        ("B. 12 cm", r"12\text{ cm}", True),
        ("12 cm", "B. 12 cm", True),
        ("12 cm", "B. 13 cm", False),
        ("12 cm", "B", False),
        ("K", "K", True),  # no option letter: text
    ],
)
def test_choice(truth: str, answer: str, right: bool) -> None:
    assert choice(answer, truth) is right


def test_choice_letters() -> None:
    assert score("choice", r"<think></think>\boxed{(Q)}", "Q", letters="PQRS").score == 1.0
    assert score("choice", r"<think></think>\boxed{(P)}", "Q", letters="PQRS").score == 0.0


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("100", "101", True),
        ("100", "101.01", False),
        ("100", "99", True),
        ("-100", "-101", True),
        ("100", "-100", False),
        ("3.14", r"\pi", True),
        ("1.41", r"\sqrt{2}", True),
        (r"\frac{1}{3}", "0.333", True),
        ("0", "0.000000001", False),
        ("0", "0.0", True),
        ("1.6e-19", "0", False),
        ("1.6e-19", r"1.61\times10^{-19}", True),
        ("12", "approximately 12.1", True),
        ("12", r"12 \approx 12.1", False),
        ("0", "0.0001", False),
        ("0.0000001", "0.0000002", False),
        ("1,000", "1005", True),
        ("50%", "0.5", True),
        ("50%", "50", True),
        ("12 cm", "12.1", True),
        ("12 cm", "12.1 m", False),
        ("12", r"x \approx 12.1\text{ cm}", True),
        ("12", "x = 12.1", True),
        ("12", "12 or 13", False),
        ("12", "twelve", False),
        ("twelve", "twelve", False),
        ("x", "x", False),
        ("12", "i", False),
        ("12", "1/0", False),
        ("", "", False),
    ],
)
def test_number(truth: str, answer: str, right: bool) -> None:
    assert number(answer, truth) is right


def test_number_tolerances() -> None:
    def graded(answer: str, **options: float) -> float:
        return score("number", rf"<think></think>\boxed{{{answer}}}", "100", **options).score

    assert graded("104", tolerance=0.05) == 1.0 and graded("106", tolerance=0.05) == 0.0
    assert graded("100.001", tolerance=0.0) == 0.0 and graded("100.0", tolerance=0.0) == 1.0
    assert graded("104", tolerance=0.0, absolute=4.0) == 1.0 and graded("105", absolute=4.0) == 0.0


def test_math_with_a_tolerance() -> None:
    assert not math_rule("1.41421", r"\sqrt{2}") and not math_rule("(1, 1.414)", r"(1, \sqrt2)")
    for answer, truth in (
        ("1.41421", r"\sqrt{2}"),
        ("(1, 1.414)", r"(1, \sqrt2)"),
        ("x = 1.41 cm", r"\sqrt{2}"),
    ):
        result = score("math", rf"<think></think>\boxed{{{answer}}}", truth, tolerance=1e-2)
        assert result.score == 1.0
    assert score("math", r"<think></think>\boxed{1.5}", r"\sqrt{2}", tolerance=1e-2).score == 0.0


# --- expressions and units ----------------------------------------------------------------------


def test_expanded_polynomials_are_equal_and_changed_ones_are_not() -> None:
    rng = random.Random(1)
    for _ in range(50):
        a, b, c, d = (rng.randrange(-9, 10) for _ in range(4))
        product = f"({a}x+({b}))({c}x+({d}))"
        expanded = f"{a * c}x^2+({a * d + b * c})x+({b * d})"
        assert math_rule(expanded, product), (product, expanded)
        assert not math_rule(f"{expanded}+1", product)


UNREAD = (
    r"9^{9^{9}} 9^9^9 1000! 5!! (9!)! \binom{10^9}{3} \exp(10^9) \sqrt[100]{2} 2^{x!} word \foo 2?3 "
    r"1\frac32 5_6 \int_0^1{x}"
).split()


LONG = ["1" * 21, "(" * 9 + "2" + ")" * 9, "x+" * 200 + "1"]


@pytest.mark.parametrize("text", [*UNREAD, *LONG, "", "2 3"])
def test_what_is_unknown_or_could_explode_never_reaches_sympy(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    monkeypatch.setattr("math_verify.parse", lambda latex, *a, **options: parsed.append(latex))
    assert symbolic.expression.__wrapped__(latex.clean(text)) is None and not parsed


def test_what_reaches_sympy_has_exact_decimals_and_separate_letters() -> None:
    assert symbolic.value(latex.clean("0.5a - a/2"), True) == 0
    assert symbolic.value(latex.clean("ab - ba"), True) == 0
    assert symbolic.value(latex.clean("2(3)")) == 6  # math-verify reads 2(3) as 5
    assert symbolic.value(latex.clean(r"\sin 30^\circ")) == pytest.approx(0.5)


def test_plain_numbers_are_read_exactly_and_without_sympy() -> None:
    for text in ("0.125", "1/8", r"\frac{1}{8}", "1.25e-1", r"1.25\times 10^{-1}"):
        assert symbolic.value(latex.clean(text)) == Fraction(1, 8), text
    assert symbolic.value("9" * 201) is None  # more digits than a float could hold


def test_units_have_one_name() -> None:
    for spelling in (
        "cm^2",
        "cm²",
        r"\text{cm}^2",
        "square centimeters",
        "sq. cm",
        "cm squared",
        "cm*cm",
        "cm2",
        "平方厘米",
    ):
        assert units.canonical(latex.clean(spelling)) == "cm^2", spelling
    for spelling in ("km/h", "km per hour", "kilometers per hour", "kmph", r"km \cdot h^{-1}", "千米/时"):
        assert units.canonical(latex.clean(spelling)) == "h^-1 km", spelling
    for spelling in ("x", "trillion", "fifths", "cm +", "", "3", "below zero", "per cent"):
        assert units.canonical(spelling) == ""
    assert units.split("2x") == ("2x", "") and units.split("5m") == ("5m", "")
    assert units.split("5 m") == ("5", "m") and units.split("0.5A") == ("0.5", "A")
    assert units.split(latex.clean("$5 million")) == ("5*10^{6}", "＄")


def test_money_before_a_number_is_its_unit() -> None:
    for answer, truth in (("Rs. 50", "50"), ("US$50", "$50"), ("-$50", "-50"), ("$3, $5", "5, 3")):
        assert math_rule(answer, truth), answer
    for answer, truth in (("5$600", "5600"), ("5 USD 600", "5600"), ("€50", "$50")):
        assert not math_rule(answer, truth), answer


@pytest.mark.parametrize("answer", ["5?", "5 ?", "5？", "5??", r"\text{5?}", "5.?", "x=5?", "A?"])
def test_a_question_mark_is_a_hedge(answer: str) -> None:
    assert not math_rule(answer, "A" if "A" in answer else "5")


def test_clean_is_idempotent_on_answers_without_escapes() -> None:
    for text in (r"\dfrac{1}{2}", "$ 3 \\times 4 $", r"\left(1,\,2\right)", "½", r"30^\circ", "1\\,000"):
        once = latex.clean(text)
        assert latex.clean(once) == once


def test_last_boxed_of_nested_braces() -> None:
    assert last_boxed(r"\boxed{\frac{\sqrt{2}}{\left\{x\right\}}}") == r"\frac{\sqrt{2}}{\left\{x\right\}}"


# --- the process --------------------------------------------------------------------------------


def test_ordinary_answers_import_no_sympy() -> None:
    code = (
        "import sys; from mssr.rewards.rules import score\n"
        "for a in ('0.5', '1/2', '50%', '12 cm', '(2, 3)', '1 or 2', '$3$', '1e3'):\n"
        "    score('math', r'<think></think>\\boxed{' + a + '}', r'\\frac{1}{2}')\n"
        "assert 'sympy' not in sys.modules and 'math_verify' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_math_verify_says_nothing_and_sets_no_signal(caplog: pytest.LogCaptureFixture) -> None:
    code = (
        "import signal\n"
        "def refuse(*a): raise AssertionError('signal')\n"
        "signal.signal = signal.alarm = signal.setitimer = refuse\n"
        "from mssr.rewards.rules import RULES\n"
        r"assert RULES['math'](r'\lfloor 2.5 \rfloor', '2')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "" and done.stderr == ""
    with caplog.at_level(logging.DEBUG):
        assert math_rule(r"\lceil 2.5 \rceil", "3")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
