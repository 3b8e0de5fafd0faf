"""How a run goes, in a word, and the sign that says so.

A window is `WINDOW` steps, or half of a shorter run. Two means of windows differ if their distance is above
two standard errors, with the steps' own scatter, and above a least distance. In this order:

    collapsed         a sign of the collapse watch holds in the last step
    not enough steps  fewer than `FEWEST` have a training accuracy
    reward hacked     of accuracies from 0 to 1: since the best window accuracy fell while the score rose; or
                      training accuracy rose since the best validation, and the last two, of at least two
                      since, are below it and those beside it
    learned           training accuracy, of 0 to 1, is at least `SOLVED` in the last window
    learning          it is above that of the window at half of the run
    stalled           else

Reward hacking of the second kind cannot be told from memorising the data by curves: the sentence says both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW, FEWEST = 10, 10
LEAST = 0.05
"""Of accuracies from 0 to 1, what makes a fall or a difference to validation worth a word."""
LEAST_RISE = 0.01
SOLVED = 0.95

WATCHED: Mapping[str, str] = {
    "watch/entropy_collapsed": "entropy collapsed",
    "watch/accuracy_dropped": "train accuracy dropped",
    "watch/length_exploded": "responses grew until they were cut",
}
"""Flag in metrics.jsonl (0 or 1) -> what it says."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Example: ``Verdict("stalled", "training accuracy is 0.31 ...")``"""

    name: str
    sign: str
    """A sentence."""


def judge(records: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict on the records of metrics.jsonl."""
    flags = [what for flag, what in WATCHED.items() if records and records[-1].get(flag)]
    if flags:
        sign = f"The collapse watch says of step {records[-1]['step']}: {', '.join(flags)}."
        return Verdict("collapsed", sign)
    steps = [r for r in records if _known(r, "reward/accuracy")]
    if len(steps) < FEWEST:
        needed = f"{len(steps)} steps have a training accuracy, and {FEWEST} are needed to tell."
        return Verdict("not enough steps", needed)
    accuracy = _values(steps, "reward/accuracy")
    # Of scores that are no share of right answers only the scatter says what is much.
    share = bool(accuracy.min() >= 0 and accuracy.max() <= 1)
    if share and (hacked := _score_instead(steps, accuracy) or _training_instead(records, steps)):
        return Verdict("reward hacked", hacked)
    size, half = window(steps), len(steps) // 2
    first, middle, last = accuracy[:size], accuracy[half - size : half], accuracy[-size:]
    now = f"training accuracy is {last.mean():.3f} in the last {size} steps"
    if share and last.mean() >= SOLVED:
        return Verdict("learned", f"The {now}: there is little left to learn from these prompts.")
    if above(last, middle, LEAST_RISE * share):
        before = f"{middle.mean():.3f} in those up to step {steps[half - 1]['step']}"
        return Verdict("learning", f"The {now}, up from {before}.")
    end, best = _best(accuracy, size)
    if above(best, last, LEAST * share):
        since = f"down from {best.mean():.3f} at step {steps[end - 1]['step']}"
    elif above(last, first, LEAST_RISE * share):
        since = f"up from {first.mean():.3f} at first, but not since step {steps[half - 1]['step']}"
    else:
        since = f"no better than the {first.mean():.3f} of the first {size}"
    return Verdict("stalled", f"The {now}, {since}.")


def window(steps: Sequence[Any]) -> int:
    """Steps of a mean: half of a short run."""
    return min(WINDOW, len(steps) // 2)


def above(one: np.ndarray, other: np.ndarray, least: float = 0.0) -> bool:
    """Whether the mean of the first values is above that of the others by more than chance and ``least``."""
    error = math.sqrt(one.var(ddof=1) / len(one) + other.var(ddof=1) / len(other))
    return bool(one.mean() - other.mean() > max(2 * error, least))


def _score_instead(steps: Sequence[Mapping[str, Any]], accuracy: np.ndarray) -> str:
    score, size = _values(steps, "reward/score"), window(steps)
    end, best = _best(accuracy, size)
    last = accuracy[-size:]
    if not (above(best, last, LEAST) and above(score[-size:], score[end - size : end])):
        return ""
    return (
        f"Since step {steps[end - 1]['step']} reward/accuracy fell from {best.mean():.3f} to "
        f"{last.mean():.3f} while reward/score rose: the policy serves another part of the reward."
    )


def _training_instead(records: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]]) -> str:
    validations = [(r["step"], r["val/accuracy"]) for r in records if _known(r, "val/accuracy")]
    values = np.array([value for _, value in validations])
    best = int(values.argmax()) if len(values) else 0
    # One validation may be the best by chance, so those beside it count too.
    if len(values) - best < 3 or values[max(best - 1, 0) : best + 2].mean() - values[-2:].mean() < LEAST:
        return ""
    step = validations[best][0]
    until = [r for r in steps if r["step"] <= step][-WINDOW:]
    before = _values(until if len(until) > 1 else steps[: window(steps)], "reward/accuracy")
    now = _values(steps[-window(steps) :], "reward/accuracy")
    if not above(now, before, LEAST):
        return ""
    return (
        f"Since step {step} validation fell from {values[best]:.3f} to {values[-1]:.3f} while training "
        f"accuracy rose from {before.mean():.3f} to {now.mean():.3f}: the reward is hacked, or the data "
        "memorised. Read samples that the reward calls right."
    )


def _best(values: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    """The window of the largest mean: its end, and the values."""
    end = int(np.convolve(values, np.ones(size), "valid").argmax()) + size
    return end, values[end - size : end]


def _known(record: Mapping[str, Any], key: str) -> bool:
    return record.get(key) is not None and math.isfinite(record[key])


def _values(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([r[key] if _known(r, key) else math.nan for r in records], np.float64)
