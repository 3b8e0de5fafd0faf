"""Whether two answers are the same mathematics: a thin layer of forms over math-verify.

Texts that are equal after `latex.clean` are equal. Else both are brought to a form (a value, a list, an
interval, an equation, words) and parts are compared: plain numbers exactly, else by math-verify (`symbolic`).
What is not understood is not equal: unknown words behind a number, alternatives, hedges. See docs/data.md.
"""

import re
from fractions import Fraction
from functools import lru_cache

from mssr.rewards import choice, latex, symbolic, units

_SYNONYMS = (
    r"empty nosolution nosolutions norealsolution norealsolutions thereisnosolution \emptyset ⟦⟧ none",
    r"reals ℝ allrealnumbers allreals (-\infty,\infty) (-\infty,+\infty)", "undefined dne doesnotexist",
)  # fmt: skip
_WORDS = {word: group.split()[0] for group in _SYNONYMS for word in group.split()}
_REASON = re.compile(r"\W*(\w+)(?:[,.;:!]|\s*[-–—]|(?=\s+(?:because|since|as)\b))\s(.*)$")
_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|possibly|probably|either|unless|not sure|yes|no|true|false)\b")
_ABOUT = re.compile(
    r"^(?:\\(?:approx|simeq|sim)(?![a-z])|~|(?:about|approximately|approx|roughly|around|circa)(?![a-z])\.?|"
    r"[a-z]\s*\\in(?![a-z]))\s*", re.I
)  # fmt: skip
_APPROX, _UNION, _RELATION = r"\\(?:approx|simeq)(?![a-z])", r"\\cup(?![a-z])", r"\\[lg]e(?![a-z])|[<>=]"
_LIST = r"[,;]\s*(?:(?:and|or)(?![A-Za-z]))?|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
_BUILDER = re.compile(r"⟦\s*[A-Za-z]\s*(?:\\in\s*ℝ\s*)?[|:](.*)⟧")
_NAME = re.compile(
    r"\|?[A-Za-z]{1,3}'?\|?(?:_(?:\w|\{[^{}]{1,20}\}))?(?:\([A-Za-z, ]{1,10}\))?|m?\s*\\(?:tri)?angle\s*\w+"
    r"|\\(?:alpha|beta|gamma|theta|lambda|omega|phi|mu|rho)(?:_\w)?|(?:the )?(?:area|perimeter|volume|length|"
    r"width|height|radius|angle|slope|probability|sum|total|distance|speed|answer)", re.I
)  # fmt: skip
_CLOCK = re.compile(r"0?((?:1?\d|2[0-4]):(?:[0-5]\d|0\d:[0-5]\d|[0-5]\d:0\d))(?:\s*([ap])\.?\s?m\.?)?", re.I)
_NUMBER = re.compile(
    r"(-?)\s*(?:(\d+)?\s*\\frac\{(-?\d+)\}\{(-?\d+)\}|(\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s*/\s*(\d+(?:\.\d+)?)|\s*\*\s*10\^\{([-+]?\d{1,3})\}|[eE]([-+]?\d{1,3}))?)"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8}
_SCALE = re.compile(rf"(?<=\d)\s*({'|'.join(_SCALES)})$", re.I)
_PERCENT = re.compile(r"\s*(?:%|percent(?:age)?|per cent|pct)$", re.I)


def grade(answer: str, truth: str, *, tolerance: float = 0.0) -> bool:
    """Whether the answer is the same as the truth; ``tolerance`` is of numbers, relative to the truth's."""
    answer, truth = answer.strip(), truth.strip()
    if not answer or answer == truth or max(len(answer), len(truth)) > latex.MAX_LENGTH:
        return answer == truth != ""
    if choice.names_option(truth):
        return choice.grade(answer, truth, letters="ABCDEFGH")
    if re.fullmatch("[A-H]{2,6}", truth) and re.sub(r"[\s,;&()]+|and|和", "", latex.clean(answer)) == truth:
        return True
    letters, text = choice.read(answer, "ABCDEFGH")
    if len(letters) == 1 and text and same(text, truth, tolerance=tolerance):
        return True
    return same(choice.unannounced(answer), truth, tolerance=tolerance)


def same(answer: str, truth: str, *, tolerance: float = 0.0) -> bool:
    """`grade` without the choices."""
    short = max(len(answer), len(truth)) <= latex.MAX_LENGTH
    return short and _same(told(answer), told(truth), tolerance)


def told(text: str) -> str:
    """The canonical text without "about" and thousands separators."""
    text = _ABOUT.sub("", latex.clean(text))
    separator = " " if re.search(r"[(\[{⟦]", text) else "[ ,]"
    thousands = rf"(?<![\d.,_^])\d{{1,3}}(?:{separator}\d{{3}})+(?![\d,]| \d)"
    return re.sub(thousands, lambda match: re.sub("[, ]", "", match[0]), text)


@lru_cache(maxsize=16384)
def _same(a: str, t: str, tolerance: float = 0.0) -> bool:
    """The verdict on two canonical texts."""
    key_a, key_t = latex.key(a), latex.key(t)
    if key_a == key_t or not a or not t:
        return key_a == key_t != ""
    word_a, word_t = (_WORDS.get(re.sub(r"[\s.']", "", word).lower(), word) for word in (key_a, key_t))
    if word_t in ("yes", "no", "true", "false"):
        reason = _REASON.match(a.lower())
        return reason is not None and reason[1] == word_t and not _HEDGE.search(reason[2])
    if {"empty", "undefined"} & {word_a, word_t} or word_a == word_t:
        return word_a == word_t
    if re.fullmatch(r"[A-Za-z\s]+", a + t):
        return False  # words: as products of letters AB would be BA
    if all(re.fullmatch(r"[A-Z][\w{}]*", key) for key in (key_a, key_t)):
        return re.sub("[_{}]", "", key_a) == re.sub("[_{}]", "", key_t)  # CO_2
    (kind_a, parts_a), (kind_t, parts_t) = read(a), read(t)
    kinds = {kind_a, kind_t}
    if "approx" in kinds:
        return any(_same(x, y, tolerance) for x in sides(a) for y in sides(t))
    if "eq" in kinds:
        (name_a, value_a), (name_t, value_t) = named(a), named(t)
        if kind_a == kind_t and not name_a == name_t != "":
            return len(parts_a) == len(parts_t) == 2 and symbolic.same(a, t)
        return (kind_a == "eq" or name_t != "") and _same(value_a, value_t, tolerance)
    if kinds == {"value"}:
        return same_values(parts_a[0], parts_t[0], tolerance)
    if "region" in kinds:
        x, y = parts_a[0] if kind_a == "region" else a, parts_t[0] if kind_t == "region" else t
        return symbolic.same_set(x, y) or (kind_a == kind_t and symbolic.same(x, y))
    if (kind_a, kind_t) == ("list", "value") and re.fullmatch(r"-?\d+,\d+", a) and "." in t:
        return _same(a.replace(",", "."), t, tolerance)  # 3,14
    if kinds & {"value", "clock"}:
        return kind_a == kind_t and parts_a == parts_t
    return _collections(read(a), read(t), tolerance)


Form = tuple[str, tuple[str, ...]]
"""A kind (value, list, all, set, union, eq, region, approx, ratio, clock, or brackets) and its parts."""


@lru_cache(maxsize=8192)
def read(text: str) -> Form:
    """The form of a canonical text."""
    text = re.sub(r"^(?:negative|minus)\s+(?=[\d.\\])", "-", text.lstrip(" +"), flags=re.I)
    if builder := _BUILDER.fullmatch(text):
        return read(builder[1].strip())
    if 1 <= text.count(r"\pm") + text.count(r"\mp") <= 2:
        return "list", tuple(text.replace(r"\pm", x).replace(r"\mp", y) for x, y in ("+-", "-+"))
    if text[:1] in ("'", '"') and text[0] == text[-1]:
        return "value", (text[1:-1],)
    if latex.enclosed(text) and (parts := tuple(filter(None, latex.cut(text[1:-1], "[,;]")))):
        kind = "set" if text[0] in "⟦{" else text[0] + text[-1]
        listed = kind == "[]" and (len(parts) > 2 or parts[0][0] in "'\"")
        return read(parts[0]) if len(parts) == 1 else ("()" if listed else kind, parts)
    parts = tuple(filter(None, latex.cut(text, _LIST)))
    if len(parts) > 1 and not units.sums(text):
        return "all" if re.search(r"[<>]|\\[lg]e", text) and re.search(r"\band\b", text) else "list", parts
    for kind, pattern in (("approx", _APPROX), ("union", _UNION), ("region", _RELATION)):
        parts = latex.cut(text, pattern)
        if len(parts) > 1 and all(parts):
            if kind == "union" and all(part[0] == "⟦" and latex.enclosed(part) for part in parts):
                return "set", tuple(x for part in parts for x in latex.cut(part[1:-1], ","))
            if kind == "region":
                return ("eq", parts) if set(re.findall(pattern, text)) == {"="} else (kind, (text,))
            return kind, parts
    if clock := _CLOCK.fullmatch(text):
        return "clock", (clock[1], (clock[2] or "").lower())
    parts = tuple(re.split(r"\s*:\s*|(?<=\d) to (?=\d)", text))
    if len(parts) > 1 and all(parts):
        return "value" if len(parts) == 2 else "ratio", tuple(f"{part}/{parts[-1]}" for part in parts[:-1])
    return "value", (text,)


def named(text: str) -> tuple[str, str]:
    """The name and value of ``x = 2 + 3 = 5``; no name without one, no value if sides differ or are words."""
    kind, parts = read(text)
    if kind != "eq":
        return "", text
    name = next((part for part in (parts[0], parts[-1]) if _NAME.fullmatch(part)), "")
    *others, last = parts[1:] if name == parts[0] else parts[:-1] if name else parts
    agree = all(_same(part, last) for part in others) and not re.fullmatch(r"[A-Za-z\s]{2,}", last)
    return latex.key(name), last if agree else ""


def sides(text: str) -> tuple[str, ...]:
    """What an approximation may mean: either side, if the left one is exact and the right one rounds it."""
    kind, parts = read(text)
    if kind != "approx":
        return (text,)
    left, right = named(parts[0])[1], parts[-1]
    if len(parts) > 2 or number(right) is None:
        return ()
    places = len(_scalar(right)[0].partition(".")[2])
    near = places > 0 and "." not in left and same_values(left, right, 0.0, 0.5 / 10**places)
    return (right,) if _NAME.fullmatch(left) else (left, right) * near


def _collections(form_a: Form, form_t: Form, tolerance: float) -> bool:
    """Whether two lists, sets or tuples hold the same, in order or by name where that counts."""
    (kind_a, a), (kind_t, t) = form_a, form_t
    ordered = not {kind_a, kind_t} <= {"list", "set", "union"}
    if not len(a) == len(t) <= 30 or (ordered and kind_a != kind_t and {kind_a, kind_t} != {"list", "()"}):
        return False
    pairs_a, pairs_t = sorted(map(named, a)), sorted(map(named, t))
    names_a, names_t = ([name for name, _ in pairs] for pairs in (pairs_a, pairs_t))
    letters = [{name.partition("_")[0] for name in names} for names in (names_a, names_t)]
    if "" not in names_a + names_t:
        if names_a == names_t and len(set(names_t)) == len(t):
            ordered = True
        elif len(letters[0] | letters[1]) > 1:
            return False
        a, t = (tuple(value for _, value in pairs) for pairs in (pairs_a, pairs_t))
    rest, ordered = list(t), ordered or max(map(len, letters)) > 1
    for x in a:
        found = next((y for y in (rest[:1] if ordered else rest) if _same(x, y, tolerance)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _scalar(text: str) -> tuple[str, units.Unit, bool]:
    """A value, words for powers of ten read, its unit, and whether it is percent."""
    bare = _PERCENT.sub("", text)
    value, unit = units.split(bare)
    return _SCALE.sub(lambda m: f"*10^{{{_SCALES[m[1].lower()]}}}", value), unit, bare != text


@lru_cache(maxsize=8192)
def _fraction(text: str) -> Fraction | None:
    r"""The number that a text spells: ``3``, ``-0.5``, ``1/2``, ``1\frac{1}{2}``, ``2*10^{-3}``, ``2e-3``."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, top, bottom, n, d, power, e = match.groups()
    if float(d or bottom or 1) == 0 or (whole and not 0 < int(top) < int(bottom)):
        return None
    ratio = Fraction(int(top), int(bottom)) if top else Fraction(n) / Fraction(d or 1)
    return (-1 if sign else 1) * (int(whole or 0) + ratio * Fraction(10) ** int(power or e or 0))


def number(text: str) -> Fraction | None:
    """The real number that a value is, its unit and percent sign aside; None if it is none."""
    text = _scalar(text)[0]
    found = symbolic.value(text) if _fraction(text) is None else None
    return _fraction(text) if found is None or found.imag else Fraction(found.real)


def same_values(a: str, t: str, tolerance: float = 0.0, absolute: float = 0.0) -> bool:
    """Whether two single values, with percent signs and units, are equal."""
    if sums := [(x, t) for x in units.sums(a)] or [(a, y) for y in units.sums(t)]:
        return any(same_values(x, y, tolerance, absolute) for x, y in sums)
    (x, unit_a, percent_a), (y, unit_t, percent_t) = _scalar(a), _scalar(t)
    if unit_a and unit_t and unit_a != unit_t:
        return False
    if {unit_a, unit_t} == {units.DEGREE, ()} and r"\pi" in x + y:
        x, y = (f"{value}°" if unit else value for value, unit in ((x, unit_a), (y, unit_t)))
    if percent_t and not percent_a and _equal(x, _hundredth(y), tolerance, absolute):
        return True
    return _equal(_hundredth(x) if percent_a and not percent_t else x, y, tolerance, absolute)


def _hundredth(text: str) -> str:
    exact = _fraction(text)
    return f"({text})/100" if exact is None else str(exact / 100)


def _equal(a: str, t: str, tolerance: float, absolute: float) -> bool:
    """Whether two values without units are equal, or near enough."""
    x, y = _fraction(a), _fraction(t)
    if latex.key(a) == latex.key(t) or (x == y if x is not None and y is not None else symbolic.same(a, t)):
        return True
    x, y = number(a) if x is None else x, number(t) if y is None else y
    if x is None or y is None:
        return False
    near = max(Fraction(tolerance) * abs(y), Fraction(absolute))
    return 0 < abs(x - y) <= near or _rounds(a, x, t, y) or _rounds(t, y, a, x)


def _rounds(text: str, written: Fraction, other: str, exact: Fraction) -> bool:
    """Whether ``text`` is a decimal of six places and digits that rounds ``exact``, no decimal itself."""
    match = re.fullmatch(r"-?0*(\d*)\.(\d{6,})", text)
    if not match or len((match[1] + match[2]).lstrip("0")) < 6 or re.fullmatch(r"-?[\d.]+", other):
        return False
    return abs(written - exact) <= max(Fraction(1, 2 * 10 ** len(match[2])), abs(exact) / 10**14)
