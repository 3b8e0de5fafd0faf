"""A number within a tolerance."""

from __future__ import annotations

from mssr.rewards import math_rule


def grade(answer: str, truth: str, *, tolerance: float = 1e-2, absolute: float = 0.0) -> bool:
    r"""Whether |answer - truth| <= max(tolerance * |truth|, absolute), both ends included.

    Numbers are read as by `math`: fractions, roots, thousands separators, percent, scientific notation, units
    (different units are wrong), a name before ``=`` and "about" before the number. An answer or truth that is no
    number, or several, is wrong.

    Args:
        answer: The final answer.
        truth: The ground truth.
        tolerance: Relative to the truth: nothing but 0 is near a truth of 0.
        absolute: A distance that is always near enough, in the truth's unit; for truths near zero.
    """
    return math_rule.same_number(answer, truth, tolerance=tolerance, absolute=absolute)
