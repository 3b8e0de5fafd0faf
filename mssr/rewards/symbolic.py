r"""Expressions, equations and sets in canonical LaTeX (see `latex`), as math-verify decides them.

Only what is made of known signs reaches it, and nothing that sympy could take long over: its own time limits
are off, for they need signals. Short decimals become fractions: to 6 places 2.6e-19 would be 1.6e-19.
"""

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|max|min|gcd|sqrt|pi"
_KNOWN = re.compile(
    rf"(?:\\(?:{_FUNCTIONS}|frac|binom|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|"
    r"omega|vec|[lr](?:floor|ceil)|[lg]e|infty|cup|operatorname\{lcm\}|(?:begin|end)\{[pbv]matrix\})(?![A-Za-z])"
    r"|[A-Za-z](?![A-Za-z])|\\cdot |\\\\|\d+|\d*\.\d+|[-+/^_(){}\[\]|!,<>=&\s])+"
)
_MIXED = r"(?<![\d.])(\d+)\s*(\\frac\{(\d+)\}\{(\d+)\})"
_REWRITTEN = (
    (_MIXED, r"(\1+\2)"), (r"(\d+(?:\.\d+)?)\s*°", r"(\\frac{\1\\pi}{180})"), (r",\s*", ", "),
    (r"(?<![\\A-Za-z}])C(?:_\{?(\d\d?)\}?\^\{?(\d\d?)\}?|\((\d\d?), (\d\d?)\))", r"\\binom{\1\3}{\2\4}"),
    (r"log_(\d+)(?=\s)|log_(\d)(?=\d)", r"log_{\1\2}"), (r"\\sqrt\[([3579])\]\{-", r"-\\sqrt[\1]{"),
    (r"(?<=[\d)])\s*(?=\()|(?<=\d)\s*(?=\\frac)|\*", r"\\cdot "), ("⏎", r"\\\\"),
    (rf"(?<![\\A-Za-z])(?=(?:{_FUNCTIONS}|lcm)(?![A-Za-z]))", r"\\"), (r"\\lcm", r"\\operatorname{lcm}"),
)  # fmt: skip
# Long numbers, two side by side, factorials of more than a short number, towers of powers, large powers of
# what is no short number, long or deep texts.
_HOSTILE = re.compile(
    r"\d{21}|\d\s+[\d.]|\d\s*_|\d{3}!|!!|[^\d]!|\\sqrt\s*\[(?!\s*\d\])|\\binom(?!\{\d\d?\}\{\d\d?\})|\^$|"
    r"\^(?:\{[^{}]*\}|[^{])\^|\^\{(?![1-4]\^\{?[1-4]\}?\})(?:[^{}]|\{[^{}]*\})*[\^!b]|"
    r"(?:(?<!\d)|\d{3})\^\{[^{}]*(?:1[3-9]|[2-9]\d|\d{3})|.{251}|(?:\{[^{]*){31}|(?:[(\[_][^(\[_]*){9}"
)
_PLAIN = r"-?(?:\d{1,200}/[1-9]\d{0,99}|(?=\.?\d)\d{0,200}(?:\.\d{1,200})?(?:e[-+]?\d\d?)?)"


@lru_cache(maxsize=4096)
def expression(text: str) -> Any:
    """The sympy object of a canonical text; None if it is not understood, or could take sympy for ever."""
    if any(not 0 < int(top) < int(bottom) for _, _, top, bottom in re.findall(_MIXED, text)):
        return None  # 1\frac{3}{2}
    for pattern, to in _REWRITTEN:
        text = re.sub(pattern, to, text)
    text = re.sub(
        r"(\d*)\.(\d{1,5})(?!\d)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text
    )
    text = re.sub(r"(?<![\\A-Za-z])(?!lcm)[A-Za-z]{2,3}(?![A-Za-z])", lambda m: " ".join(m[0]), text)
    powers = re.findall(r"\d+", " ".join(re.findall(r"\^(\{(?:[^{}]|\{[^{}]*\})*\}|.)", text)))
    if _HOSTILE.search(text) or math.prod(int(x) or 1 for x in powers) > 5_000 or not _KNOWN.fullmatch(text):
        return None
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that it has no limit
    config = LatexExtractionConfig(normalization_config=NormalizationConfig(False, boxed="none"))
    try:
        return parse(f"${text}$", [config], fallback_mode="no_fallback", parsing_timeout=None)[0]
    except Exception:
        return None  # whatever a parser of half-random text may raise


@lru_cache(maxsize=4096)
def value(text: str, symbols: bool = False) -> Any:
    """The number that a text is, exactly if it spells one; ``symbols``: with certain numbers as letters."""
    plain = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text.replace("E", "e"))
    plain = re.sub(r"\*10\^\{([-+]?\d\d?)\}$", r"e\1", plain)
    if re.fullmatch(_PLAIN, plain):
        return Fraction(plain)
    try:
        names = sorted(expression(text).free_symbols, key=str)
        numbers = {name: Fraction(31 + 17 * i, 23) for i, name in enumerate(names) if symbols}
        found = complex(expression(text).doit().subs(numbers).evalf(20))
        return found if math.isfinite(abs(found)) else None
    except Exception:
        return None  # an equation, an undefined function, a matrix, a division by zero


def same(a: str, t: str) -> bool:
    """Whether two expressions, equations, inequalities, sets or matrices are equal."""
    x, y, rounded = value(a, True), value(t, True), re.search(r"\.(\d{6,})", f"{a} {t}")
    if x is None or y is None:
        if x is not y:
            return False
    elif abs(x - y) > max(1e-12 * abs(y), 0.5 / 10 ** len(rounded[1]) if rounded else 0.0):
        return False  # sympy would take long to find that out
    elif isinstance(x, Fraction) and isinstance(y, Fraction) and not (rounded and ("." in a) != ("." in t)):
        return x == y
    letters = set(re.sub(r"\\[A-Za-z]+", "", a + t))
    if any(c.isupper() and c.lower() in letters for c in letters) or None in (expression(a), expression(t)):
        return False  # math-verify reads the cases of a letter as the same
    from math_verify import verify

    options = {"numeric_precision": 100, "timeout_seconds": None, "allow_set_relation_comp": True}
    return bool(verify(expression(t), expression(a), **options))
