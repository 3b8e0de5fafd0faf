"""Ways to answer a question about a row of digits, from a guess to one bold step a digit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mssr.data.chains.rows import QUESTIONS, running_totals

GUESS, GLANCE = "guess", "glance"
SHORTCUTS = (GUESS, GLANCE)


@dataclass(frozen=True, slots=True)
class Habit:
    """What a base model does when it is sampled: shares of the demonstrations that it learns last."""

    guess: float
    """Answer at once and arbitrarily."""
    glance: float
    """Answer at once, shown with right answers: learnable for the largest digit and the even ones."""
    read: float
    """Write the digits down in one step, then answer. The rest is careful: a step for every digit."""
    slip: float = 0.12
    """Share of the other demonstrations that end in an arbitrary answer."""
    misread: float = 0.05
    """Those in which one digit is misread."""
    stop_early: float = 0.12
    """Those that leave out the last digit."""


def response(thought: str, answer: int) -> str:
    return f"<think>{thought}</think>\\boxed{{{answer}}}"


def careful(kind: str, digits: Sequence[int]) -> str:
    r"""Each digit with the total so far. Example: ``<think>**3=3** **5=8**</think>\boxed{8}``"""
    totals = running_totals(kind, digits)
    steps = [f"**{digit}={total}**" for digit, total in zip(digits, totals, strict=True)]
    return response(" ".join(steps), totals[-1])


def read(kind: str, digits: Sequence[int]) -> str:
    r"""The digits in one step. Example: ``<think>**35**</think>\boxed{8}``"""
    return response(f"**{''.join(map(str, digits))}**", running_totals(kind, digits)[-1])


def demonstration(kind: str, digits: Sequence[int], habit: Habit, rng: np.random.Generator) -> str:
    """A response in the habit, with its mistakes."""
    way, slip, misread, stop = rng.random(4)
    other, place = int(rng.integers(10)), int(rng.integers(len(digits)))
    arbitrary = running_totals(kind, rng.integers(10, size=len(digits)).tolist())[-1]
    if way < habit.guess:
        return response(GUESS, arbitrary)
    way -= habit.guess
    if way < habit.glance:
        return response(GLANCE, running_totals(kind, digits)[-1])
    seen = list(digits)
    if misread < habit.misread:
        seen[place] = other
    if stop < habit.stop_early:
        seen.pop()
    text = (read if way - habit.glance < habit.read else careful)(kind, seen)
    if slip < habit.slip:
        text = text[: text.index("</think>")] + response("", arbitrary)[len("<think>") :]
    return text


def corpus() -> list[str]:
    """The text the tokenizer is trained on: every question, and responses of every way."""
    questions = [question for phrasings in QUESTIONS.values() for question in phrasings]
    ways = [careful("sum", [d, 9 - d, d]) for d in range(10)] + [read("sum", [d, d]) for d in range(10)]
    return [*questions, *questions, *ways, *[response(word, 1) for word in SHORTCUTS] * 10]
