"""Units of a number: which spellings are the same unit, and where the number ends."""

import re
from collections import Counter

# One unit's spellings between bars. Words that are not here, number words above all, are no units.
_SPELLINGS = """
nm nanometer|μm um micrometer|mm millimeter millimetre 毫米|m meter metre 米|cm centimeter centimetre 厘米
km kilometer kilometre 千米 公里|in inch inches|ft foot feet|mi mile|mph|s sec second 秒|ms|min minute 分 分钟
h hr hour 时 小时|day 天|week 周|month 月|year yr 年|mg|g gram 克|kg kilogram 千克 公斤|t ton 吨|lb pound
oz ounce|L l liter litre 升|mL ml milliliter 毫升|% percent percentage pct|° deg degree 度|°C celsius 摄氏度
°F fahrenheit|dB decibel|mol mole|N newton 牛 牛顿|kN|J joule 焦 焦耳|kJ|eV|W watt 瓦|kW 千瓦|kWh|V volt 伏|mV
kV|K kelvin|atm|A ampere amp 安|mA|μA|Ω ohm 欧 欧姆|kΩ|C coulomb|Pa pascal 帕|kPa|MPa|Hz hertz 赫兹|kHz|MHz
＄ dollar usd 美元|€ euro eur|£ gbp|¥ yuan rmb cny yen 元|₹ rupee rs|cent|unit 单位|个|people person 人|apple
student|child children|book|car|box boxes|ball|coin
"""
_CANONICAL = {x: group.split()[0] for group in re.split(r"[\n|]", _SPELLINGS) for x in group.split()}
_CANONICAL |= {f"{x}s": unit for x, unit in _CANONICAL.items() if len(x) > 1 and x.isascii() and x.islower()}
_REWRITTEN = (
    (r"\bdegrees?\s+(?=[CF]\b|[cC]els|[fF]ahr)|°\s+(?=[CF]\b)", "°"), (r"°(?=[cC]els|[fF]ahr)|[{}]", ""),
    (r"\s*\bsquared\b", "^2"), (r"\s*\bcubed\b", "^3"), (r"平方|\bsq(?:uare|\.|\b)", " square "),
    (r"立方|\bcu(?:bic|\.|\b)", " cubic "), (r"每|\bper\b(?! cent)", "/"), (r"\bk(?:mp?|p)h\b", "km/h"),
)  # fmt: skip
_FACTOR = r"\s*(?:(square|cubic)\s+)?([^\W\d_]+|°[CF]|[%°＄€£¥₹])(?:\s*\^\s*(-?\d)|([23])(?!\d))?"
# A value without letters but those of commands, what is between, and what may be a unit.
_QUANTITY = re.compile(
    r"((?:\\(?:[A-Za-z]+(?![A-Za-z])|[^A-Za-z])|[^A-Za-zμΩ%°＄€£¥₹\u4e00-\u9fff\\])*(?:[\d})\]]|\\pi))"
    r"([\s\[(]*)([^\W\d_].{,59}|[%°＄€£¥₹].{,59})"
)


def canonical(text: str) -> str:
    """``"cm^2"``, ``"square centimeters"`` -> ``"cm^2"``, ``"km/h"`` -> ``"h^-1 km"``; empty if none."""
    for pattern, to in _REWRITTEN:
        text = re.sub(pattern, to, text)
    parts = zip((1, -1), text.partition("/")[::2], strict=True)
    factors = [(sign, *factor) for sign, part in parts for factor in re.findall(_FACTOR, part)]
    names = [_CANONICAL.get(x) or _CANONICAL.get(x.lower() * (len(x) > 1), "") for _, _, x, _, _ in factors]
    if "" in names or re.sub(_FACTOR, "", text).strip(" /*.()-"):
        return ""
    powers: Counter[str] = Counter()
    for name, (sign, times, _, power, digit) in zip(names, factors, strict=True):
        powers[name] += sign * int(power or digit or {"square": 2, "cubic": 3}.get(times, 1))
    return " ".join(f"{name}^{power}".removesuffix("^1") for name, power in sorted(powers.items()) if power)


def split(text: str) -> tuple[str, str]:
    """``"12 cm^2"`` -> ``("12", "cm^2")``; no unit -> ``(text, "")``."""
    if not (match := _QUANTITY.fullmatch(text)):
        return text, ""
    value, gap, tail = match.groups()
    variable = not gap and len(tail) == 1 and tail.isascii() and tail not in "%AVWNJ"  # 5m, but 0.5A
    argument = re.search(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])", value)
    unit = canonical(tail.strip("[]() "))
    return (value, unit) if unit and not variable and not (argument and unit == "°") else (text, "")
