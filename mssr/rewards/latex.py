r"""Spellings of LaTeX and Unicode brought to one, and texts split at the top level of their brackets.

The canonical text has no styles and sizes, ``\frac{}{}`` for its variants, ``*`` and ``/`` for ``\times``,
``\cdot`` and ``\div``, ``°`` for degrees, ``⟦ ⟧`` for ``\{ \}``, ``＄`` for a dollar that is money, ``⏎``
between matrix rows, and what stood in ``\text{}`` between spaces.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_LENGTH = 1_000
"""Longer answers are compared as strings only."""

_RUNS = {
    "^": dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True)),
    "_": dict(zip("₀₁₂₃₄₅₆₇₈₉₋₊", "0123456789-+", strict=True)),
}
_RUN = {sign: re.compile(f"[{''.join(table)}]+") for sign, table in _RUNS.items()}
_VULGAR = re.compile("[¼½¾⅐-⅞↉]")
_SAME = (
    ("-", "−–—‐‑－"), ("*", "×⋅·∙∗✕"), ("/", "÷⁄∕"), ("'", "′’‘"), ("°", "º˚∘"), ("%", "٪％"), (".", "٫。．"),
    (",", "٬、，"), (":", "：∶"), ('"', "“”"), ("μ", "µ"), ("Ω", "\u2126"), (" ", "\u00a0\u3000\u2009\u202f"),
    ("", "\u200b\ufeff\u2061"), (r"\pi ", "π"), (r"\sqrt ", "√"), (r"\infty ", "∞"), (r"\le ", "≤⩽"),
    (r"\ge ", "≥⩾"), (r"\ne ", "≠"), (r"\cup ", "∪"), (r"\cap ", "∩"), (r"\in ", "∈"), (r"\emptyset ", "∅"),
    (r"\pm ", "±"), (r"\approx ", "≈"), (r"\cong ", "≅"), (r"\angle ", "∠"), (r"\triangle ", "△"),
    (r"\perp ", "⊥"), (r"\parallel ", "∥"), (r"\sim ", "∼～"), (r"\alpha ", "α"), (r"\beta ", "β"),
    (r"\gamma ", "γ"), (r"\theta ", "θ"), (r"\lambda ", "λ"),
)  # fmt: skip
_UNICODE = str.maketrans({c: to for to, characters in _SAME for c in characters})
_STYLES = (
    "text|mathrm|textbf|textit|mathbf|operatorname|mbox|hbox|textrm|textnormal|texttt|textsf|mathit|mathsf|emph|bm|"
    "boldsymbol|underline|unit|boxed|text(?:color)\\{[a-z]+\\}|color\\{[a-z]+\\}"
)
_TEXT = re.compile(rf"\\(?:{_STYLES})\s*\*?\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
_END = r"(?![A-Za-z])"
_COMMANDS = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (rf"\\(?:left|right|[Bb]igg?[lrm]?){_END}\s*\.?(?=\s*(?:[\[\](){{}}|.]|\\[{{}}|lrvV]|$))", ""),
        (
            r"\\(?:displaystyle|textstyle|limits|rm|bf|it|tiny|small|normalsize|[lL]arge|LARGE|[hH]uge|color\{[a-z]+\})"
            + _END,
            " ",
        ),
        (r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)(?=\d{3}(?!\d))", ""),
        (rf"\\(?:[,;:!> ]|q?quad{_END}|[hv]space\{{[^{{}}]*\}}|phantom\{{[^{{}}]*\}})|~", " "),
        (rf"\\(?:cdot|times|ast){_END}", "*"),
        (rf"\\div{_END}", "/"),
        (rf"\\colon{_END}", ":"),
        (rf"\\(?:leqslant|leq){_END}|<=", r"\\le "),
        (rf"\\(?:geqslant|geq){_END}|>=", r"\\ge "),
        (rf"\\neq{_END}|!=", r"\\ne "),
        (rf"\\lt{_END}", "<"),
        (rf"\\gt{_END}", ">"),
        (rf"\^\s*\{{?\s*(?:\\circ{_END}|°|\\degree{_END})\s*\}}?|\\degree{_END}", "° "),
        (r"\\(?:lbrace|\{)", "⟦"),
        (r"\\(?:rbrace|\})", "⟧"),
        (rf"\\langle{_END}", "("),
        (rf"\\rangle{_END}", ")"),
        (r"\\%", "%"),
        (r"\\\$", "＄"),
        (rf"\\(?:[lr]?vert|mid){_END}", "|"),
        (rf"\\mathbb\s*\{{?\s*R\s*\}}?|\\R{_END}", "ℝ"),
        (rf"\\(?:varnothing|O){_END}", r"\\emptyset"),
        (rf"\\?arc(sin|cos|tan){_END}", r"\\arc\1"),
        (r"(?<=[\w)}])\*\*(?=\s*[\d({A-Za-z-])", "^"),
        (r"\*\*|`|(?<!\\)\$", ""),
        (r"(?<![\d.,])(\d+)\s+(\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d*\})", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\sqrt\s*(\d+|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}"),
        (r"(?<=[\d.])\s*[xX]\s*(?=10\s*(?:\^|e))", "*"),
        (r"\^\s*(-?\d+(?:\.\d+)?)", r"^{\1}"),
        (r"\s+", " "),
    )
)
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ('"', '"'), ("'", "'"))
_REPEATING = re.compile(r"(\d{1,20})\.(\d{0,20})\\(?:overline|bar|dot)\{(\d{1,20})\}")


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """The canonical spelling of an answer of at most `MAX_LENGTH` characters, see the module."""
    if "\\begin" in text:
        text = text.replace("\\\\", "⏎")
    text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text).replace("\\\\", " ")
    if not text.isascii():
        text = _VULGAR.sub(lambda m: r" \frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
        for sign, pattern in _RUN.items():
            text = pattern.sub(lambda m, s=sign: s + "{" + "".join(_RUNS[s][c] for c in m[0]) + "}", text)
        text = unicodedata.normalize("NFKC", text.replace("＄", "$").translate(_UNICODE)).translate(_UNICODE)
        text = "".join(str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c for c in text)
    text = _REPEATING.sub(_fraction, undelimited(text))
    if text.count("$") - text.count(r"\$") == 1:
        text = re.sub(r"(?<!\\)\$", r"\\$", text)  # one dollar is money
    for _ in range(3):
        text, replaced = _TEXT.subn(r" \1 ", text)
        if not replaced:
            break
    for pattern, to in _COMMANDS:
        text = pattern.sub(to, text)
    text = text.strip()
    while text and text[-1] in ".,;:!? " and not re.search(r"[\d)]!$", text):
        text = text[:-1]
    return re.sub(r"^(?:=|\\therefore(?![A-Za-z])|\s)+", "", text)


def _fraction(match: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` -> ``\frac{15}{90}``."""
    whole, fixed, cycle = match[1], match[2], match[3]
    bottom = 10 ** len(fixed) * (10 ** len(cycle) - 1)
    return rf"\frac{{{int(whole + fixed + cycle) - int(whole + fixed)}}}{{{bottom}}}"


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
    """What the same strings share: spaces, except between digits, and the case of plain words do not count."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    return text if re.search(r"[\d\\^_=+*/|<>°%]", text) else text.casefold()


_OPEN, _CLOSE = "([{⟦", ")]}⟧"


def cut_top(text: str, separator: re.Pattern[str]) -> list[str]:
    """``text`` cut where ``separator`` matches outside all brackets, which pair across kinds as in ``[1, 2)``."""
    depth, depths = 0, []
    for c in text:
        depth -= c in _CLOSE
        depths.append(depth)
        depth += c in _OPEN
    parts, start = [], 0
    for match in separator.finditer(text):
        if match.start() >= start and depths[match.start()] == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return [*parts, text[start:].strip()]


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
