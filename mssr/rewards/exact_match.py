r"""The paper's reward: `<think>...</think>`, then a `\boxed{}` that equals the answer.

Source: MSSR, arXiv 2512.18215. Every step here is linear in the length of the text: a response may be
100,000 characters of braces, and a backtracking pattern would hang on it.
"""

from __future__ import annotations

import re

from mssr.rewards.base import RewardResult

_OPEN, _CLOSE = "<think>", "</think>"
# A box, an escaped character (so that \{ and \} are no braces), or a brace.
_TOKEN = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
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
    accuracy = float(normalise(boxed) == normalise(unwrap(answer)))
    return RewardResult(accuracy, {"accuracy": accuracy, "format": 1.0})


def final_answer(response: str) -> str | None:
    """Content of the last box after the thinking; None if the format is not kept."""
    text = response.lstrip()
    if not text.startswith(_OPEN):
        return None
    _, closed, solution = text[len(_OPEN) :].partition(_CLOSE)
    boxed = last_boxed(solution) if closed else None
    return boxed if boxed and not boxed.isspace() else None


def last_boxed(text: str) -> str | None:
    r"""Content of the closed ``\boxed{...}`` that starts last, with its inner braces; None without one.

    ``\boxed{\frac{1}{2}}`` gives ``\frac{1}{2}``, ``\boxed{a} \boxed{b`` gives ``a``, and of nested
    boxes the inner one counts.
    """
    open_braces: list[int] = []  # where the content of a box starts, or -1 for another brace
    best: tuple[int, int] | None = None
    for token in _TOKEN.finditer(text):
        if token["box"]:
            open_braces.append(token.end())
        elif token["open"]:
            open_braces.append(-1)
        elif token["close"] and open_braces:
            start = open_braces.pop()
            if start >= 0 and (best is None or start > best[0]):
                best = (start, token.start())
    return None if best is None else text[best[0] : best[1]]


def unwrap(answer: str) -> str:
    """``<answer> 8 </answer>`` -> ``8``, as in the Vision-R1-rl data; anything else is unchanged."""
    text = answer.strip()
    if text.startswith("<answer>") and text.endswith("</answer>"):
        return text[len("<answer>") : -len("</answer>")].strip()
    return answer


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
