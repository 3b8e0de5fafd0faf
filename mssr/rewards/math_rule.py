r"""Whether two answers are the same mathematics: a thin layer of forms over math-verify.

Texts that are equal after `latex.clean` are equal. Else both are brought to a form (a value, a list, an interval,
an equation, words), parts are compared, plain numbers exactly, and the rest goes to math-verify (`symbolic`). What is
not understood is not equal. The rules:

- **Percent** is a hundredth. If the truth has the sign and the answer has not, the answer may mean either.
- **Units** are compared if both have one, by name (``1 m`` is not ``100 cm``), and ignored if only one has. Words
  that are no known unit are not ignored: ``5 trillion`` and ``5 below zero`` are not 5.
- **A name before =** is ignored if only one has it (``x = 3`` equals 3), else both must have the same one.
- **Lists and sets** are equal in any order, with different names (``x=1, y=2``) by name; **points, intervals, ratios**
  are ordered and keep their brackets. Several values never equal one.
- **An approximation** is an exact side and a decimal that rounds it: ``\sqrt2 \approx 1.41`` is either, ``5 \approx 6``
  none. **A decimal** of six places and digits equals a number that no decimal is and that it rounds.
- **Words** are equal up to case; after a yes or no a reason may follow. A time of day (``9:45``) is no ratio.
- **Choices**: a truth that is an option letter goes to `choice`; before an option's text may stand its letter.
"""

import re
from fractions import Fraction
from functools import lru_cache

from mssr.rewards import choice, latex, symbolic, units

_SYNONYMS = (
    (r"nosolution nosolutions norealsolution norealsolutions thereisnosolution \emptyset ⟦⟧ none", "empty"),
    (r"ℝ allrealnumbers allreals (-\infty,\infty) (-\infty,+\infty)", "reals"), ("dne doesnotexist", "undefined"),
)  # fmt: skip
_WORDS = {word: to for words, to in _SYNONYMS for word in words.split()}
_REASON = re.compile(r"\W*(\w+)(?:[,.;:!]|\s*[-–—]|(?=\s+(?:because|since|as)\b))\s(.*)$")
_HEDGE = re.compile(r"\b(?:or|maybe|perhaps|possibly|probably|either|unless|not sure|yes|no|true|false)\b")
_ABOUT = re.compile(
    r"^(?:\\(?:approx|simeq|sim)(?![a-z])|~|(?:about|approximately|approx|roughly|around|circa)(?![a-z])\.?|"
    r"[a-z]\s*\\in(?![a-z]))\s*", re.I
)  # fmt: skip
_APPROX, _UNION, _RELATION = r"\\(?:approx|simeq)(?![a-z])", r"\\cup(?![a-z])", r"\\[lg]e(?![a-z])|[<>=]"
_LIST = r"[,;]\s*(?:(?:and|or)(?![A-Za-z]))?|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])"
_THOUSANDS = re.compile(r"(?<![\d.,_^])\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?![\d,]| \d)")
_BUILDER = re.compile(r"⟦\s*[A-Za-z]\s*(?:\\in\s*ℝ\s*)?[|:](.*)⟧")
_NAME = re.compile(
    r"\|?[A-Za-z]{1,3}'?\|?(?:_(?:\w|\{[^{}]{1,20}\}))?(?:\([A-Za-z, ]{1,10}\))?|(?:m\s*)?\\(?:angle|triangle)\s*\w{1,3}|"
    r"\\(?:alpha|beta|gamma|theta|lambda|omega|phi|mu|rho)(?:_\w)?|(?:the )?(?:area|perimeter|volume|length|width|height|"
    r"radius|angle|slope|probability|sum|total|distance|speed|answer)", re.I
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
    """Whether the answer is the same as the truth, see the module.

    Args:
        answer: The final answer.
        truth: The ground truth.
        tolerance: Largest distance of two numbers relative to the truth's.
    """
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
    return text if re.search(r"[(\[{⟦]", text) else _THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text)


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
    if re.match("[A-Z]", t) and all(re.fullmatch(r"[A-Z][\w{}+-]*", key) for key in (key_a, key_t)):
        return re.sub("[_{}]", "", key_a) == re.sub("[_{}]", "", key_t)  # CO_2
    forms = (kind_a, parts_a), (kind_t, parts_t) = read(a), read(t)
    kinds = {kind_a, kind_t}
    if "approx" in kinds:
        return any(_same(x, y, tolerance) for x in _sides(a) for y in _sides(t))
    if "eq" in kinds:
        (name_a, value_a), (name_t, value_t) = _named(a), _named(t)
        if kind_a == kind_t and not name_a == name_t != "":
            return len(parts_a) == len(parts_t) == 2 and symbolic.same(a, t)
        return (kind_a == "eq" or name_t != "") and _same(value_a, value_t, tolerance)
    if kinds == {"value"}:
        return same_values(parts_a[0], parts_t[0], tolerance)
    if "region" in kinds:
        return symbolic.same_set(
            *(parts[0] if kind == "region" else x for (kind, parts), x in zip(forms, (a, t), strict=True))
        )
    if (kind_a, kind_t) == ("list", "value") and re.fullmatch(r"-?\d+,\d+", a) and "." in t:
        return _same(a.replace(",", "."), t, tolerance)  # 3,14
    return forms[0] == forms[1] if kinds & {"value", "clock"} else _collections(*forms, tolerance)


Form = tuple[str, tuple[str, ...]]
"""A kind (value, list, set, union, eq, region, approx, ratio, clock, brackets such as ``[)``) and its parts."""


@lru_cache(maxsize=8192)
def read(text: str) -> Form:
    """The form of a canonical text."""
    text = re.sub(r"^(?:negative|minus)\s+(?=[\d.\\])", "-", text.lstrip(" +"), flags=re.I)
    if builder := _BUILDER.fullmatch(text):
        return read(builder[1].strip())
    if 1 <= len(re.findall(r"\\[pm][pm](?![a-z])", text)) <= 2:
        signs = [
            re.sub(r"\\([pm])[pm]", lambda m, up=up: "+-"[(m[1] == "p") != up], text) for up in (True, False)
        ]
        return "list", tuple(signs)
    if text[:1] in ("'", '"') and text[0] == text[-1]:
        return "value", (text[1:-1],)
    if latex.enclosed(text) and (parts := tuple(filter(None, latex.cut(text[1:-1], "[,;]")))):
        kind = "set" if text[0] in "⟦{" else text[0] + text[-1]
        listed = kind == "[]" and (len(parts) > 2 or parts[0][0] in "'\"")
        return read(parts[0]) if len(parts) == 1 else ("()" if listed else kind, parts)
    parts = tuple(filter(None, latex.cut(text, _LIST)))
    if len(parts) > 1 and not units.sums(text):
        return "list", parts
    for kind, pattern in (("approx", _APPROX), ("union", _UNION), ("eq", _RELATION)):
        parts = latex.cut(text, pattern)
        if len(parts) > 1 and all(parts):
            if kind == "union" and all(part[0] == "⟦" and latex.enclosed(part) for part in parts):
                return "set", tuple(x for part in parts for x in latex.cut(part[1:-1], ","))
            return (
                (kind, parts)
                if kind != "eq" or set(re.findall(pattern, text)) == {"="}
                else ("region", (text,))
            )
    if clock := _CLOCK.fullmatch(text):
        return "clock", (clock[1], (clock[2] or "").lower())
    parts = tuple(re.split(r"\s*:\s*|(?<=\d) to (?=\d)", text))
    if len(parts) > 1 and all(parts):
        return "value" if len(parts) == 2 else "ratio", tuple(f"{part}/{parts[-1]}" for part in parts[:-1])
    return "value", (text,)


def _named(text: str) -> tuple[str, str]:
    """The name and value of ``x = 2 + 3 = 5``; no name without one, no value if the sides differ or are words."""
    kind, sides = read(text)
    if kind != "eq":
        return "", text
    name = next((side for side in (sides[0], sides[-1]) if _NAME.fullmatch(side)), "")
    *others, last = sides[1:] if name == sides[0] else sides[:-1] if name else sides
    agree = all(_same(side, last) for side in others) and not re.fullmatch(r"[A-Za-z\s]{2,}", last)
    return latex.key(name), last if agree else ""


def _sides(text: str) -> tuple[str, ...]:
    """What an approximation may mean: either side, if the left one is exact and the right one rounds it."""
    kind, sides = read(text)
    if kind != "approx":
        return (text,)
    left, right = _named(sides[0])[1], sides[-1]
    exact, rounded = number(left), number(right)
    if len(sides) > 2 or rounded is None or _NAME.fullmatch(left):
        return (right,) if len(sides) == 2 and rounded is not None else ()
    (exactly, unit, _), (decimal, unit_right, _) = _scalar(left), _scalar(right)
    plain = re.fullmatch(r"-?\d*\.\d+", exactly) or not re.fullmatch(r"-?\d*\.?\d+", decimal)
    if exact is None or plain or unit not in ((), unit_right):
        return ()
    return (
        (left, right) if abs(exact - rounded) <= Fraction(1, 2 * 10 ** len(decimal.partition(".")[2])) else ()
    )


def _collections(form_a: Form, form_t: Form, tolerance: float) -> bool:
    """Whether two lists, sets or tuples hold the same, in order or by name where that counts."""
    (kind_a, a), (kind_t, t) = form_a, form_t
    ordered = {kind_a, kind_t} not in ({"list"}, {"set"}, {"list", "set"}, {"union"}, {"list", "union"})
    if not len(a) == len(t) <= 30 or (ordered and kind_a != kind_t and {kind_a, kind_t} != {"list", "()"}):
        return False
    named = [[_named(part) for part in parts] for parts in (a, t)]
    letters = [{name.partition("_")[0] for name, _ in pairs} for pairs in named]
    if "" not in letters[0] | letters[1]:
        names = [sorted(name for name, _ in pairs) for pairs in named]
        if names[0] == names[1] and len(set(names[0])) == len(a):
            named, ordered = [sorted(pairs) for pairs in named], True
        elif len(letters[0] | letters[1]) > 1:
            return False
        a, t = (tuple(value for _, value in pairs) for pairs in named)
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
    found = symbolic.number(text) if _fraction(text) is None else None
    return _fraction(text) if found is None else Fraction(found)


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
    """Whether ``text`` is a decimal of six places and digits that rounds ``exact``, which no decimal is."""
    places = len(text.partition(".")[2])
    if not re.fullmatch(r"-?\d*\.\d{6,}", text) or len(text.replace(".", "").lstrip("-0")) < 6:
        return False
    if _fraction(other) is not None and 10**400 % exact.denominator == 0:
        return False
    return abs(written - exact) <= max(Fraction(1, 2 * 10**places), abs(exact) / 10**14)


def stated(text: str) -> str | None:
    r"""The one value that a canonical text states, ``x \approx 12.1 cm`` -> ``12.1 cm``; None if it is none."""
    kind, parts = read(text)
    if kind == "approx":
        return next(iter(_sides(text)[::-1]), None)
    value = _named(text)[1] if kind == "eq" else ""
    return stated(value) if value else parts[0] if kind == "value" else None


def same_number(answer: str, truth: str, *, tolerance: float, absolute: float) -> bool:
    """Whether both are one real number and as close as `number.grade` says."""
    if max(len(answer), len(truth)) > latex.MAX_LENGTH:
        return False
    a, t = stated(told(choice.unannounced(answer))), stated(told(truth))
    numbers = a is not None and t is not None and None not in (number(a), number(t))
    return numbers and same_values(a, t, tolerance, absolute)
