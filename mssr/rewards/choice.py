r"""Which options of a multiple choice a text chooses, in all the ways in which models say it."""

from __future__ import annotations

import re

from mssr.rewards import latex

LETTERS = "ABCDEFGHIJ"
_ANNOUNCED = re.compile(
    r"^(?:(?:the|my|so|final|correct|right|best)\s+)*(?:answer|option|choice)s?(?:\s+is|\s+are)?\s*[:=]?\s*|"
    r"^it is\s+",
    re.IGNORECASE,
)
# Words before a letter that say nothing but that it is chosen, words behind it, and what it is told from.
_BEFORE = re.compile(
    r"^(?:.*[,;]\s*(?:so|thus|hence|therefore)\s+)?(?:(?:so|thus|hence|therefore|then|the|my|final|correct|right|best|"
    r"answers?|options?|choices?|should|must|would|will|be|is|are|i(?=\s+[a-z])|we|it|go|with|choose|pick|select|say|"
    r"think|only|clearly)\b[\s:=,]*|not\s+\(?[A-J]\)?,?\s+but\b\s*|[我认为该故应本题正确所以因此最终综上述]*"
    r"(?:答案|选项|选择|选)[是为选:]*\s*)*",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    r"(?:[\s,]+(?:because|since|as|for)\b.*|[\s,]+(?:is|are|seems)\s+(?:the\s+)?(?:correct|right|best|true|answer)(?:\s+\w+)?|"
    r"\s*(?:选项|项)?(?:正确)?)$",
    re.DOTALL,
)
_NOT = re.compile(
    r"[\s,]*(?:\(|\band\s|\bbut\s)?\s*(?:not|rather than|instead of)\s+(?:option\s+)?\(?[A-J]\)?\)?$"
)
_LABEL = re.compile(r"^[\[(]?\s*([A-Za-z])\s*(?:[\])]\s*[.:,]?|[.:](?!\d))\s*(.*)$", re.DOTALL)
_FURTHER = re.compile(
    r"\s*(?:(?:or|and|,)\s*)?[\[(]?[A-J][\])]?\s*[.,]?\s*$|\s*[-+*/=^<>]|\s*(?:or|and)\b|.*\b(?:or|maybe|perhaps)\s+\(?[A-J]\b"
)
_SEPARATOR = re.compile(r"[\s,;&.()\[\]]+|\band\b|和")
_MAX_LENGTH = 500


def read(text: str, letters: str = LETTERS) -> tuple[frozenset[str], str]:
    r"""The letters that a text chooses, and the text of the option if one letter stands before it.

    Read are ``(b)``, ``B.``, ``\text{B}``, ``option B``, ``B: 12 cm``, ``ACD``, ``A and C``, ``选B``,
    ``B, not C``, ``I would go with B``, ``B is correct``, ``B because ...``. ``B or C`` chooses none.
    """
    if len(text) > _MAX_LENGTH:
        return frozenset(), ""
    text = latex.clean(re.sub(r"^([\s$(]*[A-Za-z]\)?)[、．]", r"\1. ", text)).strip(" *'\"")
    label = _LABEL.match(_ANNOUNCED.sub("", text, count=1))
    if label and label[1].upper() in letters and not _FURTHER.match(label[2]):
        return frozenset(label[1].upper()), label[2].strip()
    for _ in range(2):
        text = _NOT.sub("", _BEHIND.sub("", text, count=1))
    text = (_BEFORE.sub("", text, count=1) or text).strip(" *'\"")
    while latex.enclosed(text) and len(text) > 3:
        text = text[1:-1].strip()
    label = _LABEL.match(text)
    if label and label[1].upper() in letters and not _FURTHER.match(label[2]):
        return frozenset(label[1].upper()), label[2].strip()
    if len(text) == 1:
        return (frozenset(text.upper()), "") if text.upper() in letters else (frozenset(), "")
    parts = [part for part in _SEPARATOR.split(text) if part]
    if len(parts) == 1 and parts[0].isupper() and len(set(parts[0])) == len(parts[0]):
        parts = list(parts[0])  # "ABD"
    if parts and all(len(part) == 1 and part in letters for part in parts):
        return frozenset(parts), ""
    return frozenset(), ""


def names_option(truth: str) -> bool:
    """Whether a truth of any kind is the letter of an option, alone or before its text."""
    if not re.match(r"\W*(?:\\(?:text|math)\w*\{)?\W*[A-H](?![A-Za-z])", truth):
        return False
    found, text = read(truth, "ABCDEFGH")
    return len(found) == 1 and bool(text or len(re.sub(r"\\[a-z]+|\W", "", truth)) == 1)


def unannounced(answer: str) -> str:
    """Without "The answer is" before it."""
    return _ANNOUNCED.sub("", answer.strip(), count=1) or answer
