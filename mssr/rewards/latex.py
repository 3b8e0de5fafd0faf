"""Spellings of LaTeX and Unicode brought to one, and texts cut at the top level of their brackets."""

import re
import unicodedata
from functools import lru_cache
from itertools import accumulate

MAX_LENGTH = 1_000  # longer answers are compared as strings only
# A sign or command, a bar, and the characters or commands that are other spellings of it.
_SIGNS = (
    r"-|−–—‐‑－ *|×⋅·∙∗✕ /|÷⁄∕ '|′’‘ °|º˚∘ %|٪ .|٫。 ,|、 :|∶ μ|µ \pi|π \sqrt|√ \infty|∞ \le|≤⩽ \ge|≥⩾ \ne|≠"
    r" \cup|∪ \cap|∩ \in|∈ \emptyset|∅ \pm|± \approx|≈ \cong|≅≌ \angle|∠ \triangle|△ \perp|⊥⟂ \parallel|∥"
    r" \sim|∼∽ \alpha|α \beta|β \gamma|γ \theta|θ \lambda|λ"
).split()
_NAMES = (
    r"\frac|dfrac,tfrac,cfrac \binom|dbinom,tbinom *|cdot,times,ast /|div :|colon Ω|Omega ;|newline %|% ＄|$"
    r" \ne|neq <|lt >|gt \le|leq,leqslant \ge|geq,geqslant °|degree (|langle )|rangle ⟦|lbrace,{ ⟧|rbrace,}"
    r" ||vert,lvert,rvert,mid \perp|bot \emptyset|varnothing |left,right,big,Big,bigl,bigr,displaystyle,"
    r"textstyle,rm,bf,it,tiny,small,large,Large,LARGE,huge,Huge,quad,qquad,therefore,(,),[,]"
).split()
_UNICODE = {ord(c): to + " " * (to[0] == "\\") for to, cs in (x.split("|") for x in _SIGNS) for c in cs}
_COMMANDS = {x: to or " " for to, _, names in (x.rpartition("|") for x in _NAMES) for x in names.split(",")}
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal)?|math(?:rm|bf|it|sf)|operatorname|[mhf]box|emph|bm|boldsymbol|underline|unit|"
    r"boxed|(?:text)?color\{[a-z]+\})\s*\*?\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_REWRITTEN = (
    (r"(?<=\d)(?:\\[,!;: ]|\{,\}|,\\!)(?=\d{3}(?!\d))", ""), (r"(?<=\d)\.(?=\s*\))", ""),
    (r"\\(?:[,;:!> ]|(?:[hv]space|phantom)\{[^{}]*\}|color\{[a-z]+\})|~", " "), ("[.,;:\\s]+$", ""),
    (r"\\mathbb\s*\{?\s*R\s*\}?", "ℝ"), (r"\^\s*\{?\s*(?:\\circ(?![a-z])|°)\s*\}?", "° "),
    ("<=", r"\\le "), (">=", r"\\ge "), ("!=", r"\\ne "), (r"\\mu\s*(?=[mgsAFCLH](?![A-Za-z]))", "μ"),
    (r"(?<=[\w)}])\*\*(?=\s*[\d({A-Za-z-])", "^"), (r"^([^$]*)\$([^$]*)$", r"\1＄\2"), (r"\*\*|`|\$", ""),
    (r"(?<!\d)(?<!\d )(?:US)?([＄€£¥₹]|USD|EUR|GBP|RMB|Rs\.?) ?(\d(?:[\d.,]*\d)?(?: [mb]illion)?)", r"\2 \1"),
    (r"(?<![\d.,])(\d+)\s+(\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"), (r"\^\s*(-?\d+(?:\.\d+)?)", r"^{\1}"),
    (r"\\frac\s*(\d)\s*(?:\{|(\d)(?!\d*\}))", r"\\frac{\1}{\2"), (r"(\\frac\{\d\}\{\d)(?![\d}])", r"\1}"),
    (r"(?<=[\d.])\s*[xX]\s*(?=10\s*\^)", "*"), (r"(?i)^(?:negative|minus)\s+(?=[\d.\\])", "-"),
    (r"(?<=\{)\s+|\s+(?=[}^_])|(?<=[\w}\]])\s+(?=\{)|(?<=[_^])\s+", ""), (r"\s*([*/])\s*", r"\1"),
    (r"\s+", " "), (r"_\{(\w)\}(?!\w)", r"_\1"), (r"(?i)(?<=\d) ?thousand(?![a-z])", "*10^{3}"),
    (r"(?i)(?<=\d) ?million(?![a-z])", "*10^{6}"), (r"(?i)(?<=\d) ?billion(?![a-z])", "*10^{9}"),
    (r"\\?(?<![A-Za-z])sqrt\s*(?:\(([^()]*)\)|(\d+|[A-Za-z](?![A-Za-z])))", r"\\sqrt{\1\2}"),
    (r"^\]([^\[\]]*,[^\[\]]*)\[$", r"(\1)"), (r"(?<!\w)(['\"])([^'\"]*)\1(?!\w)", r"\2"),
    (r"^[=+;\s]+|[.,;:\s]+$|(?<=[A-Za-z]{2})[!.,;:\s]+$", ""), (r"(?<=\d) ?万", "*10^{4}"),
    (r"(?i)^(yes|no|true|false)(?:[,.:]|(?=\s+(?:because|since|as)\b))\s(?!.*\b(?:or|maybe|perhaps|possibly|probably|"
     r"either|unless|yes|no|not sure|true|false)\b).*$", r"\1"),
    (r"(?i)^(?:(?:[a-z]{0,3}\s*\\(?:approx|simeq|sim)|about|approx(?:imately)?|roughly|around)(?![a-z])\.?|"
     r"~|[a-z]\s*\\in(?![a-z]))\s*(?=[-\d.\\(\[])", ""),
)  # fmt: skip
_NOTHING = r"nosolution nosolutions norealsolution norealsolutions thereisnosolution none ⟦⟧".split()
_REALS = r"reals allrealnumbers allreals (-\infty,\infty) (-\infty,+\infty)".split()
_SYNONYMS = dict.fromkeys(_NOTHING, r"\emptyset") | dict.fromkeys(_REALS, "ℝ") | {"dne": "doesnotexist"}


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    """One spelling of a text: ``*``, ``/``, ``°``, ``⟦`` of sets, ``＄``, ``⏎`` (row), ``;`` (new line)."""
    row, line = ("⏎", " ") if "\\begin" in text else (";", ";")
    text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text.strip()).replace("\\\\", row).replace("\n", line)
    if not text.isascii():
        text = re.sub("[₀-₉₊₋]+", r"_{\g<0>}", text.replace("\u200b", "").replace("＄", "$"))
        text = re.sub("[¼½¾⅐-⅞]", r" \g<0>", re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", text))
        text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
        text = "".join(str(unicodedata.digit(c)) if c.isdigit() else c for c in text)
    for _ in range(4):
        text = _TEXT.sub(r" \1 ", text)
    text = re.sub(r"\\([A-Za-z]+|[^,;:!>\s])", lambda m: _COMMANDS.get(m[1], m[0]), text)
    for pattern, to in _REWRITTEN:
        text = re.sub(pattern, to, text)
    separator = " " if re.search(r"[(\[{⟦]", text) else "[ ,]"
    thousands = rf"(?<![\d.,_^])\d{{1,3}}(?:{separator}\d{{3}})+(?![\d,]| \d)"
    return re.sub(thousands, lambda m: re.sub("[, ]", "", m[0]), text)


def key(text: str) -> str:
    """What the same strings share: spaces but between digits, the case of words and synonyms do not count."""
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)
    words = r"(?<![\\A-Za-z])[A-Za-z]{4,}" if re.search(r"[\d\\^_=+*/|<>°%]", text) else "[A-Z]"
    if re.fullmatch(r"[A-Z][\w{}]*", text):
        text = re.sub("[_{}]", "", text)  # CO_2
    text = re.sub(words, lambda match: match[0].lower(), text)
    return _SYNONYMS.get(re.sub("[.']", "", text.lower()), text)


def enclosed(text: str) -> bool:
    """Whether the first character is a bracket that the last one closes, of any kind: ``[1, 2)``."""
    return text[:1] in tuple("([{⟦") and cut(text, "(?s).") == (text[:-1].strip(), "")


def cut(text: str, separator: str) -> tuple[str, ...]:
    """``text`` cut where ``separator`` matches outside all brackets."""
    depths = list(accumulate((c in "([{⟦") - (c in ")]}⟧") for c in text))
    parts, start = [], 0
    for match in re.finditer(separator, text):
        if depths[match.start()] == 0:
            parts.append(text[start : match.start()].strip())
            start = match.end()
    return (*parts, text[start:].strip())
