"""The verdict on a run, by value: which sign says what, and what is not told from too little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mssr.runs.verdict import above, judge

pytestmark = pytest.mark.unit


def run(accuracy: list[float], validation: dict[int, float] | None = None, **others: list[Any]) -> Any:
    records: list[dict[str, Any]] = [{"step": 0, "val/accuracy": (validation or {}).get(0)}]
    for k, value in enumerate(accuracy):
        record = {"step": k + 1, "reward/accuracy": value, "reward/score": value}
        record |= {key.replace("__", "/"): values[k] for key, values in others.items()}
        if validation and k + 1 in validation:
            record["val/accuracy"] = validation[k + 1]
        records.append(record)
    return judge(records)


def noisy(first: float, last: float, steps: int) -> list[float]:
    """A line with a scatter of 0.02 around it."""
    return [v + 0.02 * (-1) ** k for k, v in enumerate(np.linspace(first, last, steps).tolist())]


@pytest.mark.parametrize(
    ("accuracy", "name", "says"),
    [
        (noisy(0.2, 0.6, 9), "not enough steps", "9 steps have a training accuracy, and 10 are needed"),
        (noisy(0.2, 0.6, 40), "learning", "0.554 in the last 10 steps, up from 0.349 in those up to step 20"),
        (noisy(0.2, 0.6, 12), "learning", "in the last 6 steps"),
        (noisy(0.3, 0.3, 40), "stalled", "no better than the 0.300 of the first 10"),
        (
            noisy(0.2, 0.6, 20) + noisy(0.5, 0.5, 40),
            "stalled",
            "up from 0.295 at first, but not since",
        ),
        (noisy(0.2, 0.6, 40) + noisy(0.4, 0.4, 20), "stalled", "down from 0.554 at step 40"),
        (noisy(0.2, 0.97, 20) + [0.97] * 20, "learned", "0.970 in the last 10 steps"),
        # Scores that are no share of right answers: only their own scatter says what is much.
        ([v - 1 for v in noisy(0.0, 0.4, 40)], "learning", "-0.646 in the last 10 steps"),
        ([100 * v for v in noisy(0.5, 0.5, 40)], "stalled", "no better"),
    ],
)
def test_by_training_accuracy(accuracy: list[float], name: str, says: str) -> None:
    verdict = run(accuracy)
    assert verdict.name == name
    assert says in verdict.sign


def test_a_rise_within_the_scatter_is_none() -> None:
    rng = np.random.default_rng(0)
    names = [run((0.5 + 0.05 * rng.standard_normal(60)).tolist()).name for _ in range(200)]
    # Two standard errors on one side: about one in forty.
    assert names.count("learning") <= 12 and set(names) <= {"learning", "stalled"}
    assert above(np.array([0.5, 0.6]), np.array([0.1, 0.2]), 0.3)
    assert not above(np.array([0.5, 0.6]), np.array([0.1, 0.2]), 0.5)


def test_a_sign_of_the_watch_in_the_last_step_comes_first() -> None:
    flags = [0.0] * 30 + [1.0] * 10
    verdict = run(noisy(0.2, 0.6, 40), watch__entropy_collapsed=flags, watch__length_exploded=flags)
    assert verdict.name == "collapsed"
    assert verdict.sign.endswith("step 40: entropy collapsed, responses grew until they were cut.")
    assert run(noisy(0.2, 0.6, 40), watch__entropy_collapsed=flags[::-1]).name == "learning"
    assert run([0.5], watch__accuracy_dropped=[1.0]).name == "collapsed"  # few steps are enough for this


def test_a_score_that_rises_while_accuracy_falls() -> None:
    accuracy = noisy(0.2, 0.6, 20) + noisy(0.6, 0.3, 20)
    hacked = run(accuracy, reward__score=noisy(0.2, 1.6, 40))
    assert hacked.name == "reward hacked"
    assert "reward/accuracy fell from" in hacked.sign and "reward/score rose" in hacked.sign
    assert run(accuracy, reward__score=accuracy).name == "stalled"
    assert run(accuracy, reward__score=[None] * 40).name == "stalled"


def test_validation_that_falls_while_training_rises() -> None:
    accuracy = noisy(0.2, 0.8, 40)
    hacked = run(accuracy, {0: 0.2, 10: 0.48, 20: 0.5, 30: 0.46, 35: 0.42, 40: 0.4})
    assert hacked.name == "reward hacked"
    assert hacked.sign.startswith("Since step 20 validation fell from 0.500 to 0.400 while training accuracy")
    # One validation below the best is chance, and so is a best one that stands alone, or a fall by less.
    assert run(accuracy, {0: 0.2, 20: 0.4, 30: 0.5, 40: 0.3}).name == "learning"
    assert run(accuracy, {0: 0.4, 10: 0.4, 20: 0.5, 30: 0.4, 40: 0.4}).name == "learning"
    assert run(accuracy, {0: 0.2, 10: 0.48, 20: 0.5, 30: 0.46, 40: 0.44}).name == "learning"
    # Best before the first step.
    assert run(accuracy, {0: 0.5, 20: 0.3, 30: 0.3, 40: 0.3}).name == "reward hacked"
    # Both fall: that is no hacking.
    assert run(noisy(0.8, 0.2, 40), {0: 0.2, 10: 0.48, 20: 0.5, 30: 0.3, 40: 0.3}).name == "stalled"


def test_noise_is_seldom_taken_for_hacking() -> None:
    rng, rising = np.random.default_rng(0), noisy(0.2, 0.8, 120)
    parts, flat = [], []
    for _ in range(100):
        accuracy, score = 0.5 + 0.05 * rng.standard_normal((2, 120))
        parts.append(run(accuracy.tolist(), reward__score=score.tolist()).name)
        validation = 0.5 + 0.03 * rng.standard_normal(13)
        flat.append(run(rising, {10 * k: float(v) for k, v in enumerate(validation)}).name)
    # Training that rises by 0.6 while validation stays where it was is half of that sign.
    assert parts.count("reward hacked") <= 1 and flat.count("reward hacked") <= 10
