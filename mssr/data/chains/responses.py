"""Ways to answer a question about a row of digits: a guess, a glance, or one bold step a digit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mssr.data.chains.rows import QUESTIONS, running_totals


@dataclass(frozen=True, slots=True)
class Habit:
    """Shares of the ways among demonstrations, and of the mistakes among careful ones."""

    guess: float
    """Answer at once and arbitrarily."""
    glance: float
    """Answer at once, shown with right answers: learnable for the largest digit and the even ones. The rest
    is careful."""
    slip: float = 0.0
    """The answer is arbitrary."""
    misread: float = 0.0
    """One digit is misread."""
    stop_early: float = 0.0
    """The last digit is left out."""


def response(thought: str, answer: int) -> str:
    return f"<think>{thought}</think>\\boxed{{{answer}}}"


def steps(kind: str, digits: Sequence[int]) -> str:
    """Each digit with the total so far. Example: ``**3=3** **5=8**``"""
    return " ".join(
        f"**{digit}={total}**" for digit, total in zip(digits, running_totals(kind, digits), strict=True)
    )


def demonstration(kind: str, digits: Sequence[int], habit: Habit, rng: np.random.Generator) -> str:
    """A response in the habit."""
    way, slip, misread, stop = rng.random(4)
    seen, other, place = list(digits), int(rng.integers(10)), int(rng.integers(len(digits)))
    arbitrary = running_totals(kind, rng.integers(10, size=len(digits)).tolist())[-1]
    if way < habit.guess:
        return response("guess", arbitrary)
    if way < habit.guess + habit.glance:
        return response("glance", running_totals(kind, digits)[-1])
    if misread < habit.misread:
        seen[place] = other
    if stop < habit.stop_early:
        seen.pop()
    return response(steps(kind, seen), arbitrary if slip < habit.slip else running_totals(kind, seen)[-1])


def corpus() -> list[str]:
    """The text the tokenizer is trained on: every question, and responses of every way."""
    questions = [question for phrasings in QUESTIONS.values() for question in phrasings]
    thoughts = ["guess", "glance", *(steps("sum", [d, 9 - d, d]) for d in range(10))] * 10
    return [*questions, *questions, *(response(thought, 1) for thought in thoughts)]
