r"""Spellings of LaTeX and Unicode brought to one, and texts cut at the top level of their brackets.

The canonical text has no styles, but ``*``, ``/``, ``°``, ``⟦ ⟧`` for ``\{ \}``, ``＄`` for money, ``⏎``
between matrix rows and ``;`` between other lines.
"""

import re
import unicodedata
from functools import lru_cache
from itertools import accumulate

MAX_LENGTH = 1_000
"""Longer answers are compared as strings only."""
# A sign or command, a bar, and the characters or commands that are other spellings of it.
_SIGNS = (
    r"-|−–—‐‑－ *|×⋅·∙∗✕ /|÷⁄∕ '|′’‘ °|º˚∘ %|٪％ .|٫。． ,|٬、， :|：∶ ;|； (|（ )|） μ|µ \pi|π \sqrt|√"
    r" \infty|∞ \le|≤⩽ \ge|≥⩾ \ne|≠ \cup|∪ \cap|∩ \in|∈ \emptyset|∅ \pm|± \approx|≈ \cong|≅≌ \angle|∠"
    r" \triangle|△ \perp|⊥⟂ \parallel|∥ \sim|∼～∽ \alpha|α \beta|β \gamma|γ \theta|θ \lambda|λ"
).split()
_NAMES = (
    r"\frac|dfrac,tfrac,cfrac \binom|dbinom,tbinom *|cdot,times,ast /|div :|colon Ω|Omega ;|newline"
    r" \ne|neq <|lt >|gt \le|leq,leqslant \ge|geq,geqslant °|degree (|langle )|rangle ⟦|lbrace ⟧|rbrace"
    r" ||vert,lvert,rvert,mid \perp|bot \emptyset|varnothing"
    r" |left,right,big,Big,bigg,Bigg,bigl,bigr,displaystyle,textstyle,limits,rm,bf,it,tiny,small,normalsize,"
    r"large,Large,LARGE,huge,Huge,quad,qquad,therefore"
).split()
_UNICODE = {ord(c): " " for c in "\u00a0\u3000\u2009\u202f"} | {ord(c): "" for c in "\u200b\ufeff"}
_UNICODE |= {ord(c): to + " " * (to[0] == "\\") for to, cs in (x.split("|") for x in _SIGNS) for c in cs}
_COMMANDS = {x: to or " " for to, _, names in (x.rpartition("|") for x in _NAMES) for x in names.split(",")}
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf)|operatorname|[mhf]box|emph|bm|boldsymbol|underline|unit|"
    r"boxed|(?:text)?color\{[a-z]+\})\s*\*?\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_REPEATING = re.compile(r"(\d{1,20})\.(\d{0,20})\\(?:overline|bar|dot)\{(\d{1,20})\}")
_REWRITTEN = (
    (r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)(?=\d{3}(?!\d))", ""),
    (r"\\(?:[,;:!> ()\[\]]|(?:[hv]space|phantom)\{[^{}]*\}|color\{[a-z]+\})|~", " "),
    (r"[.,;:?\s]+$|(?<=\d)\.(?=\s*\))", ""), (r"\\?(?<![A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\\{", "⟦"), (r"\\\}", "⟧"), (r"\\%", "%"), (r"\\\$", "＄"), (r"<=", r"\\le "), (r">=", r"\\ge "),
    (r"\\mathbb\s*\{?\s*R\s*\}?", "ℝ"), (r"!=", r"\\ne "), (r"\^\s*\{?\s*(?:\\circ(?![a-z])|°)\s*\}?", "° "),
    (r"\\mu\s*(?=[mgsAFCLH](?![A-Za-z]))", "μ"), (r"\\\||(?<=[A-Za-z])\s*//\s*(?=[A-Z])", r"\\parallel "),
    (r"(?<=[\w)}])\*\*(?=\s*[\d({A-Za-z-])", "^"), (r"\*\*|`|(?<!\\)\$", ""),
    (r"(?<![\d.,])(\d+)\s+(\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"), (r"\^\s*(-?\d+(?:\.\d+)?)", r"^{\1}"),
    (r"\\frac\s*(\d)\s*(?:\{|(\d)(?!\d*\}))", r"\\frac{\1}{\2"), (r"(\\frac\{\d\}\{\d)(?![\d}])", r"\1}"),
    (r"(?<=[\d.])\s*[xX]\s*(?=10\s*\^)", "*"),
    (r"(?<=\{)\s+|\s+(?=[}^_])|(?<=[\w}\]])\s+(?=\{)|(?<=[_^])\s+", ""), (r"\s+", " "),
    (r"_\{(\w)\}(?!\w)", r"_\1"), (r"\\?(?<![A-Za-z])sqrt\s*(\d+|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}"),
    (r"^\]([^\[\]]*,[^\[\]]*)\[$", r"(\1)"), (r"^(?:=|\s)+|[.,;:?\s]+$|(?<=[A-Za-z]{2})[!.,;:?\s]+$", ""),
)  # fmt: skip


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """The canonical spelling of an answer of at most `MAX_LENGTH` characters, see the module."""
    row = "⏎" if "\\begin" in text else ";"
    text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text.strip()).replace("\\\\", row)
    if not text.isascii():
        text = re.sub("[₀-₉₊₋]+", r"_{\g<0>}", text.replace("＄", "$").translate(_UNICODE))
        text = re.sub("[¼½¾⅐-⅞]", r" \g<0>", re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", text))
        text = unicodedata.normalize("NFKC", text).translate(_UNICODE)
        text = "".join(str(unicodedata.digit(c)) if c.isdigit() and not c.isascii() else c for c in text)
    for m in _REPEATING.finditer(text):  # 0.1\\overline{6} is 15/90
        top = int(m[1] + m[2] + m[3]) - int(m[1] + m[2])
        text = text.replace(m[0], f"({top}/{10 ** len(m[2]) * (10 ** len(m[3]) - 1)})")
    if text.count("$") - text.count(r"\$") == 1:
        text = re.sub(r"(?<!\\)\$", r"\\$", text)  # one dollar is money
    replaced = 1
    while replaced:
        text, replaced = _TEXT.subn(r" \1 ", text)
    text = re.sub(r"\\(?:left|right)\s*\.", "", re.sub(r"\s*\n\s*", " " if row == "⏎" else ";", text.strip()))
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _COMMANDS.get(m[1], m[0]), text)
    for pattern, to in _REWRITTEN:
        text = re.sub(pattern, to, text)
    return text


def key(text: str) -> str:
    """What the same strings share: spaces, except between digits, and the case of words do not count."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    words = r"(?<![\\A-Za-z])[A-Za-z]{4,}" if re.search(r"[\d\\^_=+*/|<>°%]", text) else "[A-Z]"
    return re.sub(words, lambda match: match[0].lower(), text)


def _depths(text: str) -> list[int]:
    return list(accumulate((c in "([{⟦") - (c in ")]}⟧") for c in text))


def enclosed(text: str) -> bool:
    """Whether the first character is a bracket that the last one closes, of any kind: ``[1, 2)``."""
    return text[:1] in tuple("([{⟦") and 0 not in _depths(text)[:-1] and text[-1] in ")]}⟧"


def cut(text: str, separator: str) -> tuple[str, ...]:
    """``text`` cut where ``separator`` matches outside all brackets."""
    depths, parts, start = _depths(text), [], 0
    for match in re.finditer(separator, text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return (*parts, text[start:].strip())
