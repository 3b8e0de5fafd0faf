"""Units behind a number: which spellings are the same unit, and where the number ends."""

from __future__ import annotations

import re
from functools import lru_cache

_SPELLINGS = """
nm nanometer nanometre | μm um micrometer micrometre micron | mm millimeter millimetre
cm centimeter centimetre | dm decimeter decimetre | m meter metre | km kilometer kilometre
in inch inches | ft foot feet | yd yard | mi mile | acre | ha hectare | ly lightyear
ms millisecond | s sec second | min minute | h hr hour | day | week wk | month | year yr
mg milligram | g gram gm | kg kilogram kilo | t ton tonne | lb lbs pound | oz ounce
ml mL milliliter millilitre | cl cL centiliter | dl dL | l L liter litre | gal gallon
° deg degree | rad radian | °C celsius | °F fahrenheit | K kelvin
N newton | kN kilonewton | J joule | kJ kilojoule | cal calorie | kcal | eV
W watt | kW kilowatt | MW megawatt | kWh | V volt | mV | kV | mA milliampere | ampere amp
Ω ohm | kΩ | Pa pascal | kPa | MPa | atm | Hz hertz | kHz | MHz | mol mole | C coulomb | T tesla
＄ dollar usd | cent | € euro eur | £ gbp | ¥ yuan rmb yen | ₹ rupee rs | unit
"""
_CANONICAL: dict[str, str] = {}
for _line in _SPELLINGS.strip().splitlines():
    for _group in _line.split("|"):
        _names = _group.split()
        for _name in _names:
            _CANONICAL[_name] = _names[0]
            if len(_name) > 3 and not _name.endswith("s"):
                _CANONICAL[_name + "s"] = _names[0]
_PREFIXES = "＄€£¥₹"
_COMPOUND = {"mph": "mi/h", "kmph": "km/h", "kph": "km/h", "mps": "m/s"}
# Words after a number that are no unit: they change the number, or join two answers.
_NO_UNIT = frozenset(
    "and or to thousand million billion hundred dozen percent percentage pct pi times squared cubed plus "
    "minus over if with for when where is are at from by in sqrt sin cos tan log ln exp not than more less "
    "only half mod".split()
)
_TOKEN = re.compile(
    r"\s*(?:([A-Za-zμΩ°＄€£¥₹]+|°[CF])(?:\^\{?(-?\d)\}?|(\d)(?!\d))?|([/·*.-])|\\cdot\b|[()])"
)
_START = re.compile(r"°|[⟪A-Za-zμΩ＄€£¥₹]")
_WORD = re.compile(r"[A-Za-z]{3,20}(?: [A-Za-z]{3,20})?")
_ANGLE_FUNCTION = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")

Unit = tuple[tuple[str, int], ...]
_DEGREE: Unit = (("°", 1),)


@lru_cache(maxsize=4096)
def canonical(text: str) -> Unit | None:
    """``"cm^2"``, ``"square centimeters"`` -> ``(("cm", 2),)``; None if the text is no unit."""
    if len(text) > 60:
        return None
    text = (
        text.replace("degrees C", "°C").replace("degrees F", "°F").replace("° C", "°C").replace("° F", "°F")
    )
    powers: dict[str, int] = {}
    sign, pending, position = 1, 1, 0
    last: str | None = None
    text = text.replace("⟪", " ").replace("⟫", "").replace("sq.", "sq").replace("cu.", "cu").strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        word, exponent, separator = match[1], match[2] or match[3], match[4]
        if separator:
            if separator == "/":
                sign = -1
            elif separator == "." and text[position:].strip():
                return None
            continue
        if not word:
            continue
        lower = word.lower()
        if lower == "per":
            sign = -1
        elif lower in ("square", "sq"):
            pending = 2
        elif lower in ("cubic", "cu"):
            pending = 3
        elif lower in ("squared", "cubed"):
            if last is None:
                return None
            powers[last] *= 2 if lower == "squared" else 3
        elif lower in _COMPOUND:
            top, _, bottom = _COMPOUND[lower].partition("/")
            powers[top], powers[bottom] = powers.get(top, 0) + 1, powers.get(bottom, 0) - 1
        else:
            name = _CANONICAL.get(word) or (_CANONICAL.get(lower) if len(word) > 1 else None)
            if name is None:
                return None
            powers[name] = powers.get(name, 0) + sign * int(exponent or 1) * pending
            last, sign, pending = name, 1 if sign == 1 else sign, 1
    return tuple(sorted((name, power) for name, power in powers.items() if power)) or None


def split(text: str, *, glued: bool = False) -> tuple[str, Unit | None]:
    """A value and its unit: ``"12 cm^2"`` -> ``("12", (("cm", 2),))``; no unit -> ``(text, None)``.

    A single letter that follows the value without a space may be a variable and is a unit only if
    ``glued``. One or two unknown words after a number (``"12 apples"``) are a unit of that name.
    """
    text = text.strip()
    if text[:1] in _PREFIXES and text[1:2].isdigit():
        rest, unit = split(text[1:], glued=glued)
        if unit in (None, ((_CANONICAL[text[0]], 1),)):
            return rest, ((_CANONICAL[text[0]], 1),)
    for start in list(_START.finditer(text))[:40]:
        i = start.start()
        if i == 0 or text[i - 1].isalpha() or text[i - 1] in "\\_⟪" or len(text) - i > 60:
            continue
        value, tail = text[:i].strip(), text[i:].strip()
        spaced = text[i - 1].isspace() or text[i] == "⟪" or not text[i].isascii()
        if not value or value[-1] in "+-*/^=<>({[,|" or value.endswith(("\\", "\\le", "\\ge", "\\cdot")):
            continue
        if len(tail) == 1 and not spaced and not glued:
            continue
        unit = canonical(tail)
        if unit == _DEGREE and _ANGLE_FUNCTION.search(value):
            continue  # of the sine's argument
        if unit is not None:
            return value, unit
        words = tail.replace("⟪", " ").replace("⟫", " ").strip(" .")
        if spaced and value[-1].isdigit() and _WORD.fullmatch(words):
            parts = words.lower().split()
            if not _NO_UNIT.intersection(parts):
                return value, ((" ".join(part.removesuffix("s") for part in parts), 1),)
    return text, None
