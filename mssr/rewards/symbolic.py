r"""Expressions, equations and sets in canonical LaTeX (see `latex`), as math-verify decides them.

Only what is made of known signs reaches it, and nothing that sympy could take long over: its own time limits
are off, for they need signals. Decimals become fractions: it rounds to 6 places, 2.6e-19 would be 1.6e-19.
"""

import logging
import math
import re
from functools import lru_cache
from typing import Any

_FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|ln|log|max|min|gcd|sqrt|pi"
_KNOWN = re.compile(
    rf"(?:\\(?:{_FUNCTIONS}|frac|binom|alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|"
    r"omega|vec|[lr](?:floor|ceil)|[lg]e|infty|cup|operatorname\{lcm\}|(?:begin|end)\{[pbv]matrix\})(?![A-Za-z])"
    r"|[A-Za-z](?![A-Za-z])|\\cdot |\\\\|\d+|[-+/^_(){}\[\]|!,<>=&\s])+"
)
_MIXED = r"(?<![\d.])(\d+)\s*(\\frac\{(\d+)\}\{(\d+)\})"
_REWRITTEN = (
    (_MIXED, r"(\1+\2)"), (r"(\d+(?:\.\d+)?)\s*°", r"(\\frac{\1\\pi}{180})"), (r",\s*", ", "),
    (r"(?<![\\A-Za-z}])C(?:_\{?(\d\d?)\}?\^\{?(\d\d?)\}?|\((\d\d?), (\d\d?)\))", r"\\binom{\1\3}{\2\4}"),
    (r"\\?(?<![a-z])lg(?![a-z])", r"\\log_{10}"), (r"log_(\d+)(?=\s)|log_(\d)(?=\d)", r"log_{\1\2}"),
    (r"\\sqrt\s*\[\s*([3579])\s*\]\{\s*-", r"-\\sqrt[\1]{"),
    (r"(?<=[\d)])\s*(?=\()|(?<=\d)\s*(?=\\frac)|\*", r"\\cdot "),
    (rf"(?<![\\A-Za-z])(?=(?:{_FUNCTIONS})(?![A-Za-z]))", r"\\"), (r"⏎", r"\\\\"),
)  # fmt: skip
_EXPONENT = re.compile(r"(\d*)\^(\{(?:[^{}]|\{[^{}]*\})*\}|.)")
# Long numbers, two numbers side by side, factorials of more than a short number, towers of powers.
_HOSTILE = re.compile(
    r"\d{21}|\d\s+[\d.]|\d\s*_|\d{3}!|!!|[^\d]!|\\sqrt\s*\[(?!\s*\d\])|\\binom(?!\{\d\d?\}\{\d\d?\})|\^$|"
    r"\^(?:\{[^{}]*\}|[^{])\^|\^\{(?![1-4]\^\{?[1-4]\}?\})(?:[^{}]|\{[^{}]*\})*[\^!b]"
)


@lru_cache(maxsize=4096)
def prepared(text: str) -> str | None:
    """What math-verify may read of a text: known signs, exact decimals, no power that could explode."""
    if any(not 0 < int(top) < int(bottom) for _, _, top, bottom in re.findall(_MIXED, text)):
        return None  # 1\frac{3}{2}
    for pattern, to in _REWRITTEN:
        text = re.sub(pattern, to, text)
    brackets = text.count("(") + text.count("[") + text.count("_")
    if len(text) > 250 or text.count("{") > 30 or brackets > 8 or _HOSTILE.search(text):
        return None
    text = re.sub(r"(\d*)\.(\d+)", lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])(?!lcm)[A-Za-z]{2,3}(?![A-Za-z])", lambda m: " ".join(m[0]), text)
    text = text.replace("lcm", r"\operatorname{lcm}")
    found = [(len(n), max(map(int, re.findall(r"\d+", x)), default=1)) for n, x in _EXPONENT.findall(text)]
    small = all(x <= (300 if 0 < digits < 3 else 12) for digits, x in found)
    small = small and math.prod(x or 1 for _, x in found) <= 5_000
    return text if small and _KNOWN.fullmatch(text) else None


@lru_cache(maxsize=1)
def _load() -> tuple[Any, Any, Any]:
    """math-verify, imported when first needed (2 s), without its warning that it has no limit."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify, LatexExtractionConfig(normalization_config=NormalizationConfig(False, boxed="none"))


@lru_cache(maxsize=4096)
def expression(text: str) -> Any:
    """The sympy object of a canonical text; None if it is not understood."""
    if not (latex := prepared(text)):
        return None
    parse, _, config = _load()
    try:
        return parse(f"${latex}$", [config], fallback_mode="no_fallback", parsing_timeout=None)[0]
    except Exception:
        return None  # whatever a parser of half-random text may raise


@lru_cache(maxsize=4096)
def value(text: str, symbols: bool = False) -> complex | None:
    """The number that an expression is, in double precision; ``symbols``: with certain numbers as letters."""
    from sympy import Rational

    try:
        names = sorted(expression(text).free_symbols, key=str)
        numbers = {name: Rational(31 + 17 * i, 23) for i, name in enumerate(names) if symbols}
        found = complex(expression(text).doit().subs(numbers).evalf(20))
        return found if math.isfinite(abs(found)) else None
    except Exception:
        return None  # an equation, an undefined function, a matrix, a division by zero


def same(a: str, t: str) -> bool:
    """Whether two expressions, equations or matrices are equal."""
    if not _comparable(a, t):
        return False
    x, y = value(a, True), value(t, True)
    if (x is None) != (y is None) or (x is not None and y is not None and abs(x - y) > 1e-12 * abs(y)):
        return False  # sympy would take long to find that out
    return bool(_load()[1](expression(t), expression(a), numeric_precision=100, timeout_seconds=None))


def same_set(a: str, t: str) -> bool:
    """Whether two intervals, unions, or inequalities in one letter are one set: ``|x|<3`` and ``(-3,3)``."""
    if not _comparable(a, t) or len(expression(a).free_symbols | expression(t).free_symbols) > 1:
        return False
    try:
        x, y = (e.as_set() if hasattr(e, "as_set") else e for e in map(expression, (a, t)))
        return bool(x == y)
    except Exception:
        return False  # sympy cannot solve it


def _comparable(a: str, t: str) -> bool:
    """Whether both are understood and no letter occurs in both cases, which math-verify reads as the same."""
    letters = set(re.sub(r"\\[A-Za-z]+", "", a + t))
    mixed = any(c.isupper() and c.lower() in letters for c in letters)
    return not mixed and None not in (expression(a), expression(t))
