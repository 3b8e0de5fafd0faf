r"""Wrong answers made from right ones, by the ways in which a policy could try to be right by accident."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from fractions import Fraction

NUMBERS = r"2 7 12 45 144 1000 36.5 0.25 3.14 -8 \frac{3}{4} \frac{22}{7} 1/6".split()
WITH_UNITS = [
    "12 cm",
    r"9.8\text{ m/s}^2",
    "60 km/h",
    "5 kg",
    r"15\text{ cm}^2",
    "20 N",
    "3 hours",
    "$25",
    "8 V",
]
PERCENT = ["25%", r"40\%"]
EXPRESSIONS = (
    r"2\sqrt{3} 6\pi \frac{\sqrt{2}}{2} \frac{3\pi}{4} x^2+2x+1 2x+3 \frac{x}{2} 3ab 1+\sqrt{5}".split()
)
EQUATIONS = ["x=3", "y=2x+1", "x>3", r"1<x\le 4", "x^2+y^2=4"]
LISTS = ["1, 2", "3, 5, 8", r"\{1, 2\}", "x=1, x=4", r"\pm 2"]
ORDERED = ["(2, 3)", "[2, 5)", "(-1, 4]", "(1, 2, 3)", "3:4", "2:3:5"]
WORDS = ["yes", "no", "true", "false", "parallel", "no solution", "9:45", "isosceles triangle"]
CHOICES = ["A", "B", "C", "D", "BD"]
TRUTHS = [*NUMBERS, *WITH_UNITS, *PERCENT, *EXPRESSIONS, *EQUATIONS, *LISTS, *ORDERED, *WORDS, *CHOICES]

JOINED = [
    "{t} or {x}", "{x} or {t}", r"{t} \text{{ or }} {x}", "either {t} or {x}", "{t} (or {x})",
    "{t} (or {x}?)", "{t} / {x}0 / {x}", r"{x} \approx {t}", r"{t} \approx {x}", r"{t} \sim {x}",
    r"{x}\sim {t}", r"{t} \simeq {x}", "{x} = {t}", "{t} = {x}", "{x}, {t}, {x}1", "{t}; {x}", "{t} | {x}",
    r"{t} \to {x}", r"{t} \Rightarrow {x}", r"{t} \vee {x}", "{t} vs {x}", "{t} and {x}", r"\{{{t}, {x}\}}",
    "({t}, {x}, {t})", "[{x}, {t}]", "between {x} and {t}", "from {x} to {t}", "{x}-{t}-{x}", "{x}..{t}",
    r"{x} \ldots {t}", r"{t} \quad {x}", r"{t}\\{x}", "{t} {x}", "{t}\n{x}",
    r"{t} \text{{ not }} {x} \text{{ or so}}", "not {x} but {t} or {x}", "{x}? {t}?", "{t}? {x}!",
    r"\boxed{{{t}}} or \boxed{{{x}}}", r"{t} \text{{ and }} {x}", "{t} unless {x}", "if {x} then {t}",
    "{t} maybe {x}", "{t}, maybe {x}", r"\begin{{pmatrix}}{t}\\{x}\end{{pmatrix}}",
    r"\begin{{cases}}{t}\\{x}\end{{cases}}", "first {t} then {x}", "{t} 或 {x}", "{t}或{x}",
]  # fmt: skip
HEDGED = [
    "maybe {t}", "perhaps {t}", "probably {t}", "possibly {t}", "not {t}", "{t} maybe", "{t} or so",
    "{t} or not", "not sure, {t}", "I guess {t}", "less than {t}", "more than {t}", "at least {t}",
    "at most {t}", "up to {t}", "nearly {t}", "almost {t}", "over {t}", "under {t}", r"< {t}", r"> {t}",
    r"\le {t}", r"\ge {t}", r"\ne {t}", r"{t} \pm 1", "{t}±0.5", "{t}+", "anything but {t}", "?{t}?",
    "{t} something", "{t} etc",
]  # fmt: skip
SCALED = (
    r"trillion billion million thousand hundred dozen lakh crore halves thirds quarters fifths sixths tenths "
    r"hundredths score gross pairs mod x k M bn percent % below above squared cubed minus plus times less "
    r"short ! ^2 ^3 ^{-1} \cdot10 e1 e-1 /2 *2 +1 -1 /10 \frac{1}{2}"
).split()
UNITS = r"m mm km cm^2 cm^3 g s min m/s J W Pa kg K \text{ft} \mathrm{in} A °C €".split()
YES_NO = [
    "yes and no", "yes or no", "Yes/No", "no/yes", "yes, no", "No, yes", "yes no", "no or yes", "yes; no",
    "Yes. No.", "yes (or no)", "yes = no", r"\text{yes} \text{ no}", r"yes \approx no", "true or false",
    "True/False", "false, true", "true and false", "maybe", "neither", "both", "yes?no", "not yes",
    "not no", "not true", "yes, or maybe no", "no, but maybe yes", "true, i.e. false", "no-yes", "y/n",
]  # fmt: skip


def number_of(text: str) -> Fraction | None:
    """The plain number that a truth is, sign and fraction included."""
    match = re.fullmatch(r"(-?)(?:\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+)|(\d+(?:\.\d+)?))", text)
    if match is None:
        return None
    top, bottom = match[2] or match[4] or match[6], match[3] or match[5] or "1"
    return (-1 if match[1] else 1) * Fraction(top) / Fraction(bottom)


def other(truth: str, rng: random.Random) -> str:
    """An answer of the same kind that is not the truth: a digit, a letter or a word changed."""
    while True:
        if truth in CHOICES:
            text = rng.choice([c for c in "ABCDEF" if c not in truth])
        elif re.search(r"\d", truth):
            places = [m.start() for m in re.finditer(r"\d", truth)]
            i = rng.choice(places)
            digit = rng.choice("123456789".replace(truth[i], ""))
            text = rng.choice(
                [
                    truth[:i] + digit + truth[i + 1 :],
                    truth[:i] + digit + truth[i:],
                    truth[: i + 1] + digit + truth[i + 1 :],
                ]
            )
        elif truth in ("yes", "no", "true", "false"):
            text = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[truth]
        else:
            text = (
                rng.choice(["perpendicular", "equilateral triangle", "0", "x", "never"])
                if truth in WORDS
                else truth + "+1"
            )
        if text != truth and _differs(text, truth):
            return text


def _differs(text: str, truth: str) -> bool:
    """Whether a changed digit changed the value: 2:3 and 22:33 are one ratio, (-1, 4] is never [..)."""
    ratio = [re.fullmatch(r"[\d:]+", s) and s.split(":") for s in (text, truth)]
    if all(ratio) and len(ratio[0]) == len(ratio[1]) > 1:  # type: ignore[arg-type]
        first, second = ([Fraction(p) for p in parts] for parts in ratio)  # type: ignore[union-attr]
        return 0 not in first and [p / first[0] for p in first] != [p / second[0] for p in second]
    a, t = number_of(text), number_of(truth)
    return a is None or t is None or a != t


def wrong_answers(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """``count`` triples (kind, truth, wrong answer)."""
    rng = random.Random(seed)
    kinds = (
        ["joined"] * 5
        + ["hedged"] * 3
        + ["scaled"] * 3
        + ["changed"] * 3
        + ["units", "sign", "yes/no", "brackets", "extra", "boxes"]
    )
    while count:
        kind, truth = rng.choice(kinds), rng.choice(TRUTHS)
        answer = made(kind, truth, rng)
        if answer is not None:
            count -= 1
            yield kind, truth, answer


def made(kind: str, truth: str, rng: random.Random) -> str | None:
    """One wrong answer of a kind; None if the kind does not fit the truth."""
    if kind == "joined":
        template = rng.choice(JOINED)
        return None if "->" in template else template.format(t=truth, x=other(truth, rng))
    if kind == "hedged":
        template = rng.choice(HEDGED)
        relation = any(c in truth for c in "<>=\\") and template[0] in "<>\\"
        return None if relation or (truth == r"\pm 2") else template.format(t=truth)
    if kind == "scaled":
        value, word = number_of(truth), rng.choice(SCALED)
        if value is None or value in (0, 1) or (word == "\\frac{1}{2}" and value.denominator == 1):
            return None
        return truth + rng.choice([" ", "", r"\text{ }"]) + word
    if kind == "changed":
        return other(truth, rng)
    if kind == "units":
        return None if truth not in WITH_UNITS else swapped_unit(truth, rng)
    if kind == "sign":
        if truth in [*NUMBERS, *WITH_UNITS, *EXPRESSIONS[:4], *PERCENT]:
            return (
                rng.choice(["-{}", "negative {}", "minus {}", "-({})"]).format(truth)
                if truth[0] != "-"
                else truth[1:]
            )
        return None
    if kind == "yes/no":
        return rng.choice(YES_NO) if truth in ("yes", "no", "true", "false") else None
    if kind == "brackets":
        return rebracketed(truth, rng)
    if kind == "extra":
        return f"{truth}, {rng.randrange(10, 99)}" if truth in [*LISTS[:2], *NUMBERS] else None
    return rf"\boxed{{{truth}}}, \boxed{{{other(truth, rng)}}}"


def swapped_unit(truth: str, rng: random.Random) -> str:
    value = re.sub(r"(?:\s|\\text).*|\^\\circ|\$", "", truth)
    own = re.sub(r"[^A-Za-z/]", "", truth.replace("text", "").replace("circ", ""))
    unit = rng.choice(
        [u for u in UNITS if re.sub(r"[^A-Za-z/]", "", u.replace("text", "").replace("mathrm", "")) != own]
    )
    return f"{value} {unit}"


def rebracketed(truth: str, rng: random.Random) -> str | None:
    if truth not in ORDERED[:4]:
        return None
    inner = truth[1:-1]
    opening, closing = rng.choice("[({"), rng.choice("])}")
    parts = inner.split(", ")
    if rng.random() < 0.5:
        parts = parts[::-1]
    answer = f"{opening}{', '.join(parts)}{closing}"
    brackets = (truth[0] + truth[-1], opening + closing)
    if parts == inner.split(", ") and (
        brackets[0] == brackets[1] or (len(parts) == 3 and brackets[1] in ("[]", "()"))
    ):
        return None
    return answer


if __name__ == "__main__":
    from mssr.rewards.rules import RULES

    triples = list(wrong_answers(20_000, seed=7))
    counted = [triple for triple in triples if RULES["math"](triple[2], triple[1])]
    print(f"{len(triples)} wrong answers, {len(set(triples))} different; counted as right: {counted}")
