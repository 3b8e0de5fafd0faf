r"""Multiple choice: the letters of the right options, or the text of the one that the truth shows."""

from __future__ import annotations

import re

from mssr.rewards import latex

LETTERS = "ABCDEFGHIJ"
ANNOUNCED = re.compile(
    r"^(?:(?:the|my|so|final|correct|right|best)\s+)*(?:answer|option|choice)s?(?:\s+is|\s+are)?\s*[:=]?\s*"
    r"(?:option|choice)?\s*",
    re.IGNORECASE,
)
"""What may stand before an answer: "The answer is", "Option"."""
_LABEL = re.compile(r"^[\[(]?\s*([A-Za-z])\s*(?:[\])]\s*[.:,]?|[.:](?!\d))\s*(.*)$", re.DOTALL)
_SEPARATOR = re.compile(r"[\s,;&.()\[\]]+|\band\b")
_MAX_LENGTH = 500


def grade(answer: str, truth: str, *, letters: str = LETTERS) -> bool:
    r"""Whether the answer chooses the right option.

    - A truth of one or several letters (``B``, ``(B)``, ``B. 12 cm``, ``ACD``, ``A, C``): the answer's
      letters must be the same set. Any spelling with a delimiter is read: ``(b)``, ``B.``, ``\text{B}``,
      ``option B``, ``B: 12 cm``. Of ``B. 12 cm`` the letter counts and not the text.
    - A truth that shows the option's text (``B. 12 cm``) is also met by the text alone, as `math` compares.
    - A truth without a letter (``12 cm``) is met by the text, also behind a letter (``B. 12 cm``). A letter
      alone does not match it: which text it stands for is not known here.

    Args:
        answer: The final answer.
        truth: The ground truth.
        letters: The letters that name an option.
    """
    from mssr.rewards import math_rule

    chosen, chosen_text = read(answer, letters)
    right, right_text = read(truth, letters)
    if right and chosen:
        return chosen == right
    if right:
        return bool(right_text) and math_rule.same(answer, right_text)
    text = chosen_text if chosen else answer
    return bool(text) and math_rule.same(text, truth)


def read(text: str, letters: str = LETTERS) -> tuple[frozenset[str], str]:
    """The letters that a text chooses, and the text of the option if one letter stands before it."""
    if len(text) > _MAX_LENGTH:
        return frozenset(), ""
    text = re.sub(r"^([\s$(]*[A-Za-z]\)?)、", r"\1. ", text)
    text = re.sub("[⟪⟫]", "", latex.clean(text)).strip()
    text = ANNOUNCED.sub("", text, count=1).strip(" *'\"")
    while latex.enclosed(text) and len(text) > 3:
        text = text[1:-1].strip()
    label = _LABEL.match(text)
    if label and label[1].upper() in letters and _is_option(label[2]):
        return frozenset(label[1].upper()), label[2].strip()
    if len(text) == 1:
        return (frozenset(text.upper()), "") if text.upper() in letters else (frozenset(), "")
    parts = [part for part in _SEPARATOR.split(text) if part]
    if len(parts) == 1 and parts[0].isupper() and len(set(parts[0])) == len(parts[0]):
        parts = list(parts[0])  # "ABD"
    if parts and all(len(part) == 1 and part in letters for part in parts):
        return frozenset(parts), ""
    return frozenset(), ""


def _is_option(text: str) -> bool:
    """Whether what follows a letter is an option's text, not a further letter ("A, B", "(A) or (B)")."""
    return not re.match(
        r"\s*(?:(?:or|and|,)\s*)?[\[(]?[A-J][\])]?\s*[.,]?\s*$|\s*[-+*/=^<>]|\s*(?:or|and)\b", text
    )
