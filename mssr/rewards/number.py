"""A number within a tolerance."""

from __future__ import annotations

from mssr.rewards import choice, latex, math_rule


def grade(answer: str, truth: str, *, tolerance: float = 1e-2, absolute: float = 0.0) -> bool:
    r"""Whether |answer - truth| <= max(tolerance * |truth|, absolute), both ends included.

    Numbers are read as by `math`: fractions, roots, thousands separators, percent, scientific notation, units
    (different units are wrong), a name before ``=``, "about" before the number. An answer or truth that is no
    number, or several, is wrong.

    Args:
        answer: The final answer.
        truth: The ground truth.
        tolerance: Relative to the truth: nothing but 0 is near a truth of 0.
        absolute: A distance that is always near enough, in the truth's unit; for truths near zero.
    """
    if max(len(answer), len(truth)) > latex.MAX_LENGTH:
        return False
    a, t = stated(latex.clean(choice.unannounced(answer))), stated(latex.clean(truth))
    if a is None or t is None or math_rule.number(a) is None or math_rule.number(t) is None:
        return False
    return math_rule.same_values(a, t, tolerance, absolute)


def stated(text: str) -> str | None:
    r"""The one value that a canonical text states: ``\sqrt{2} \approx 1.41`` gives ``1.41``; else None."""
    text = next(iter(math_rule.sides(text)[::-1]), "")
    kind, parts = math_rule.read(text)
    value = math_rule.named(text)[1] if kind == "eq" else ""
    return stated(value) if value else parts[0] if kind == "value" and text else None
