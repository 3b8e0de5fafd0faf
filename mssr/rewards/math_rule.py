r"""Whether two answers are the same mathematics.

Texts that are equal after `latex.clean` are equal; then, each where it applies (`same`):

- **Numbers and expressions** have the same value, exactly: ``0.5``, ``\frac12``, ``1/2``; ``(x+1)^2``,
  ``x^2+2x+1``; see `values`. A decimal of at least six places and significant digits also equals a number
  that it is the rounding of and that no decimal could be (``1.414214`` for ``\sqrt2``); a shorter one
  needs ``tolerance``.
- **Percent** is a hundredth: ``50%`` equals ``0.5``. If the truth has the sign and the answer has not, the
  answer may mean either: ``50`` and ``0.5`` equal a truth of ``50%``. ``50%`` does not equal a truth of 50.
- **Units** are compared if both have one, by name and not by size (``1 m`` is not ``100 cm``), and ignored if
  only one has: ``12 cm`` equals 12 either way. ``30°`` equals ``\pi/6``.
- **A name before =** is ignored if only one has it (``x = 3`` equals 3), else both must have the same one.
- **Lists and sets** (``1, 2``, ``\{1, 2\}``, ``1 or 2``, ``\pm 1``) are equal in any order, and with names
  (``x=1, y=2``) by name. **Points, intervals, ratios of three** are ordered and keep their brackets; a list
  without brackets equals a point in the same order.
- **Inequalities** equal the same interval (``1 < x \le 2`` and ``(1, 2]``); equations and inequalities equal
  their multiples and rearrangements (``y=2x+1`` and ``2x-y+1=0``).
- **Matrices** are equal element by element.
- **Choices**: a truth that is an option letter goes to `choice`; before a truth that is an option's text the
  answer may carry a letter (``A. 12 cm`` equals ``12 cm``).
- **Words** are equal up to case; an answer to yes/no or true/false may go on after the word; "no solution",
  ``\emptyset`` and ``\{\}`` are one, and so are "all real numbers", ``\mathbb{R}`` and ``(-\infty, \infty)``.

What this module cannot read goes to math-verify, if it is small enough that sympy cannot explode on it.
Division by zero and expressions that are refused for their size (`values.MAX_BITS`) equal only themselves.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mssr.rewards import choice, latex, units, values
from mssr.rewards.exact_match import normalise
from mssr.rewards.expression import Node, Unsupported, parse
from mssr.rewards.structure import Structure, interval, is_name, read

_MAX_ELEMENTS = 30
_PERCENT = re.compile(r"\s*(?:%|⟪?\s*(?:percent|per cent|percentage|pct)\s*⟫?)$", re.IGNORECASE)
_THOUSANDS = re.compile(r"^([-+]?\s*[^\d\s]?)(\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+))(?!\d)(?![, ]\d)")
_DECIMAL_COMMA = re.compile(r"^([-+]?\d+),(\d+)(?!\d|,)")
_DECIMAL = re.compile(r"^[-+]?0*(\d*)\.(\d+)$")
_SCALE = re.compile(r"(?<=\d)\s*⟪?\s*(hundred|thousand|million|billion)\s*⟫?(?![a-z])", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9}
_RATIO = re.compile(r"^([^:]+):([^:]+)$")
_WORD = re.compile(r"^[⟪A-Za-z][A-Za-z⟪⟫ ']+$")
_OPTION = re.compile(r"^\W*(?:\\text\w*\{|\\math\w+\{)?\W*[A-H](?![A-Za-z])")
_DEGREE: units.Unit = (("°", 1),)


def grade(answer: str, truth: str, *, tolerance: float = 0.0) -> bool:
    """Whether the answer is the same as the truth, see the module.

    Args:
        answer: The final answer.
        truth: The ground truth.
        tolerance: Largest distance of two numbers relative to the truth's.
    """
    if not answer.strip() or not truth.strip():
        return False
    if normalise(answer) == normalise(truth):
        return True
    if len(answer) > latex.MAX_LENGTH or len(truth) > latex.MAX_LENGTH:
        return False
    if _OPTION.match(truth):
        letters, text = choice.read(truth, "ABCDEFGH")
        if len(letters) == 1 and (text or len(re.sub(r"\\[a-z]+|\W", "", truth)) == 1):
            return choice.grade(answer, truth, letters="ABCDEFGH")
    answer = choice.ANNOUNCED.sub("", answer.strip(), count=1) or answer
    letters, text = choice.read(answer, "ABCDEFGH")
    if len(letters) == 1 and text and same(text, truth, tolerance=tolerance):
        return True
    return same(answer, truth, tolerance=tolerance)


def same(answer: str, truth: str, *, tolerance: float = 0.0) -> bool:
    """`grade` without the choices."""
    if len(answer) > latex.MAX_LENGTH or len(truth) > latex.MAX_LENGTH:
        return False
    verdict = _same(latex.clean(answer), latex.clean(truth), tolerance)
    return _math_verify(answer, truth) if verdict is None else verdict


def same_number(answer: str, truth: str, *, tolerance: float, absolute: float) -> bool:
    """Whether both are one real number and as close as `number.grade` says."""
    if len(answer) > latex.MAX_LENGTH or len(truth) > latex.MAX_LENGTH:
        return False
    a, t = read(latex.clean(answer)), read(latex.clean(truth))
    if not {a.kind, t.kind} <= {"scalar", "equation", "approximation", "bare"}:
        return False
    a_text, t_text = (x.parts[-1] if x.kind in ("equation", "approximation") else x.text for x in (a, t))
    return bool(a_text and t_text) and _scalar(a_text, t_text, tolerance, absolute, numbers=True) is True


def _same(a_text: str, t_text: str, tolerance: float, depth: int = 0) -> bool | None:
    """The verdict on two canonical texts; None if they are not understood."""
    if not a_text or not t_text or depth > 8:
        return False
    if latex.key(a_text) == latex.key(t_text):
        return True
    a, t = read(a_text), read(t_text)
    if a.word and t.word:
        return a.word == t.word
    if t.word in ("yes", "no", "true", "false"):
        first = re.match(r"[^A-Za-z0-9]*([A-Za-z]+)(?![A-Za-z])", a_text)
        return first is not None and first[1].lower() == t.word
    if t.kind == "scalar" and a.kind == "set" and len(a.parts) == 1:
        a = read(a.parts[0])
    elif a.kind == "scalar" and t.kind == "set" and len(t.parts) == 1:
        t = read(t.parts[0])
    # An approximation gives its two sides to choose from.
    for this, other, flip in ((a, t, False), (t, a, True)):
        if this.kind == "approximation" and other.kind != "approximation":
            sides = [(part, other.text) if not flip else (other.text, part) for part in this.parts]
            return _any(_same(x, y, tolerance, depth + 1) for x, y in sides)
    if "inequality" in (a.kind, t.kind) and a.kind != t.kind:
        a, t = (interval(x) or x for x in (a, t))
    if a.kind == t.kind == "inequality":
        return _inequalities(a, t, tolerance, depth)
    if "equation" in (a.kind, t.kind):
        return _equations(a, t, tolerance, depth)
    if a.kind == "scalar" and t.kind == "scalar":
        return _scalar(a.text, t.text, tolerance, 0.0)
    if t.kind == "scalar" or a.kind == "scalar":
        if (a.kind == "bare" or t.kind == "bare") and (
            _THOUSANDS.match(a.text) or _THOUSANDS.match(t.text) or _DECIMAL_COMMA.match(a.text)
        ):
            return _scalar(a.text, t.text, tolerance, 0.0) is True
        return None if {a.kind[:5], t.kind[:5]} & {"other", "deter"} else False
    return _collections(a, t, tolerance, depth)


def _any(verdicts: Any) -> bool | None:
    result: bool | None = False
    for verdict in verdicts:
        if verdict:
            return True
        if verdict is None:
            result = None
    return result


def _all(verdicts: Any) -> bool | None:
    result: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


def _collections(a: Structure, t: Structure, tolerance: float, depth: int) -> bool | None:
    if "other" in (a.kind, t.kind):
        return None
    unordered = {"bare", "set", "union"}
    if len(a.parts) > _MAX_ELEMENTS or len(t.parts) > _MAX_ELEMENTS:
        return False
    if _THOUSANDS.fullmatch(a.text) and _THOUSANDS.fullmatch(t.text):
        return _scalar(a.text, t.text, tolerance, 0.0)
    if a.kind in unordered and t.kind in unordered:
        if (a.kind == "union") != (t.kind == "union"):
            return None  # the union of sets may be one set
        if a.kind == "bare" and t.kind == "bare" and len(a.parts) != len(t.parts):
            return False
        if _names(a.parts) != _names(t.parts):
            if None in (_names(a.parts), _names(t.parts)):
                return _ordered(a, t, tolerance, depth)
            return False
        table = [[_same(x, y, tolerance, depth + 1) for y in t.parts] for x in a.parts]
        columns = list(zip(*table, strict=True))
        return _all([*map(_any, table), *map(_any, columns)])
    if a.kind == t.kind or {a.kind, t.kind} == {"bare", "()"}:
        return _ordered(a, t, tolerance, depth)
    return False


def _ordered(a: Structure, t: Structure, tolerance: float, depth: int) -> bool | None:
    if len(a.parts) != len(t.parts):
        return False
    return _all(_same(x, y, tolerance, depth + 1) for x, y in zip(a.parts, t.parts, strict=True))


def _names(parts: tuple[str, ...]) -> frozenset[str] | None:
    """The different names of a list like ``x=1, y=2``; None without, or if all are the same."""
    found = [latex.key(s.parts[0]) for s in map(read, parts) if s.kind == "equation" and is_name(s.parts[0])]
    return frozenset(found) if len(found) == len(parts) and len(set(found)) > 1 else None


def _equations(a: Structure, t: Structure, tolerance: float, depth: int) -> bool | None:
    if a.kind != "equation":
        return _same(a.text, t.parts[-1], tolerance, depth + 1) if is_name(t.parts[0]) else False
    if t.kind != "equation":
        value = a.parts[0] if is_name(a.parts[-1]) and not is_name(a.parts[0]) else a.parts[-1]
        return _same(value, t.text, tolerance, depth + 1)
    if latex.key(a.parts[0]) == latex.key(t.parts[0]):
        return _same(a.parts[-1], t.parts[-1], tolerance, depth + 1)
    try:
        left, right = (
            ("-", *map(parse, (a.parts[0], a.parts[-1]))),
            ("-", *map(parse, (t.parts[0], t.parts[-1]))),
        )
        return values.same_function(left, right, proportional=True) != 0
    except Unsupported:
        return False if is_name(a.parts[0]) and is_name(t.parts[0]) else None


def _inequalities(a: Structure, t: Structure, tolerance: float, depth: int) -> bool | None:
    first, second = interval(a), interval(t)
    if first and second:
        return first.name == second.name and _same(first.text, second.text, tolerance, depth + 1)
    if len(a.parts) != 2 or len(t.parts) != 2:
        return None
    try:
        sides = []
        for x in (a, t):
            low, high = x.parts if x.operators[0] in ("<", r"\le") else reversed(x.parts)
            sides.append(("-", parse(high), parse(low)))
        strict = [x.operators[0] in "<>" for x in (a, t)]
        if r"\ne" in (*a.operators, *t.operators):
            return a.operators == t.operators and values.same_function(*sides, proportional=True) != 0
        return strict[0] == strict[1] and values.same_function(*sides, proportional=True) == 1
    except Unsupported:
        return None


def _scalar(a: str, t: str, tolerance: float, absolute: float, *, numbers: bool = False) -> bool | None:
    """Two single values with percent signs and units; None if one cannot be read."""
    a, t = _plain_digits(a, comma=True), _plain_digits(t)
    a_bare, t_bare = _PERCENT.sub("", a), _PERCENT.sub("", t)
    a_percent, t_percent = a_bare != a, t_bare != t
    t_value, t_unit = units.split(t_bare)
    a_value, a_unit = units.split(a_bare, glued=t_unit is not None or not re.search(r"(?<!\\)\b[A-Za-z]", t))
    if a_unit is not None and t_unit is None:
        t_value, t_unit = units.split(t_bare, glued=units.split(a_bare)[1] is not None)
    if a_unit is not None and t_unit is not None and a_unit != t_unit:
        return False
    if _WORD.match(a_value) and _WORD.match(t_value):
        return latex.key(a_value) == latex.key(t_value) and not numbers  # AB is not BA
    try:
        x, y = _tree(a_value), _tree(t_value)
    except Unsupported:
        if latex.key(a_value) == latex.key(t_value) and not numbers and a_percent == t_percent:
            return True
        return False if _is_words(a_value) or _is_words(t_value) else None
    if (a_unit == _DEGREE) != (t_unit == _DEGREE) and None in (a_unit, t_unit):
        if a_unit == _DEGREE and "\\pi" in t_value:
            x = ("*", ("/", x, ("num", Fraction(180))), ("pi",))
        elif t_unit == _DEGREE and "\\pi" in a_value:
            y = ("*", ("/", y, ("num", Fraction(180))), ("pi",))
    hundred = ("num", Fraction(100))
    pairs = [(("/", x, hundred) if a_percent else x, ("/", y, hundred) if t_percent else y)]
    if t_percent and not a_percent:
        pairs.append((x, y))
    try:
        if numbers or not (values.variables(x) or values.variables(y)):
            return any(
                _close(values.evaluate(p, {}), values.evaluate(q, {}), tolerance, absolute, a_value, t_value)
                for p, q in pairs
            )
        return any(values.same_function(p, q, tolerance=tolerance) != 0 for p, q in pairs)
    except Unsupported:
        return False  # no value, or too large for a verdict: then sympy is not asked either
    except KeyError:
        return False  # a variable where a number is wanted


def _close(x: Any, y: Any, tolerance: float, absolute: float, a_text: str, t_text: str) -> bool:
    if absolute and not (values.is_real(x) and values.is_real(y)):
        return False
    return values.close(x, y, tolerance, absolute) or _rounds_to(a_text, x, y) or _rounds_to(t_text, y, x)


def _rounds_to(text: str, written: Any, exact: Any) -> bool:
    """Whether ``written``, a decimal of six places or more, rounds ``exact``, which no decimal is."""
    match = _DECIMAL.match(text)
    if match is None or len(match[2]) < 6 or len((match[1] + match[2]).lstrip("0")) < 6:
        return False
    if isinstance(exact, Fraction):
        rest = exact.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return False
    distance = abs(values.number(written) - values.number(exact))
    return bool(distance * 10 ** len(match[2]) <= 0.5 or distance <= abs(values.number(exact)) * 1e-14)


def _plain_digits(text: str, *, comma: bool = False) -> str:
    """Without thousands separators; ``3 million`` as a product; ``3,14`` as ``3.14`` if ``comma``."""
    text = _THOUSANDS.sub(lambda m: m[1] + re.sub("[ ,]", "", m[2]), text)
    if comma:
        text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    return _SCALE.sub(lambda m: "*" + str(10 ** _SCALES[m[1].lower()]), text)


def _tree(text: str) -> Node:
    ratio = _RATIO.match(text)
    if ratio:
        return ("/", parse(ratio[1]), parse(ratio[2]))
    scientific = re.fullmatch(r"([-+]?\d+\.?\d*)[eE]([-+]?\d{1,4})", text)
    return parse(f"{scientific[1]}*10^{{{scientific[2]}}}" if scientific else text)


def _is_words(text: str) -> bool:
    return not re.search(r"[\d\\^_=+*/|{}()\[\]]", text)


# What sympy could take long over, or for ever: long numbers and roots, operators that it would carry out.
_HOSTILE = re.compile(
    r"\d{40}|\[\s*\d{3}|!|\d\s+\d|exp|sinh|cosh|tanh|amma|zeta|\\(?:int|sum|prod|lim|binom|iint|oint|frac\s*d)"
)
# The only powers that it gets: to a number up to 12, a letter, or a short sum or fraction of such.
_EXPONENT = r"(?:1[0-2]|\d|[A-Za-z])(?!\d)"
_POWER = re.compile(
    rf"(?:\^|\*\*)\s*(?:-?{_EXPONENT}|\{{\s*-?{_EXPONENT}(?:[-+/]{_EXPONENT})?\s*\}}|\{{?\s*\\circ\s*\}}?)(?!\s*(?:\^|\*\*))"
)
_MAX_SYMPY = 200
_SYMBOLS = frozenset("⟦⟧⟪⟫⏎＄ℝμ")


def _math_verify(answer: str, truth: str) -> bool:
    """The verdict of math-verify on two LaTeX answers; False for what could take long.

    Its own time limits are off, because they need signals: the caller limits the time.
    """
    for text in (answer, truth):
        if len(text) > _MAX_SYMPY or _HOSTILE.search(text) or text.count("{") > 24:
            return False
        if not text.count("^") + text.count("**") == len(_POWER.findall(text)) <= 6:
            return False
        if (
            text.count("(") + text.count("[") > 8
            or text.count(r"\left") > 8
            or not latex.clean(text).isprintable()
        ):
            return False  # its parser's time grows quickly with nested brackets
        if any(ord(c) > 0xFF and c not in _SYMBOLS for c in latex.clean(text)):
            return False
        bare = re.sub(r"\\(?:begin|end|operatorname|text|mathrm)\{[^{}]*\}", "", text)
        if not re.search(r"[\d\\]", text) or re.search(r"(?<![\\A-Za-z])[A-Za-z]{4}", bare):
            return False  # words: they would be read as products of variables
    parse_answer, verify, config = _load()
    try:
        gold, target = (
            parse_answer(
                f"${latex.undelimited(text)}$", [config], fallback_mode="no_fallback", parsing_timeout=None
            )
            for text in (truth, answer)
        )
        return bool(gold and target and verify(gold, target, timeout_seconds=None))
    except Exception:
        return False  # whatever a parser of half-random text may raise: it is not equal


@lru_cache(maxsize=1)
def _load() -> tuple[Any, Any, Any]:
    """math-verify, imported when first needed (half a second), without its warning that it has no limit."""
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse, verify, LatexExtractionConfig()
