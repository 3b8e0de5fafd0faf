r"""Spellings of LaTeX and Unicode brought to one, and texts split at the top level of their brackets.

The canonical text has no white space commands and no sizes (``\left``, ``\big``), ``\frac`` for its
variants, ``*`` and ``/`` for ``\times``, ``\cdot`` and ``\div``, ``°`` for degrees, ``⟦ ⟧`` for ``\{ \}``,
``⟪ ⟫`` around what stood in ``\text{}``, ``＄`` for a dollar that is money, ``⏎`` between matrix rows.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_LENGTH = 1_000
"""Longer answers are compared as strings only."""

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₋₊", "0123456789-+", strict=True))
_SUPER_RUN = re.compile("[" + "".join(_SUPERSCRIPTS) + "]+")
_SUB_RUN = re.compile("[" + "".join(_SUBSCRIPTS) + "]+")
_REPEATING = re.compile(r"(\d{1,20})\.(\d{0,20})\\(?:overline|bar|dot)\{(\d{1,20})\}")
_VULGAR = re.compile("[¼½¾⅐-⅞↉]")
_UNICODE = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": "*", "⋅": "*", "·": "*", "∙": "*", "∗": "*",
        "÷": "/", "⁄": "/", "∕": "/", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ",
        "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
        "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "≈": r"\approx ", "≅": r"\cong ", "∠": r"\angle ",
        "△": r"\triangle ",
        "′": "'", "’": "'", "º": "°", "˚": "°", "∘": "°", "٪": "%", "٫": ".", "٬": ",", "。": ".", "、": ",",
        "，": ",", "“": '"', "”": '"', "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "θ": r"\theta ",
        "λ": r"\lambda ", "µ": "μ", "Ω": "Ω", "ℝ": "ℝ", "\u200b": "", "\ufeff": "", "\u2061": "",
        "\u00a0": " ",
    }
)  # fmt: skip
_TEXT = re.compile(
    r"\\(?:text|mathrm|textbf|textit|mathbf|operatorname|mbox|hbox|textrm|textnormal|texttt|textsf|mathit|mathsf|"
    r"emph|bm|boldsymbol|bf|rm|underline|unit)\s*\*?\{([^{}]*)\}"
)
_COMMANDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:left|right|[Bb]igg?[lrm]?)(?![A-Za-z])\s*\.?(?=\s*(?:[\[\](){}|.]|\\[{}|lrvV]|$))", ""),
        (
            r"\\(?:displaystyle|textstyle|limits|nolimits|rm|bf|it|mathord|mathopen|mathclose)(?![A-Za-z])",
            " ",
        ),
        (r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)(?=\d{3}(?!\d))", ""),
        (r"\\(?:[,;:!> ]|quad(?![A-Za-z])|qquad(?![A-Za-z])|hspace\{[^{}]*\}|phantom\{[^{}]*\})|~", " "),
        (r"\\(?:cdot|times|ast)(?![A-Za-z])", "*"),
        (r"\\div(?![A-Za-z])", "/"),
        (r"\\(?:leqslant|leq)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geqslant|geq)(?![A-Za-z])", r"\\ge"),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"!=", r"\\ne "),
        (r"\^\s*\{?\s*(?:\\circ(?![A-Za-z])|°|\\degree(?![A-Za-z]))\s*\}?|\\degree(?![A-Za-z])", "° "),
        (r"\\(?:lbrace|\{)", "⟦"),
        (r"\\(?:rbrace|\})", "⟧"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\%", "%"),
        (r"\\\$", "＄"),
        (r"\\(?:[lr]vert|vert|mid)(?![A-Za-z])", "|"),
        (r"\\mathbb\s*\{?\s*R\s*\}?|\\R(?![A-Za-z])|\\Re(?![A-Za-z])", "ℝ"),
        (r"\\(?:varnothing|O)(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:operatorname|mathrm)?\s*(?:arc|a)(sin|cos|tan)(?![A-Za-z])", r"\\arc\1"),
        (r"\\(?:quad|qquad)", " "),
        (r"\*\*(?=\s*[\d({])(?<=[\w)}]\*\*)", "^"),
        (r"\*\*|`", ""),
        (r"(?<!\\)\$", ""),
        (r"(?<![\d.,])(\d+)\s+(\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
        (r"\s+", " "),
    )
)
_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ('"', '"'),
    (r"\boxed{", "}"),
)


@lru_cache(maxsize=1024)
def clean(text: str) -> str:
    """The canonical spelling of an answer of at most `MAX_LENGTH` characters, see the module."""
    if "\\begin" in text:
        text = text.replace("\\\\", "⏎")
    text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text).replace("\\\\", " ")
    text = _VULGAR.sub(_vulgar, text)
    text = _SUPER_RUN.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _SUB_RUN.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    if not text.isascii():
        text = text.replace("＄", "$")
        text = "".join(
            str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c
            for c in unicodedata.normalize("NFKC", text.translate(_UNICODE))
        ).translate(_UNICODE)
    text = _REPEATING.sub(_fraction, undelimited(text))
    if text.count("$") - text.count(r"\$") == 1:
        text = re.sub(r"(?<!\\)\$", r"\\$", text)  # one dollar is money
    for _ in range(3):
        text, replaced = _TEXT.subn(_marked, text)
        if not replaced:
            break
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    while text and text[-1] in ".,;:!。 " and not re.search(r"\d!$", text):
        text = text[:-1]
    return re.sub(r"^(?:=|\\approx(?![A-Za-z])|\\therefore(?![A-Za-z])|\s)+", "", text)


def _vulgar(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _fraction(match: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` -> ``\frac{15}{90}``."""
    whole, fixed, cycle = match[1], match[2], match[3]
    bottom = 10 ** len(fixed) * (10 ** len(cycle) - 1)
    return rf"\frac{{{int(whole + fixed + cycle) - int(whole + fixed)}}}{{{bottom}}}"


def _marked(match: re.Match[str]) -> str:
    inner = match[1]
    if not any(c.isalpha() for c in inner) or "\\" in inner:
        return f" {inner} "
    return f" ⟪{inner.strip()}⟫" + (" " if inner.endswith(" ") else "")


def undelimited(text: str) -> str:
    """Without the delimiters that stand around the whole."""
    changed = True
    while changed:
        changed = False
        text = text.strip().rstrip(".。")
        for opening, closing in _WRAPPERS:
            size = len(opening)
            if len(text) > size + len(closing) and text.startswith(opening) and text.endswith(closing):
                inner = text[size : len(text) - len(closing)]
                if opening not in inner:
                    text, changed = inner, True
    return text


def key(text: str) -> str:
    """What the same strings share: case and spaces, except between digits, do not count."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub("[⟪⟫]", "", text)).casefold()


_OPEN, _CLOSE = "([{⟦", ")]}⟧"


def cut_top(text: str, separator: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """``text`` cut at the matches of ``separator`` that stand in no bracket: the pieces and the matches.

    Brackets pair across kinds, as in ``[1, 2)``.
    """
    if not separator.search(text):
        return [text], []
    depth, depths = 0, []
    for c in text:
        depth -= c in _CLOSE
        depths.append(depth)
        depth += c in _OPEN
    parts, found, start = [], [], 0
    for match in separator.finditer(text):
        if match.start() >= start and depths[match.start()] == 0:
            parts.append(text[start : match.start()].strip())
            found.append(match[0].strip())
            start = match.end()
    return [*parts, text[start:].strip()], found


def enclosed(text: str) -> bool:
    """Whether the first character is a bracket that the last one closes."""
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE:
        return False
    depth = 0
    for i, c in enumerate(text):
        depth += (c in _OPEN) - (c in _CLOSE)
        if depth == 0:
            return i == len(text) - 1
    return False
