r"""The exact or high-precision value of an expression's tree, and equality of expressions by value.

With numbers in place of the variables the value is a `Fraction` as long as every step is rational, else a
number of 50 digits. Two expressions are equal if their values agree at a few points (an identity of
polynomials that fails, fails at almost every point). This takes microseconds to a millisecond where a
computer algebra system takes up to seconds, and its cost is bounded: powers and factorials that would
explode are refused with `Unsupported`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath  # type: ignore[import-untyped]

from mssr.rewards.expression import Node, Unsupported

MAX_BITS = 8_192
"""Size of an exact number, about 2,466 decimal digits."""
MAX_LOG2 = 200_000.0
"""Size of the binary logarithm of a value that is not exact."""


@lru_cache(maxsize=1)
def _mp() -> Any:
    context = mpmath.MPContext()  # our own: nobody else's precision is touched
    context.dps = 50
    return context


def variables(node: Node) -> frozenset[str]:
    """Names of the variables of a tree."""
    if node[0] == "var":
        return frozenset([node[1]])
    return frozenset[str]().union(*(variables(child) for child in node[1:] if isinstance(child, tuple)))


def point(names: frozenset[str], index: int) -> dict[str, Fraction]:
    """The ``index``-th trial values: rationals that depend on the name only; negative from index 2 on."""
    values = {}
    for name in names:
        draw = zlib.crc32(f"{name}/{index}".encode())
        value = Fraction(draw % 8_999 + 1_009, (draw >> 16) % 97 * 2 + 1_013)
        values[name] = value if index < 2 or name == r"\infty" else -value
    return values


def evaluate(node: Node, values: Mapping[str, Fraction]) -> Any:
    """Value of a tree: a `Fraction` if every step is rational, else an mpmath number.

    Raises:
        Unsupported: Division by zero, a value that is too large, an unknown operation.
    """
    try:
        return _evaluate(node, values)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError, mpmath.libmp.ComplexResult) as error:
        raise error if isinstance(error, Unsupported) else Unsupported(str(error)) from error


def _evaluate(node: Node, values: Mapping[str, Fraction]) -> Any:
    name = node[0]
    if name == "num":
        return node[1]
    if name == "var":
        return values[node[1]]
    if name in ("pi", "e", "i"):
        return {"pi": +_mp().pi, "e": +_mp().e, "i": _mp().mpc(0, 1)}[name]
    args = [_evaluate(child, values) for child in node[1:]]
    return _checked(_apply(name, args))


def _apply(name: str, args: list[Any]) -> Any:
    if name == "^":
        return _power(*args)
    if name == "root":
        return _root(*args)
    if name == "!":
        return Fraction(math.factorial(_integer(args[0], 300)))
    if name == "binom":
        return Fraction(math.comb(_integer(args[0], 1_000), _integer(args[1], 1_000)))
    if name == "abs":
        return abs(args[0])
    if name == "neg":
        return -args[0]
    if name in ("+", "-", "*", "/"):
        a, b = args
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            a, b = number(a), number(b)
        return a + b if name == "+" else a - b if name == "-" else a * b if name == "*" else a / b
    mp = _mp()
    x = number(args[0])
    if name in ("exp", "sinh", "cosh", "tanh") and abs(x) > 100_000:
        raise Unsupported("too large")
    if abs(x) > mp.mpf(10) ** 40 and name in ("sin", "cos", "tan", "cot", "sec", "csc"):
        raise Unsupported("angle too large")
    if name in ("log", "lg", "ln"):
        base = number(args[1]) if len(args) > 1 else mp.mpf(10) if name in ("log", "lg") else None
        return mp.log(x) if base is None else mp.log(x) / mp.log(base)
    inverse = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
    return getattr(mp, inverse.get(name, name))(x)


def number(value: Any) -> Any:
    """A value as an mpmath number."""
    return _mp().mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _checked(value: Any) -> Any:
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Unsupported("too many digits")
    elif not _mp().isfinite(value):
        raise Unsupported("not finite")
    return value


def _integer(value: Any, limit: int) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= limit:
        raise Unsupported("no small integer")
    return int(value)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(exponent) * bits <= MAX_BITS:
                return base ** int(exponent)
            raise Unsupported("power too large")
        if base >= 0 and exponent.denominator <= 64:
            root = _root(base, Fraction(exponent.denominator))
            if isinstance(root, Fraction):
                return _power(root, Fraction(exponent.numerator))
    mp = _mp()
    x, y = number(base), number(exponent)
    if x == 0:
        if mp.re(y) > 0:
            return Fraction(0)
        raise Unsupported("power of zero")
    if abs(y) * (abs(mp.log(x)) + 1) > MAX_LOG2:
        raise Unsupported("power too large")
    return mp.power(x, y)


def _root(value: Any, degree: Any) -> Any:
    n = _integer(degree, 64)
    if n == 0:
        raise Unsupported("root of degree 0")
    if isinstance(value, Fraction):
        if value < 0 and n % 2:
            return -_root(-value, degree)
        if value >= 0:
            top, bottom = _integer_root(value.numerator, n), _integer_root(value.denominator, n)
            if top is not None and bottom is not None:
                return Fraction(top, bottom)
    mp = _mp()
    x = number(value)
    if n % 2 and mp.im(x) == 0 and mp.re(x) < 0:
        return -mp.root(-mp.re(x), n)
    return mp.root(x, n)


def _integer_root(value: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(value)
    else:
        root = round(value ** (1 / n)) if value.bit_length() < 1_000 else 0
    return root if root**n == value else None


def close(a: Any, b: Any, tolerance: float = 0.0, absolute: float = 0.0) -> bool:
    """Equality of two values, exact for fractions, to 25 digits otherwise; or within a tolerance.

    Args:
        a, b: What `evaluate` gave.
        tolerance: Largest distance relative to ``b``.
        absolute: Largest distance.
    """
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b or abs(a - b) <= max(Fraction(tolerance) * abs(b), Fraction(absolute))
    mp = _mp()
    x, y = number(a), number(b)
    return bool(abs(x - y) <= max(max(tolerance, 1e-25) * abs(y), absolute, mp.mpf(10) ** -35))


def is_real(value: Any) -> bool:
    """Whether the imaginary part is nothing but rounding."""
    return isinstance(value, Fraction) or bool(abs(_mp().im(value)) <= _mp().mpf(10) ** -35)


def same_function(a: Node, b: Node, *, tolerance: float = 0.0, proportional: bool = False) -> int:
    """Whether two expressions have one value wherever both have one: at points of both signs.

    At the points with negative variables a value that is not real is passed over: there a logarithm or
    root is outside the domain that is meant.

    Args:
        a, b: Trees.
        tolerance: Relative, see `close`.
        proportional: Whether a constant factor other than 0 may stand between the two.

    Returns:
        0 if not; else the sign of the factor, 1 without ``proportional``.

    Raises:
        Unsupported: The two share no point with a value.
    """
    names = variables(a) | variables(b)
    ratio: Any = None
    compared = 0
    for index in range(4 if names else 1):
        values = point(names, index)
        try:
            x, y = evaluate(a, values), evaluate(b, values)
        except Unsupported:
            if not names:
                raise
            continue
        if index >= 2 and not (is_real(x) and is_real(y)):
            continue
        compared += 1
        if not proportional:
            if not close(x, y, tolerance):
                return 0
            continue
        if x == 0 or y == 0:
            if x != y:
                return 0
            continue
        quotient = _apply("/", [x, y])
        if not is_real(quotient) or (ratio is not None and not close(quotient, ratio)):
            return 0
        ratio = quotient
    if not compared:
        raise Unsupported("no common point")
    return 1 if ratio is None or mpmath.re(number(ratio)) > 0 else -1
