"""Units of a number: which spellings are the same unit, and where the number ends."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

# One unit's spellings between bars. Words that are not here, number words above all, are no units.
_SPELLINGS = """
nm nanometer nanometre 纳米 | μm um micrometer micrometre micron 微米 | mm millimeter millimetre 毫米 | 个
cm centimeter centimetre 厘米 公分 | dm decimeter decimetre 分米 | m meter metre 米 | km kilometer kilometre 千米 公里
in inch inches 英寸 | ft foot feet 英尺 | yd yard | mi mile 英里 | acre | ha hectare 公顷 | ly lightyear | px pixel
ms millisecond 毫秒 | s sec second 秒 | min minute 分 分钟 | h hr hour 时 小时 | day 天 | week 周 | month | year yr 年
mg milligram 毫克 | g gram gm 克 | kg kilogram kilo 千克 公斤 | t ton tonne 吨 | lb pound | oz ounce | people person 人
mL ml milliliter millilitre 毫升 | cL cl centiliter | dL dl | L l liter litre 升 | gal gallon | bar | mol mole 摩尔
° deg degree 度 | rad radian | °C celsius 摄氏度 ℃ | °F fahrenheit 华氏度 | K kelvin | dB decibel | Wb weber | T tesla
N newton 牛 牛顿 | kN kilonewton | J joule 焦 焦耳 | kJ kilojoule | cal calorie | kcal | eV | keV | MeV | GeV | H henry
W watt 瓦 | kW kilowatt 千瓦 | mW milliwatt | MW megawatt | kWh | V volt 伏 伏特 | mV millivolt | kV kilovolt | F farad
A ampere amp 安 安培 | mA milliampere | μA | Ω ohm 欧 欧姆 | kΩ | MΩ | Pa pascal 帕 | kPa | MPa | atm | C coulomb
Hz hertz 赫兹 | kHz | MHz | GHz | ＄ dollar usd us＄ 美元 | cent | € euro eur | £ gbp | ¥ yuan rmb cny yen 元 | ₹ rupee rs
unit 单位 | apple | student | child children | book | car | box boxes | ball | coin | item | cube | tile | marble
"""
_CANONICAL: dict[str, str] = {}
for _group in _SPELLINGS.replace("\n", "|").split("|"):
    for _name in _group.split():
        _CANONICAL[_name] = _group.split()[0]
        if len(_name) > 1 and _name.isascii() and _name.islower() and not _name.endswith("s"):
            _CANONICAL[_name + "s"] = _group.split()[0]
_COMPOUND = {"mph": "mi/h", "kmph": "km/h", "kmh": "km/h", "kph": "km/h", "mps": "m/s"}
_REWRITTEN = (
    (r"\bdegrees?\s+(?=[CF]|celsius|fahrenheit)|°\s+(?=[CF]\b)", "°"), (r"°(?=celsius|fahrenheit)", ""),
    (r"平方|\bsq(?:\.|uare\b|\b)", " square "), (r"立方|\bcu(?:\.|bic\b|\b)", " cubic "), (r"每|\bper\b", "/"),
    (r"\s*\bsquared\b", "^2"), (r"\s*\bcubed\b", "^3"), (r"[{}]", ""),
)  # fmt: skip
_TOKEN = re.compile(
    r"\s*(?:(square|cubic)\b|(us＄|[^\W\d_]+|°[CF]|[°＄€£¥₹℃])(?:\s*\^\s*(-?\d)|([23])(?!\d))?|([/*.()-]))"
)
_START = re.compile(r"[A-Za-zμΩ°＄€£¥₹℃\[(]|[\u4e00-\u9fff]")
_PREFIX = re.compile(r"^([-+]?)\s*((?:us|US)?＄|[€£¥₹]|USD|EUR|GBP|RMB|CNY|INR|Rs\.?)\s*([-+]?)(?=[\d.])")
_GLUED = "AVWNJΩ"
_COMPONENT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+\.?|[\u4e00-\u9fff]+)\s*(?:,|and\b)?\s*")
_SIZES = {
    "s": ("s", 1), "min": ("s", 60), "h": ("s", 3600), "day": ("s", 86400), "in": ("in", 1), "ft": ("in", 12),
    "m": ("cm", 100), "cm": ("cm", 1), "kg": ("g", 1000), "g": ("g", 1), "lb": ("oz", 16), "oz": ("oz", 1),
}  # fmt: skip

Unit = tuple[tuple[str, int], ...]
DEGREE: Unit = (("°", 1),)


@lru_cache(maxsize=4096)
def canonical(text: str) -> Unit | None:
    """``"cm^2"``, ``"square centimeters"`` -> ``(("cm", 2),)``; None if the text is no unit."""
    for pattern, to in _REWRITTEN:
        text = re.sub(pattern, to, text)
    powers: dict[str, int] = {}
    sign, pending, position, text = 1, 1, 0, text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        if match[1]:
            pending = 2 if match[1] == "square" else 3
        elif match[5]:
            sign = -1 if match[5] == "/" else sign
        else:
            word = match[2]
            known = _COMPOUND.get(word.lower()) or _CANONICAL.get(word)
            known = known or (_CANONICAL.get(word.lower()) if len(word) > 1 else None)
            if known is None:
                return None
            for i, name in enumerate(known.split("/") if known != "/" else [known]):
                power = (-sign if i else sign) * int(match[3] or match[4] or 1) * pending
                powers[name] = powers.get(name, 0) + power
            pending = 1
    return tuple(sorted((name, power) for name, power in powers.items() if power)) or None


def split(text: str) -> tuple[str, Unit | None]:
    """A value and its unit: ``"12 cm^2"`` -> ``("12", (("cm", 2),))``; no unit -> ``(text, None)``.

    A single letter glued to the value may be a variable; only capitals of electricity and mechanics
    (``0.5A``) are units there. ``2 h 30 min`` is ``("9000", (("s", 1),))``.
    """
    text = text.strip()
    prefix = _PREFIX.match(text)
    if prefix:
        rest, unit = split(prefix[1] + prefix[3] + text[prefix.end() :])
        money = canonical(prefix[2].rstrip("."))
        return (rest, money) if unit in (None, money) else (text, None)
    for match in list(_START.finditer(text))[:40]:
        i = match.start()
        value, tail = text[:i].strip(), text[i:].strip()
        if not value or len(tail) > 60 or text[i - 1].isalpha() and text[i - 1].isascii() and text[i].isascii():
            continue
        if text[i - 1] in "\\_^" or not re.search(r"[\d}\])]$|\\pi$|^\\\w", value):
            continue
        if tail[0] in "[(":
            tail = tail[1:-1] if tail[-1] == {"[": "]", "(": ")"}[tail[0]] else "?"
        elif len(tail) == 1 and tail.isalpha() and tail.isascii() and not text[i - 1].isspace() and tail not in _GLUED:
            continue
        unit = canonical(tail)
        if unit == DEGREE and re.search(r"\\?(?:sin|cos|tan|cot|sec|csc)\b", value):
            continue  # of the argument
        if unit is not None:
            return value, unit
    return compound(text) or (text, None)


def compound(text: str) -> tuple[str, Unit] | None:
    """``"2 h 30 min"`` in the smallest unit of its kind, ``("9000", (("s", 1),))``; None for another text."""
    total, kinds, last, position = Fraction(0), set(), None, 0
    while position < len(text):
        match = _COMPONENT.match(text, position)
        unit = canonical(match[2].rstrip(".")) if match else None
        if match is None or unit is None or len(unit) != 1 or unit[0][0] not in _SIZES:
            return None
        kind, size = _SIZES[unit[0][0]]
        if last is not None and size >= last:
            return None
        kinds.add(kind)
        total, last, position = total + Fraction(match[1]) * size, size, match.end()
    if len(kinds) != 1 or last is None:
        return None
    return f"{total.numerator}/{total.denominator}", ((kinds.pop(), 1),)
