r"""Where the answer stands in a response: boxes, `<answer>` tags, phrases, and the format of the paper.

Every step here is linear in the length of the text: a response may be 100,000 characters of braces, and
a backtracking pattern would hang on it.
"""

from __future__ import annotations

import re

_OPEN, _CLOSE = "<think>", "</think>"
_THINKING = re.compile(rf"{_OPEN}.*?(?:({_CLOSE})|\Z)", re.DOTALL)
# A box, an escaped character (so that \{ and \} are no braces), or a brace.
_TOKEN = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
_PHRASE = re.compile(
    r"(?:answer|result|value|solution|choice|option)(?:\*\*)?(?:\s{1,3}of\s{1,3}\S{1,12})?\s{0,3}"
    r"(?:is\s{0,3}(?:equal\s{1,3}to\b|[:=])?|[:=：])\s{0,3}"
    r"|(?:答案|结果)\s{0,3}(?:是|为)?\s{0,3}[:：]?\s{0,3}|故选\s{0,3}[:：]?\s{0,3}|(?:^|\n)####\s{0,3}",
    re.IGNORECASE,
)
# What may follow an answer and does not change it. A hedge like "(or 6)" does, and stays.
_ASIDE = re.compile(
    r"\s*\((?:see|from|as|in|by|cf|not(?!\s+sure))\b[^()]*\)\s*$|,?\s+(?:and |but )?not\s(?!sure)[^,;()]*$|"
    r"[，,]\s*而?不是[^，,]*$|,?\s+(?:because|since|as shown|as seen)\b.*$",
    re.IGNORECASE,
)
_END_OF_ANSWER = re.compile(r"\n|[.;。](?=\s|$)")
_TAIL = 4_000
"""Characters at the end of a response that are searched for a phrase."""
_WHOLE = 200
"""A text without a phrase is its own answer if it is one line of at most so many characters."""


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
    r"""``<answer> 8 </answer>``, as in the Vision-R1-rl data, and ``\boxed{8}`` -> ``8``; else unchanged."""
    text = answer.strip()
    if text.startswith("<answer>") and text.endswith("</answer>"):
        return text[len("<answer>") : -len("</answer>")].strip()
    bare = text.strip("$ ")
    inner = last_boxed(bare) if bare.startswith("\\boxed") else None
    return inner if inner and bare == rf"\boxed{{{inner}}}" else answer


def lenient_answer(response: str, *, boxed_only: bool = False) -> str | None:
    r"""The answer of a response that need not keep the format; None if there is none.

    The first of these that is there and not blank:

    1. the last closed ``\boxed{}`` after the last ``</think>``;
    2. the last closed ``\boxed{}`` outside the thinking (an unclosed ``<think>`` reaches to the end, a
       ``</think>`` without ``<think>`` starts at the beginning);
    3. the last ``<answer>...</answer>`` outside the thinking;
    4. what follows the last "answer is", "answer:", "result is", "答案", "####" or the like, up to the end of
       the line or sentence, without "(see figure 3)" or ", not 6" at its end;
    5. the whole text outside the thinking, if it is a single line of at most 200 characters.

    Args:
        boxed_only: Stop after the second.
    """
    tail = response.rpartition(_CLOSE)[2] if _CLOSE in response else ""
    visible = outside_thinking(response)
    for text in (tail if _OPEN not in tail else "", visible):
        boxed = last_boxed(text)
        if boxed and not boxed.isspace():
            return boxed
    if boxed_only:
        return None
    before, tag, _ = visible.rpartition("</answer>")
    if tag and "<answer>" in before:
        inner = before.rpartition("<answer>")[2].strip()
        if inner:
            return inner
    text = visible.strip()
    phrases = list(_PHRASE.finditer(text[-_TAIL:]))
    if phrases:
        rest = text[-_TAIL:][phrases[-1].end() :]
        end = _END_OF_ANSWER.search(rest)
        answer = (rest[: end.start()] if end else rest).strip(" *\t")
        answer = _ASIDE.sub("", answer[:_WHOLE]) + answer[_WHOLE:]
        if answer:
            return answer
    return text if text and len(text) <= _WHOLE and "\n" not in text else None


def outside_thinking(response: str) -> str:
    """The text without its ``<think>...</think>`` spans, which end at the first ``</think>`` after them."""
    first_open, first_close = response.find(_OPEN), response.find(_CLOSE)
    if first_close >= 0 and not 0 <= first_open < first_close:
        response = response[first_close + len(_CLOSE) :]
    return _THINKING.sub(lambda span: " " if span[1] else "", response)
