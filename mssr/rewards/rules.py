r"""The named reward rules and how an accuracy and a format become one score.

========== ===============================================================================================
exact_match the paper's (MSSR, arXiv 2512.18215): string equality after `exact_match.normalise`
math        the same number, expression, set, interval, equation, choice or word, see `math_rule`
choice      the same letter or letters of a multiple-choice question, see `choice`
number      a number within a tolerance, see `number`
========== ===============================================================================================

Everything here is a pure function of its arguments: no threads, signals, clocks or random numbers, so that
a rule gives the same verdict in any process. Whoever calls it enforces the time limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol

from mssr.rewards import choice, exact_match, math_rule, number
from mssr.rewards.base import RewardResult
from mssr.rewards.extraction import final_answer, lenient_answer, unwrap

Format = Literal["gate", "weighted", "none"]
FORMATS: tuple[Format, ...] = ("gate", "weighted", "none")


class Rule(Protocol):
    """Accuracy of an extracted final answer, in [0, 1]; the options are keyword arguments with defaults."""

    def __call__(self, answer: str, truth: str) -> bool | float: ...


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "exact_match": exact_match.grade,
        "math": math_rule.grade,
        "choice": choice.grade,
        "number": number.grade,
    }
)


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

    A response keeps the format (part 1, else 0) if it starts with ``<think>``, a ``</think>`` follows, and
    after that stands a closed ``\boxed{}`` that is not blank, see `extraction.final_answer`.

    - ``gate``: the accuracy counts only with the format; the score is the accuracy.
    - ``weighted``: (1 - format_weight) * accuracy + format_weight * format, the answer being the one of
      the format if it is kept, else `extraction.lenient_answer` (boxes only for exact_match).
    - ``none``: the accuracy of the same answer alone; the format is only reported.

    Args:
        rule_name: A key of `RULES`.
        response: The model's text.
        truth: The ground truth; ``<answer>...</answer>`` around it is taken off.
        format: One of `FORMATS`.
        format_weight: In [0, 1].
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
