"""Time of the reward rules over a batch of ordinary answers, as a Markdown table.

    python scripts/bench/rewards.py --out scripts/bench/results/rewards.md

An answer is drawn from templates (integers, decimals, fractions, roots, units, percent, choices, points,
sets, equations, polynomials) with fresh numbers in every repetition, so that no cache helps; about one in two
is right, in another spelling. Times are of the CPU of one process that has imported the rules.
"""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections.abc import Callable

from report import arguments, publish, table

from mssr.rewards.rules import RULES, score

COLUMNS = ("rule", "answers", "CPU seconds", "ms an answer", "slowest, ms", "right")
THINKING = "The triangle has the sides 3, 4 and 5, so it is a right triangle. " * 30
Item = tuple[str, str]


def answer_pair(rng: random.Random) -> Item:
    """A truth and an answer: the same value in another spelling, or with another number."""
    n, m, k = rng.randrange(2, 500), rng.randrange(2, 60), rng.randrange(1, 9)
    wrong = n + rng.choice([0, 0, 1, 7])
    return rng.choice(
        [
            (str(n), str(wrong)),
            (str(n), f"{wrong}.0"),
            (f"{n / 10}", rf"\frac{{{wrong}}}{{10}}"),
            (rf"\frac{{{n}}}{{{m}}}", f"{wrong}/{m}"),
            (rf"\frac{{{n}}}{{{m}}}", rf"\dfrac{{{2 * wrong}}}{{{2 * m}}}"),
            (f"{n}\\text{{ cm}}", f"{wrong} cm"),
            (str(n), rf"{wrong}\text{{ cm}}^2"),
            (rf"{n}^\circ", f"{wrong}°"),
            (f"{n}%", rf"{wrong}\%"),
            (f"{n}000", f"{wrong},000"),
            ("ABCD"[n % 4], f"({'ABCD'[wrong % 4]})"),
            ("ABCD"[n % 4], f"{'ABCD'[wrong % 4]}. {m} cm"),
            (rf"{m}\sqrt{{{k}}}", rf"\sqrt{{{m * m * k + wrong - n}}}"),
            (rf"{n}\pi", rf"\pi \cdot {wrong}"),
            (f"({n}, {m})", rf"\left({wrong}, \frac{{{2 * m}}}{{2}}\right)"),
            (rf"\{{{n}, {m}\}}", rf"\{{{m}, {wrong}\}}"),
            (f"x={n}", str(wrong)),
            (f"y={m}x+{n}", f"y={wrong}+{m}x"),
            (f"x^2+{n + m}x+{n * m}", f"(x+{wrong})(x+{m})"),
            (f"[{m}, {n + m})", rf"{m} \le x < {wrong + m}"),
            ("yes" if n % 2 else "no", r"\text{Yes}" if wrong % 2 else r"\text{No}"),
        ]
    )


def batch(size: int, seed: int) -> list[Item]:
    rng = random.Random(seed)
    pairs = [answer_pair(rng) for _ in range(size)]
    return [(f"<think>{THINKING}</think>So it is $\\boxed{{{answer}}}$.", truth) for truth, answer in pairs]


def by_math_verify(response: str, truth: str) -> float:
    """What the field uses: math-verify on the whole response, its time limits off."""
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{truth}}}", parsing_timeout=None)
    return float(verify(gold, parse(response, parsing_timeout=None), timeout_seconds=None))


def scorer(rule: str) -> Callable[[str, str], float]:
    if rule == "math-verify alone":
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        return by_math_verify
    return lambda response, truth: score(rule, response, truth).score


def run(rule: str, items: list[Item]) -> tuple[float, float, float]:
    """CPU seconds of all and of the slowest, the sum of the scores."""
    grade, slowest, total = scorer(rule), 0.0, 0.0
    started = time.process_time()
    for response, truth in items:
        before = time.process_time()
        total += grade(response, truth)
        slowest = max(slowest, time.process_time() - before)
    return time.process_time() - started, slowest, total


def measure(rule: str, size: int, repeats: int) -> list[str]:
    run(rule, batch(64, seed=999))  # imports
    single, slowest, right = [], [], []
    for repeat in range(repeats):
        seconds, longest, total = run(rule, batch(size, seed=repeat))
        single.append(seconds)
        slowest.append(longest)
        right.append(total / size)
    seconds = statistics.median(single)
    return [
        rule,
        str(size),
        f"{seconds:.2f}",
        f"{1000 * seconds / size:.2f}",
        f"{1000 * statistics.median(slowest):.0f}",
        f"{statistics.median(right):.1%}",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=2_048, help="answers in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="batches; the table has the medians")
    parser.add_argument("--rules", nargs="+", default=[*RULES, "math-verify alone"])
    args = parser.parse_args()
    publish(args, lambda: table(COLUMNS, [measure(rule, args.size, args.repeats) for rule in args.rules]))


if __name__ == "__main__":
    main()
