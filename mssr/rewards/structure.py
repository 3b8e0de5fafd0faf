r"""The outer form of an answer: a value, a list, a set, a point or interval, a relation, a matrix, a word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from mssr.rewards import latex

_WORDS = {
    "yes": "yes", "no": "no", "true": "true", "false": "false",
    "nosolution": "empty", "nosolutions": "empty", "norealsolution": "empty", "norealsolutions": "empty",
    "thereisnosolution": "empty", r"\emptyset": "empty", "emptyset": "empty", "⟦⟧": "empty", "{}": "empty",
    "none": "empty", "theemptyset": "empty",
    "undefined": "undefined", "doesnotexist": "undefined", "dne": "undefined",
    "ℝ": "reals", "allrealnumbers": "reals", "allreals": "reals", r"(-\infty,\infty)": "reals",
    r"(-\infty,+\infty)": "reals", r"x\inℝ": "reals",
}  # fmt: skip
_UNION = re.compile(r"\\cup(?![A-Za-z])|\s⟪?or⟫?\s")
_COMMA = re.compile(
    r"[,;]\s*(?:⟪?\s*(?:and|or)\s*⟫?(?![A-Za-z]))?|⟪(?:and|or)⟫|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
)
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|[<>=]")
_APPROX = re.compile(r"\\(?:approx|simeq|sim|thickapprox)(?![A-Za-z])")
_MEMBER = re.compile(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*")
_BUILDER = re.compile(r"^⟦\s*[A-Za-z]\s*(?:\\in\s*ℝ\s*)?[|:](.*)⟧$")
_MATRIX = re.compile(
    r"^\\begin\{([pbBvV]?matrix|array|smallmatrix)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}$", re.DOTALL
)
_SIGNS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_NAME = re.compile(
    r"^(?!\\(?:frac|sqrt|sin|cos|tan|log|ln|pi)(?![A-Za-z]))(?:\\?[A-Za-z]|⟪|°|∠)[A-Za-z0-9_{}\\' ⟪⟫∠-]{0,40}"
    r"(?:\([A-Za-z, ]{1,10}\))?$"
)


@dataclass(frozen=True, slots=True)
class Structure:
    r"""An answer taken apart. Example: ``Structure("[)", "[1,2)", ("1", "2"))``"""

    kind: str
    """scalar, bare (a list without brackets), set, union, equation, inequality, approximation, ratio,
    matrix:RxC, the pair of brackets of a point or interval such as ``[)``, or other."""
    text: str
    """The whole."""
    parts: tuple[str, ...] = ()
    """Elements, sides of a relation (of an equation: first and last), or the cells of a matrix by row."""
    operators: tuple[str, ...] = ()
    """Between the sides of an inequality."""
    word: str | None = None
    """Which of the words with synonyms it is."""
    name: str | None = None
    """The variable of an interval that was an inequality."""


@lru_cache(maxsize=2048)
def read(text: str) -> Structure:
    """The structure of a canonical text."""
    text = _MEMBER.sub("", text.strip())
    word = _WORDS.get(re.sub(r"[\s⟪⟫.']", "", text).casefold())
    if word:
        return Structure("other" if word == "reals" else "scalar", text, word=word)
    matrix = _MATRIX.match(text)
    if matrix:
        return _matrix(text, matrix[1], matrix[2])
    if r"\begin" in text:
        return Structure("other", text)
    signs = _SIGNS.findall(text)
    if 1 <= len(signs) <= 2:
        upper = _SIGNS.sub(lambda m: "+" if m[1] == "pm" else "-", text)
        lower = _SIGNS.sub(lambda m: "-" if m[1] == "pm" else "+", text)
        return Structure("bare", text, (upper, lower))
    builder = _BUILDER.match(text)
    if builder:
        return read(builder[1].strip())
    if latex.enclosed(text):
        inner = text[1:-1].strip()
        parts, _ = latex.cut_top(inner, re.compile("[,;]"))
        if text[0] == "⟦":
            return Structure("set", text, tuple(part for part in parts if part))
        if len(parts) > 1:
            return Structure("set" if text[0] == "{" else text[0] + text[-1], text, tuple(parts))
        if (text[0], text[-1]) in (("{", "}"), ("(", ")")) and inner:
            return read(inner)
        return Structure("scalar", text)
    reverse = re.fullmatch(r"([\[\]])([^\[\]]*,[^\[\]]*)([\[\]])", text)
    if reverse:  # ]1, 2[ for (1, 2)
        brackets = ("(" if reverse[1] == "]" else "[") + (")" if reverse[3] == "[" else "]")
        parts = [part.strip() for part in reverse[2].split(",")]
        return Structure(brackets, brackets[0] + reverse[2] + brackets[1], tuple(parts))
    return _open_form(text)


def _open_form(text: str) -> Structure:
    """The structure of a text without brackets around the whole."""
    relation = _RELATION.search(text)
    if r"\cup" in text or (relation and relation[0] != "="):
        parts, _ = latex.cut_top(text, _UNION)
        if len(parts) > 1:
            forms = [interval(read(part)) or read(part) for part in parts]
            return Structure("union", text, tuple(form.text for form in forms))
    parts, _ = latex.cut_top(text, _COMMA)
    parts = [part for part in parts if part]
    if len(parts) > 1:
        return Structure("bare", text, tuple(parts))
    parts, _ = latex.cut_top(text, _APPROX)
    if len(parts) > 1:
        return Structure("approximation", text, tuple(part for part in parts if part))
    parts, operators = latex.cut_top(text, _RELATION)
    if operators and all(parts):
        if set(operators) == {"="}:
            return Structure("equation", text, (parts[0], parts[-1]))
        return Structure("inequality", text, tuple(parts), tuple(operators))
    if text.count(":") >= 2:
        return Structure("ratio", text, tuple(part.strip() for part in text.split(":")))
    return Structure("scalar", text)


def _matrix(text: str, environment: str, body: str) -> Structure:
    rows = [row.split("&") for row in body.strip().strip("⏎").split("⏎")]
    if len({len(row) for row in rows}) != 1:
        return Structure("other", text)
    kind = "determinant" if environment[0] in "vV" else "matrix"
    cells = tuple(cell.strip() for row in rows for cell in row)
    return Structure(f"{kind}:{len(rows)}x{len(rows[0])}", text, cells)


def is_name(text: str) -> bool:
    r"""Whether a text can stand before ``=`` as the name of the answer: ``x``, ``f(x)``, ``\angle ABC``."""
    return bool(_NAME.match(text))


def interval(form: Structure) -> Structure | None:
    r"""The interval of an inequality in one variable, ``1 < x \le 2`` -> ``(1,2]``; None for another form."""
    if form.kind != "inequality" or r"\ne" in form.operators:
        return None
    parts, operators = list(form.parts), list(form.operators)
    if all(o in (">", r"\ge") for o in operators):
        parts.reverse()
        operators = ["<" if o == ">" else r"\le" for o in reversed(operators)]
    if not all(o in ("<", r"\le") for o in operators):
        return None
    variable = re.compile(r"[A-Za-z](?:_\w)?$|\\[A-Za-z]+$")
    if len(parts) == 2 and variable.match(parts[0]) and not variable.match(parts[1]):
        low, high, brackets = r"-\infty", parts[1], "(" + (")" if operators[0] == "<" else "]")
        name = parts[0]
    elif len(parts) == 2 and variable.match(parts[1]) and not variable.match(parts[0]):
        low, high, brackets = parts[0], r"\infty", ("(" if operators[0] == "<" else "[") + ")"
        name = parts[1]
    elif len(parts) == 3 and variable.match(parts[1]):
        low, name, high = parts
        brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
    else:
        return None
    return Structure(brackets, f"{brackets[0]}{low},{high}{brackets[1]}", (low, high), name=name)
