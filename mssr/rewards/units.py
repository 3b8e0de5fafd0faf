"""Units of a number: which spellings are the same unit, and where the number ends."""

import re
from collections import Counter
from functools import lru_cache

Unit = tuple[tuple[str, int], ...]
DEGREE: Unit = (("°", 1),)
# One unit's spellings between bars. Words that are not here, number words above all, are no units.
_SPELLINGS = """
nm nanometer nanometre|μm um micrometer micrometre micron 微米|mm millimeter millimetre 毫米|m meter metre 米
px pixel|个|cm centimeter centimetre 厘米|dm decimeter 分米|km kilometer kilometre 千米 公里|in inch inches
ft foot feet|mi mile|acre|yd yard|ha hectare|s sec second 秒|ms millisecond|min minute 分 分钟
h hr hour 时 小时|day 天|week 周|month 月|year yr 年|mg milligram|g gram gm 克|kg kilogram kilo 千克 公斤
t ton tonne 吨|lb pound|oz ounce|gal gallon|L l liter litre 升|bar|mL ml milliliter 毫升|° deg degree 度
rad radian|°C celsius 摄氏度|°F fahrenheit|K kelvin|dB decibel|mol mole 摩尔|atm|N newton 牛 牛顿|kN
J joule 焦 焦耳|kJ|cal calorie|kcal|eV|keV|MeV|GeV|W watt 瓦|kW kilowatt 千瓦|mW|MW|kWh|V volt 伏|mV|kV
A ampere amp 安 安培|mA|μA|Ω ohm 欧 欧姆|kΩ|MΩ|F farad|H henry|Wb weber|T tesla|C coulomb|Pa pascal 帕|kPa|MPa
Hz hertz 赫兹|kHz|MHz|GHz|＄ dollar usd us＄ 美元|€ euro eur|£ gbp|¥ yuan rmb cny yen 元|₹ rupee rs|cent
unit 单位|people person 人|apple|student|child children|book|car|box boxes|ball|coin|mi/h mph
km/h kmph kmh kph|m/s mps
"""
_CANONICAL = {x: group.split()[0] for group in re.split(r"[\n|]", _SPELLINGS) for x in group.split()}
_CANONICAL |= {f"{x}s": unit for x, unit in _CANONICAL.items() if len(x) > 1 and x.isascii() and x.islower()}
_REWRITTEN = (
    (r"\bdegrees?\s+(?=[CF]\b|[cC]els|[fF]ahr)|°\s+(?=[CF]\b)", "°"), (r"°(?=[cC]els|[fF]ahr)|[{}]", ""),
    (r"\s*\bsquared\b", "^2"), (r"\s*\bcubed\b", "^3"), (r"平方|\bsq(?:uare|\.|\b)", " square "),
    (r"立方|\bcu(?:bic|\.|\b)", " cubic "), (r"每|\bper\b", "/"),
)  # fmt: skip
_FACTOR = re.compile(
    r"\s*(?:(square|cubic)\s+)?(us＄|[^\W\d_]+|°[CF]|[°＄€£¥₹])(?:\s*\^\s*(-?\d)|([23])(?!\d))?"
)
_START = re.compile(r"(?<![A-Za-z\\_^])[A-Za-z]|[μΩ°＄€£¥₹\[(\u4e00-\u9fff]")
_MONEY = re.compile(r"^([-+]?)\s*((?:us|US)?＄|[€£¥₹]|USD|EUR|GBP|RMB|CNY|Rs\.?)\s*([-+]?)(?=[\d.])")
_SUM = re.compile(r"(\d+)\s*([^\W\d]+)\.?,?\s*(?:and\s+)?(\d+)\s*([^\W\d]+)\.?$")
_SIZES: dict[Unit, int] = {(("h", 1), ("min", 1)): 60, (("min", 1), ("s", 1)): 60, (("ft", 1), ("in", 1)): 12}


@lru_cache(maxsize=4096)
def canonical(text: str) -> Unit:
    """``"cm^2"``, ``"square centimeters"`` -> ``(("cm", 2),)``; empty if the text is no unit."""
    for pattern, to in _REWRITTEN:
        text = re.sub(pattern, to, text)
    powers: Counter[str] = Counter()
    for sign, part in zip((1, -1), text.partition("/")[::2], strict=True):
        if _FACTOR.sub("", part).strip(" /*.()-"):
            return ()
        for times, word, power, digit in _FACTOR.findall(part):
            name = _CANONICAL.get(word) or _CANONICAL.get(word.lower() * (len(word) > 1))
            if name is None:
                return ()
            for i, unit in enumerate(name.split("/")):
                power = int(power or digit or {"square": 2, "cubic": 3}.get(times, 1))
                powers[unit] += -sign * power if i else sign * power
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def split(text: str) -> tuple[str, Unit]:
    """``"12 cm^2"`` -> ``("12", (("cm", 2),))``; no unit -> ``(text, ())``.

    A letter glued to the value may be a variable; only capitals such as in ``0.5A`` are units there.
    """
    if money := _MONEY.match(text):
        rest, unit = split(money[1] + money[3] + text[money.end() :])
        return (rest, canonical(money[2])) if unit in ((), canonical(money[2])) else (text, ())
    for match in list(_START.finditer(text))[:40]:
        value, tail = text[: match.start()], text[match.start() :].strip()
        if tail[0] in "[(" and tail[-1] in ")]":
            tail = tail[1:-1]
        unit = canonical(tail) if len(tail) < 60 and re.search(r"(?:[\d})\]]|\\pi)\s*$", value) else ()
        glued = len(tail) == 1 and tail.isascii() and not value[-1:].isspace() and tail not in "AVWNJ"
        argument = unit == DEGREE and re.search(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])", value)
        if unit and not glued and not argument and not re.search(r"(?<![\\A-Za-z])[A-Za-z]", value):
            return value.strip(), unit
    return text, ()


def sums(text: str) -> tuple[str, ...]:
    """``2 h 30 min`` in each of its units, ``("150/60 h", "150 min")``; nothing of another text."""
    match = _SUM.match(text)
    size = match and _SIZES.get(canonical(match[2]) + canonical(match[4]))
    if not match or not size:
        return ()
    total = int(match[1]) * size + int(match[3])
    return f"{total}/{size} {match[2]}", f"{total} {match[4]}"
