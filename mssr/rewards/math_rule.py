"""Whether two answers are the same mathematics: a thin layer of forms over math-verify, see docs/rewards.md.

Texts of one canonical spelling are equal. Else both are brought to a form (value, list, equation) and parts
are compared, in the end by math-verify (`symbolic`). What is not understood is not equal.
"""

import re
from fractions import Fraction
from functools import lru_cache

from mssr.rewards import latex, symbolic, units

_APPROX, _RELATION = r"\\(?:approx|simeq)(?![a-z])", r"\\[lg]e(?![a-z])|[<>=]"
_LIST = r"[,;]\s*(?:(?:and|or)(?![A-Za-z]))?|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\cup(?![a-z])"
_NAME = re.compile(
    r"(?i)\|?(?:[a-z]{1,3}|area|perimeter|volume|length|width|height|radius|angle|slope|probability|sum|total|"
    r"distance|speed|answer)'?\|?(?:_(?:\w|\{[^{}]{1,20}\}))?(?:\([a-z, ]{1,10}\))?|"
    r"(?:m ?)?\\(?:tri)?angle ?\w+|\\[a-z]+a"
)
_CLOCK = re.compile(r"(?i)0?((?:1?\d|2[0-4]):(?:[0-5]\d|0\d:[0-5]\d|[0-5]\d:0\d))(?:\s*([ap])\.?\s?m\.?)?")


def same(answer: str, truth: str, *, tolerance: float = 0.0) -> bool:
    """Whether the two are equal; ``tolerance`` is of numbers, relative to the truth's."""
    short = max(len(answer), len(truth)) <= latex.MAX_LENGTH
    return short and _same(latex.clean(answer), latex.clean(truth), tolerance)


@lru_cache(maxsize=16384)
def _same(a: str, t: str, tolerance: float) -> bool:
    """The verdict on two canonical texts."""
    key_a, key_t = latex.key(a), latex.key(t)
    if key_a == key_t or not a or not t:
        return key_a == key_t != ""
    if re.fullmatch(r"[A-Za-z\s]+", a + t):
        return False  # words: as products of letters AB would be BA
    pairs = [(x, y) for x in sides(a) for y in sides(t)]
    if pairs != [(a, t)]:
        return any(_same(x, y, tolerance) for x, y in pairs)
    (kind_a, parts_a), (kind_t, parts_t) = read(a), read(t)
    kinds = {kind_a, kind_t}
    if "eq" in kinds:
        (name_a, value_a), (name_t, value_t) = named(a), named(t)
        if kind_a == kind_t and not name_a == name_t != "":
            return len(parts_a) == len(parts_t) == 2 and symbolic.same(a, t)
        return (kind_a == "eq" or name_t != "") and _same(value_a, value_t, tolerance)
    if kinds == {"value"}:
        return same_values(parts_a[0], parts_t[0], tolerance)
    if "region" in kinds:
        return symbolic.same(a, t)
    return parts_a == parts_t if kinds == {"clock"} else _collections(a, t, tolerance)


def read(text: str) -> tuple[str, tuple[str, ...]]:
    """Kind (value, list, all, set, eq, region, ratio, clock, brackets) and parts of a canonical text."""
    if 1 <= text.count(r"\pm") <= 2:
        return "list", tuple(text.replace(r"\pm", sign) for sign in "+-")
    if latex.enclosed(text) and (parts := tuple(filter(None, latex.cut(text[1:-1], "[,;]")))):
        kind = "set" if text[0] in "⟦{" else text[0] + text[-1]
        listed = kind == "[]" and (len(parts) > 2 or re.match("[A-Za-z]{2}", parts[0]))
        return read(parts[0]) if len(parts) == 1 else ("()" if listed else kind, parts)
    parts = tuple(filter(None, latex.cut(text, _LIST)))
    if len(parts) > 1:
        return "all" if re.search(r"[<>]|\\[lg]e", text) and re.search(r"\band\b", text) else "list", parts
    parts = latex.cut(text, _RELATION)
    if len(parts) > 1 and all(parts):
        return ("eq", parts) if set(re.findall(_RELATION, text)) == {"="} else ("region", parts)
    if clock := _CLOCK.fullmatch(text):
        return "clock", (clock[1], (clock[2] or "").lower())
    parts = tuple(re.split(r"\s*:\s*|(?<=\d) to (?=\d)", text))
    if len(parts) > 1 and all(parts) and not re.search(r"\w[-+*/]", text):
        return "value" if len(parts) == 2 else "ratio", tuple(f"{part}/{parts[-1]}" for part in parts[:-1])
    return "value", (text,)


def named(text: str) -> tuple[str, str]:
    """The name and value of ``x = 2 + 3 = 5``; no name without one, no value if sides differ or are words."""
    kind, parts = read(text)
    if kind != "eq":
        return "", text
    name = next((part for part in (parts[0], parts[-1]) if _NAME.fullmatch(part)), "")
    *others, last = parts[1:] if name == parts[0] else parts[:-1] if name else parts
    agree = all(_same(part, last, 0.0) for part in others) and not re.fullmatch(r"[A-Za-z\s]{2,}", last)
    return latex.key(name), last if agree else ""


def sides(text: str) -> tuple[str, ...]:
    r"""Both sides of ``exact \approx rounded``, none if that is not so; of another text the text."""
    left, *right = latex.cut(text, _APPROX)
    if not right:
        return (text,)
    exact, decimal = named(left)[1], re.match(r"-?\d*\.(\d+)", right[0])
    near = decimal and len(right) == 1 and same_values(right[0], exact, 0.0, 0.5 / 10 ** len(decimal[1]))
    return (exact, right[0]) if near and "." not in exact else ()


def stated(text: str) -> str | None:
    r"""The one value that a canonical text states: ``\sqrt{2} \approx 1.41`` gives ``1.41``; else None."""
    text = next(iter(sides(text)[::-1]), "")
    kind, parts = read(text)
    value = named(text)[1] if kind == "eq" else ""
    return stated(value) if value else parts[0] if kind == "value" and text else None


def _collections(answer: str, truth: str, tolerance: float) -> bool:
    """Whether two lists, sets or tuples hold the same, in order where that counts."""
    (kind_a, a), (kind_t, t) = read(answer), read(truth)
    kinds = {kind_a, kind_t}
    if not len(a) == len(t) <= 30 or (len(kinds) > 1 and kinds not in ({"list", "set"}, {"list", "()"})):
        return False
    names_a, names_t = ({named(x)[0] for x in parts} for parts in (a, t))
    stems = {name.partition("_")[0] for name in names_a | names_t} - {""}
    if names_a != names_t and len(stems) == 1:  # the roots x_1 = 1, x_2 = 3 are 1, 3
        a, t = (tuple(named(x)[1] for x in parts) for parts in (a, t))
    ordered = not kinds <= {"list", "set"} or (
        names_a != names_t and len(stems) > 1
    )  # x = 1, y = 2 is (1, 2)
    rest = list(t)
    for x in a:
        found = next((y for y in (rest[:1] if ordered else rest) if _same(x, y, tolerance)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def number(text: str) -> Fraction | None:
    """The real number that a value is, its unit and percent sign aside; None if it is none."""
    found = symbolic.value(units.split(text)[0])
    return None if found is None or found.imag else Fraction(found.real)


def same_values(a: str, t: str, tolerance: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether two single values, with percent signs and units, are equal, or near enough."""
    (x, unit_a), (y, unit_t) = units.split(a), units.split(t)
    if unit_a and unit_t and unit_a != unit_t:
        return False
    if {unit_a, unit_t} == {"°", ""} and r"\pi" in x + y:
        x, y = (f"{value}°" if unit else value for value, unit in ((x, unit_a), (y, unit_t)))
    if unit_a == "%" != unit_t:
        x = rf"\frac{{{x}}}{{100}}"
    if unit_t == "%" != unit_a and same_values(x, rf"\frac{{{y}}}{{100}}", tolerance, absolute):
        return True
    if latex.key(x) == latex.key(y) or symbolic.same(x, y):
        return True
    found_x, found_y = number(x), number(y)
    if found_x is None or found_y is None:
        return False
    return 0 < abs(found_x - found_y) <= max(Fraction(tolerance) * abs(found_y), Fraction(absolute))
