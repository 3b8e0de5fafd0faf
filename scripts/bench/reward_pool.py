"""How much scoring delays a step: 2,048 responses that come over 30 s of generation, as a Markdown table.

    python scripts/bench/reward_pool.py --out scripts/bench/results/reward_pool.md

Of some answers the truth has another form, so that math-verify has to decide. The delay is the time from the
arrival of the last response until all scores are there.
"""

from __future__ import annotations

import statistics
import time

from report import arguments, publish, table

from mssr.config.data import RewardConfig
from mssr.rewards import RewardInput, Scorer, ScoringStream

COUNT = 2048
THINKING = "<think>" + "so we get that x equals y and so on. " * 200 + "</think>"
EASY = ["{k}", r"\frac{{3}}{{{k}}}", "{k}x^2+2x+1", r"\sqrt{{{k}}}/2", "(1,{k})", r"{k}^\circ", r"{k}\pi"]
HARD = [
    (r"\frac{{x^2-{s}}}{{x-{k}}}", "x+{k}"),
    ("(x+{k})(x-1)", "x^2+{m}x-{k}"),
    (r"\sqrt{{{s}+0}}+\frac{{{k}}}{{2}}", r"\frac{{{t}}}{{2}}"),
]


def items(hard_share: float) -> list[RewardInput]:
    """Right answers, so many of them in another form than the truth."""
    result = []
    for i in range(COUNT):
        numbers = {"k": (k := i + 2), "s": k * k, "m": k - 1, "t": 3 * k}
        hard = int((i + 1) * hard_share) > int(i * hard_share)
        answer, truth = HARD[i % len(HARD)] if hard else (EASY[i % len(EASY)],) * 2
        text = f"{THINKING}\\boxed{{{answer.format(**numbers)}}}"
        result.append(RewardInput(text, truth.format(**numbers), 1500))
    return result


def delay(scorer: Scorer, batch: list[RewardInput], seconds: float) -> float:
    start = time.perf_counter()
    with ScoringStream(scorer) as stream:
        for i, item in enumerate(batch):
            time.sleep(max(0.0, start + (i + 1) * seconds / COUNT - time.perf_counter()))
            stream.add(i, item)
        last = time.perf_counter()
        scored = stream.result()
        passed = time.perf_counter() - last
    wrong = COUNT - int(scored.scores.sum())
    assert not scored.errors and not wrong, f"{wrong} are not right, {scored.errors} failed"
    return passed


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="of generation")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    def measure() -> list[str]:
        rows = []
        for share in (0.0, 1 / 3, 1.0):
            delays = []
            for _ in range(args.repeats):
                # New processes: what they have decided before they remember.
                with Scorer(RewardConfig(name="math", workers=args.workers), 2048) as scorer:
                    scorer.score(items(0.0)[:8])
                    delays.append(delay(scorer, items(share), args.seconds))
            median, worst = statistics.median(delays), max(delays)
            rows.append((f"{share:.0%}", f"{args.seconds:g}", f"{median:.2f}", f"{worst:.2f}"))
        columns = "answers that math-verify decides", "generation, s", "delay, s (median)", "(longest)"
        return [
            f"{COUNT} responses, {args.repeats} runs, {args.workers} workers",
            "",
            *table(columns, rows),
        ]

    publish(args, measure)


if __name__ == "__main__":
    main()
