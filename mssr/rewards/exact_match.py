r"""The paper's reward: `<think>...</think>`, then a `\boxed{}` that equals the answer.

Source: MSSR, arXiv 2512.18215. Every step here is linear in the length of the text: a response may be
100,000 characters of braces, and a backtracking pattern would hang on it.
"""

from __future__ import annotations

import re

from mssr.rewards.base import RewardResult
from mssr.rewards.extraction import final_answer, last_boxed, unwrap

__all__ = ["exact_match", "last_boxed", "normalise"]

_SPACE = re.compile(r"\s+")


def exact_match(response: str, answer: str, /) -> RewardResult:
    r"""1 if the response has the format and the last box after the thinking equals the answer, else 0.

    The format: the response starts with ``<think>`` (white space before it is allowed), a
    ``</think>`` follows, and after the first of those stands a closed ``\boxed{}`` that is not blank.
    The thinking may be empty, and text may stand around the box.

    Args:
        response: The model's text.
        answer: The ground truth; ``<answer>...</answer>`` around it is taken off.

    Returns:
        score = ``accuracy`` in {0, 1}, and the parts ``accuracy`` and ``format``. There is no credit
        for the format alone, and none for a right answer without it.
    """
    boxed = final_answer(response)
    if boxed is None:
        return RewardResult(0.0, {"accuracy": 0.0, "format": 0.0})
    accuracy = float(grade(boxed, unwrap(answer)))
    return RewardResult(accuracy, {"accuracy": accuracy, "format": 1.0})


def grade(answer: str, truth: str) -> bool:
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
    return _SPACE.sub(" ", text[start:end]).casefold()
