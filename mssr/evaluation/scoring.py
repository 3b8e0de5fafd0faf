r"""Response text -> final answer -> verdict, by rules. Deterministic; no response leaves the denominator.

**The final answer** is found by `mssr.rewards.extraction.lenient_answer`: the last closed ``\boxed{}``
outside the thinking, else ``<answer>``, else what follows "answer is" or the like, else a text of one short
line. Where a letter or yes/no is asked for, more is read: the last line if it is a letter, and a longer text
if only one of the words "yes" and "no" is in it. A response without any is ``extraction_failed``.

**A truncated response** (the length limit ended it) is decided as the benchmarks' own scripts would, which
see only its text: a box that is closed outside the thinking counts as the answer. Without one it is
``truncated``; phrases like "the answer is" are not trusted there, because in the middle of a derivation they
are often not the last word.

**Rules** compare it with the truth: `choice`, `math`, `mathvista_choice`, `mathvista_number`, `same_list` and
`yes_no`; a benchmark's module says which it uses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mssr.evaluation.items import Kind
from mssr.rewards import choice as choice_rule
from mssr.rewards import latex, math_rule, rules
from mssr.rewards.extraction import lenient_answer, outside_thinking, unwrap

LETTERS = choice_rule.LETTERS
LONGEST_ANSWER = 1_000
"""Characters of an answer that are compared with the texts of options."""
LARGEST = 10**300

_OPTION_MARK = re.compile(r"(?:^|(?<=\s))[(（]?\s?([A-J])\s?(?:[)）]\s?[.:：、]?|[.:：、．])")
_PAREN_LETTER = re.compile(r"\(([a-zA-Z])\)")
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?![\w])"
)
_OPERATOR = re.compile(r"[\^/*+=]|\\(?!approx)[a-z]")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])(?=.)")
_NEGATION = re.compile(r"\b(?:not|no|nor|never|neither|or|either|maybe|perhaps)\b|n['’]t\b")
_VERDICT_FIRST = re.compile(r"^\W*(yes|no)\s*(?:[,.;:!\n]|[-–—]\s)")
_ANSWERED = re.compile(
    r"(?:(?:^|(?<=[.!?:\n]))[\s\"'(]*(yes|no)(?![\w'’-]| doubt|\.\s?\d))"
    r"|(?<![\w'’-])(yes|no)(?=\s*(?:[,;:!?)\"'\n]|\.(?!\s?\d)|$))"
)
_UNCERTAIN = re.compile(
    r"\b(?:unclear|uncertain|unknown|unsure|undetermined|not (?:sure|certain|clear|possible|enough)|"
    r"(?:do not|don['’]t|does not|doesn['’]t) (?:know|have)|cannot|can['’]t|can not|unable|insufficient|"
    r"no (?:image|figure|picture|chart|information|way))\b",
    re.IGNORECASE,
)


# The final answer ---------------------------------------------------------------------------------


def final_text(response: str, *, truncated: bool = False) -> str | None:
    """The final answer of a response, see the module; None if there is none."""
    answer = lenient_answer(response, boxed_only=truncated)
    if answer is None or "\\boxed" in answer:  # a box that is empty or never closed
        return None
    return unwrap(answer).strip() or None


def final_choice(response: str, choices: Sequence[str] = (), *, truncated: bool = False) -> str | None:
    """The answer to a question with options; None if there is none.

    A box that names an option. Else the first of these that does: the `final_text`, the last line, the last
    sentence; by a letter in any spelling of `mssr.rewards.choice.read`, or the text of one of ``choices``,
    also in a sentence (`mentioned`); behind a box that names none only by a letter. Else the `final_text`.
    """
    boxed = lenient_answer(response, boxed_only=True)
    answer = final_text(response, truncated=truncated)
    if truncated or (boxed is not None and (letters_of(boxed) or by_text(boxed, choices) is not None)):
        return answer
    visible = outside_thinking(response)
    if boxed is not None:
        visible = visible[visible.rfind("\\boxed") :].replace("\\boxed", "", 1)
        visible = visible[visible.find(boxed) + len(boxed) + 1 :]
    lines = [line.strip() for line in visible.splitlines() if line.strip()][-1:]
    sentences = [_SENTENCE.split(line[-LONGEST_ANSWER:])[-1] for line in lines]
    said = lenient_answer(visible) if boxed is not None else answer
    for text in filter(None, [said, *lines, *sentences]):
        if letters_of(text) or (text in choices and boxed is None):
            return text
    for text in filter(None, [said, *sentences] if boxed is None else ()):
        position = mentioned(text, choices)
        if position is not None:
            return choices[position]
    return answer


def mentioned(text: str, choices: Sequence[str]) -> int | None:
    """Position of the one option whose text stands in a sentence; None of several, or where "not" is said."""
    text = text[-LONGEST_ANSWER:].casefold()
    found = []
    for i in sorted(range(len(choices)), key=lambda i: -len(choices[i])):
        option = choices[i].strip().casefold()
        pattern = re.compile(rf"(?<![\w.-]){re.escape(option)}(?!\w|\.\d)")
        if option and pattern.search(text):
            text = pattern.sub("|", text)
            found.append(i)
    return found[0] if len(found) == 1 and not _NEGATION.search(text) else None


def final_yes_no(response: str, *, truncated: bool = False) -> str | None:
    """A box; else a `final_text` with yes or no; else the one of the two that the visible text says; else
    whatever `final_text` is."""
    answer = final_text(response, truncated=truncated)
    if truncated or lenient_answer(response, boxed_only=True) is not None:
        return answer
    if answer is not None and yes_no(answer) is not None:
        return answer
    return yes_no(outside_thinking(response)) or answer


# Multiple choice ----------------------------------------------------------------------------------


def options(text: str) -> tuple[str, ...]:
    """The options that a question lists, as in ``"... (A) 3 (B) 4"`` or one a line; the last such list."""
    run: list[re.Match[str]] = []
    listed: list[re.Match[str]] = []
    for mark in _OPTION_MARK.finditer(text):
        if mark[1] == "A":  # another list
            run = [mark]
        elif run and ord(mark[1]) == ord(run[-1][1]) + 1:
            run.append(mark)
            listed = run
    ends = [mark.start() for mark in listed[1:]] + [len(text)]
    texts = [text[mark.end() : end].strip() for mark, end in zip(listed, ends, strict=False)]
    return (*texts[:-1], texts[-1].partition("\n")[0].strip()) if texts else ()


def choice_kind(choices: Sequence[str], answer: str) -> Kind:
    """``choice`` if the answer is the letter of an option, or several such; else ``math``.

    Where no options are known, one capital letter counts: they may be in the picture.
    """
    letters = letters_of(answer)
    if choices:
        return "choice" if letters and letters <= set(LETTERS[: len(choices)]) else "math"
    return "choice" if len(letters) == 1 and answer.strip("(). ").isupper() else "math"


def letters_of(answer: str) -> frozenset[str]:
    """The letters that an answer chooses, in any spelling that `mssr.rewards.choice.read` knows."""
    return choice_rule.read(answer)[0]


def choice(answer: str, truth: str, choices: Sequence[str] = ()) -> bool:
    """Whether the answer chooses the option of the truth, a letter or several.

    An answer without a letter (or with one that no option has) chooses the option whose text it is, if
    exactly one is the same mathematics.
    """
    chosen = letters_of(answer)
    right = letters_of(truth)
    if chosen and right and (not choices or chosen <= set(LETTERS[: len(choices)])):
        return chosen == right
    if not right or not choices:
        return rules.grade_choice(answer, truth)
    position = by_text(answer, choices)
    return position is not None and right == frozenset(LETTERS[position])


def by_text(answer: str, choices: Sequence[str]) -> int | None:
    """Position of the one option that an answer is the text of; None if there is none, or several."""
    answer = answer[:LONGEST_ANSWER].strip()
    equal = [i for i, option in enumerate(choices) if rules.grade_exactly(answer, option)]
    if not equal:
        equal = [i for i, option in enumerate(choices) if option.strip() and math_rule.same(answer, option)]
    return equal[0] if len(equal) == 1 else None


def mathvista_choice(answer: str, choices: Sequence[str]) -> str:
    """The option that MathVista's script takes an answer for: a letter's, else the nearest text's.

    In this order: an upper-case letter by its position; the exact text of an option; a letter in another
    spelling; a letter in parentheses; the one option that is the same mathematics; the option at the smallest
    edit distance, of several the first. So every answer is some option, as in the official script.
    """
    answer = answer[:LONGEST_ANSWER].strip()
    letters = LETTERS[: len(choices)]
    if answer in choices and answer not in list(letters):
        return answer
    marked = _PAREN_LETTER.search(answer)
    for named in ([answer], letters_of(answer), [marked[1].upper()] if marked else []):
        if len(named) == 1 and (letter := next(iter(named))) in list(letters):
            return choices[letters.index(letter)]
    position = by_text(answer, choices)
    if position is None:
        distances = [edit_distance(answer, option) for option in choices]
        position = distances.index(min(distances))
    return choices[position]


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of one character."""
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (x != y)))
        previous = row
    return previous[-1]


# Values -------------------------------------------------------------------------------------------


def math(answer: str, truth: str) -> bool:
    """Whether the two are equal after `rules.normalise`, or the same by the rule `math`."""
    return rules.grade_exactly(answer, truth) or rules.grade_math(answer, truth)


def number(text: str) -> float | None:
    """The one number that a text is or holds, without unit, percent sign and thousands separators.

    ``"12 cm"`` is 12, ``"$1,200"`` 1200, ``"50%"`` 50, ``"x = 3/4"`` 0.75, ``"about 4 apples"`` 4; a text
    with two different numbers that is no expression has none.
    """
    if len(text) > latex.MAX_LENGTH:
        return None
    value = math_rule.stated(latex.clean(text))
    exact = None if value is None else math_rule.number(value)
    if exact is not None:
        return float(exact) if abs(exact) < LARGEST else None
    if _OPERATOR.search(latex.clean(text)):
        return None
    found = {float(m[0].replace(",", "")) for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m[0])}
    return found.pop() if len(found) == 1 else None


def mathvista_number(answer: str, truth: str, precision: int | None) -> bool:
    """MathVista's comparison of an integer (``precision`` None) or a float with so many decimals.

    As its script does, the answer is cut to an integer (5.7 is 5), or rounded to the precision, and must then
    be the truth.
    """
    value, right = number(answer), number(truth)
    if value is None or right is None:
        return False
    if precision is None:
        return int(value) == right
    return round(value, precision) == round(right, precision)


def same_list(answer: str, truth: str) -> bool:
    """Whether two lists hold the same numbers in the same order: ``[1, 2]``, ``1, 2``, ``1 and 2``."""
    found = _numbers(answer)
    return bool(found) and None not in found and found == _numbers(truth)


def _numbers(text: str) -> list[float | None]:
    """Of the elements of a list, in their order; None for one that is none."""
    cleaned = re.sub("[⟦⟧]", " ", latex.clean(text)).strip().strip("[](){} ")
    parts = re.split(r"[,;]\s*(?:and\b)?|\band\b", cleaned)
    return [number(part.strip()) for part in parts if part.strip()]


# Yes and no ---------------------------------------------------------------------------------------


def yes_no(text: str) -> str | None:
    """``"yes"`` or ``"no"``: the one of the two that a text answers.

    Words are compared whole ("not", "nothing" and "know" hold no "no"), and one counts where it begins a
    sentence or ends a part of one: "No it is not", "so no, it is not", but not "there is no gap". Of both it
    is the one that the text starts with before a comma or full stop. LaTeX around a word does not count.
    """
    plain = latex.clean(text) if len(text) <= latex.MAX_LENGTH and "\n" not in text else text
    plain = re.sub(r"\\[a-zA-Z]+|[*{}$]", " ", plain).strip().lower()
    found = {match[1] or match[2] for match in _ANSWERED.finditer(plain)}
    if len(found) == 1:
        return found.pop()
    first = _VERDICT_FIRST.match(plain)
    return first[1] if found and first else None


def is_uncertain(text: str) -> bool:
    """Whether a text says that the question cannot be answered, rather than yes or no."""
    return bool(_UNCERTAIN.search(text))
