r"""The named reward rules and how an accuracy and a format become one score.

Everything here is a pure function of its arguments, without threads, signals, clocks or random numbers: the
verdict is the same in any process. Whoever calls it enforces the time limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mssr.rewards import choice, latex, math_rule
from mssr.rewards.base import RewardResult
from mssr.rewards.extraction import final_answer, lenient_answer, unwrap

FORMATS = ("gate", "weighted", "none")


def grade_exactly(answer: str, truth: str) -> bool:
    r"""Equality after `normalise`; of a truth ``\boxed{4}`` the content counts. A blank answer is wrong."""
    return not (not answer or answer.isspace()) and normalise(answer) == normalise(unwrap(truth))


def normalise(text: str) -> str:
    """What two spellings of one answer share.

    Off come outer white space, full stops at the end and ``$`` pairs around the whole, in any order;
    white space inside becomes one space; case is folded. ``" $X  = 3$. "`` gives ``"x = 3"``.
    """
    start, end = 0, len(text)
    # Two indices and not repeated slicing, which would be quadratic in a run of "$" or ".".
    while start < end:
        if text[start].isspace():
            start += 1
        elif text[end - 1].isspace() or text[end - 1] == ".":
            end -= 1
        elif end - start >= 2 and text[start] == text[end - 1] == "$":
            start, end = start + 1, end - 1
        else:
            break
    return re.sub(r"\s+", " ", text[start:end]).casefold()


def grade_math(answer: str, truth: str, *, tolerance: float = 0.0) -> bool:
    """Whether the answer is the same as the truth; ``tolerance`` is of numbers, relative to the truth's."""
    answer, truth = answer.strip(), truth.strip()
    if not answer or answer == truth or max(len(answer), len(truth)) > latex.MAX_LENGTH:
        return answer == truth != ""
    if choice.names_option(truth):
        return grade_choice(answer, truth, letters="ABCDEFGH")
    if re.fullmatch("[A-H]{2,6}", truth) and re.sub(r"[\s,;&()]+|and|和", "", latex.clean(answer)) == truth:
        return True
    texts = choice.unannounced(answer), choice.read(answer, "ABCDEFGH")[1]  # A. 12 cm
    return any(math_rule.same(text, truth, tolerance=tolerance) for text in texts)


def grade_choice(answer: str, truth: str, *, letters: str = choice.LETTERS) -> bool:
    r"""Whether the answer chooses the right option.

    - A truth of one or several letters (``B``, ``(B)``, ``B. 12 cm``, ``ACD``, ``A, C``): the answer's
      letters must be the same set, see `choice.read`. Of ``B. 12 cm`` the letter counts and not the text.
    - A truth that shows the option's text (``B. 12 cm``) is also met by the text alone, as `math` compares.
    - A truth without a letter (``12 cm``) is met by the text, also behind a letter (``B. 12 cm``). A letter
      alone does not match it: which text it stands for is not known here.

    Args:
        letters: Those that name an option.
    """
    chosen, chosen_text = choice.read(answer, letters)
    right, right_text = choice.read(truth, letters)
    if right and chosen:
        return chosen == right
    if right:
        return bool(right_text) and math_rule.same(answer, right_text)
    text = chosen_text if chosen else answer
    return bool(text) and math_rule.same(text, truth)


def grade_number(answer: str, truth: str, *, tolerance: float = 1e-2, absolute: float = 0.0) -> bool:
    r"""Whether |answer - truth| <= max(tolerance * |truth|, absolute), both ends included.

    Numbers are read as by `math`: fractions, roots, thousands separators, percent, scientific notation, units
    (different units are wrong), a name before ``=``, "about" before the number. An answer or truth that is no
    number, or several, is wrong.

    Args:
        tolerance: Relative to the truth: nothing but 0 is near a truth of 0.
        absolute: A distance that is always near enough, in the truth's unit; for truths near zero.
    """
    if max(len(answer), len(truth)) > latex.MAX_LENGTH:
        return False
    a, t = math_rule.stated(latex.clean(choice.unannounced(answer))), math_rule.stated(latex.clean(truth))
    if a is None or t is None or math_rule.number(a) is None or math_rule.number(t) is None:
        return False
    return math_rule.same_values(a, t, tolerance, absolute)


RULES: dict[str, Callable[..., bool]] = {
    "exact_match": grade_exactly,
    "math": grade_math,
    "choice": grade_choice,
    "number": grade_number,
}
"""Each tells whether a final answer meets a truth; its keyword arguments are the options of the rule."""


def score(
    rule_name: str,
    response: str,
    truth: str,
    *,
    format: str = "gate",
    format_weight: float = 0.1,
    **options: object,
) -> RewardResult:
    r"""The score of one response by one rule, with the parts ``accuracy`` and ``format``.

    A response keeps the format (part 1, else 0) if it starts with ``<think>`` (white space before it is
    allowed), a ``</think>`` follows, and after the first of those stands a closed ``\boxed{}`` that is not
    blank. The thinking may be empty, and text may stand around the box.

    - ``gate``: the accuracy counts only with the format; the score is the accuracy. With ``exact_match``
      this is the reward of the paper (MSSR, arXiv 2512.18215).
    - ``weighted``: (1 - format_weight) * accuracy + format_weight * format, the answer being the one of
      the format if it is kept, else `extraction.lenient_answer` (boxes only for exact_match).
    - ``none``: the accuracy of the same answer alone; the format is only reported.

    Args:
        truth: The ground truth; ``<answer>...</answer>`` around it is taken off.
        options: Keyword arguments of the rule.

    Raises:
        ValueError: No such rule or format, or a weight outside [0, 1].
        TypeError: The rule has no such option.
    """
    if rule_name not in RULES:
        raise ValueError(f"unknown reward rule {rule_name!r}: one of {sorted(RULES)}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {list(FORMATS)}, not {format!r}")
    if not 0 <= format_weight <= 1:
        raise ValueError(f"format_weight must be in [0, 1], not {format_weight}")
    answer = final_answer(response)
    kept = float(answer is not None)
    if answer is None and format != "gate":
        answer = lenient_answer(response, boxed_only=rule_name == "exact_match")
    accuracy = 0.0 if answer is None else float(RULES[rule_name](answer, unwrap(truth), **options))
    total = (1 - format_weight) * accuracy + format_weight * kept if format == "weighted" else accuracy
    return RewardResult(total, {"accuracy": accuracy, "format": kept})
