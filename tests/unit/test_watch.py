"""The collapse watch on series made by hand: what it sees, when it speaks, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mssr.config import WatchConfig
from mssr.errors import UserError
from mssr.runs.config import load_config
from mssr.trainer.watch import CollapseWatch

pytestmark = pytest.mark.unit
DIGITS = Path(__file__).parents[2] / "configs/digits/mssr.yaml"
HEALTHY = {
    "policy/entropy": 0.4,
    "reward/accuracy": 0.5,
    "rollout/response_length": 100.0,
    "rollout/truncated_fraction": 0.02,
}
FLAGS = ("watch/entropy_collapsed", "watch/accuracy_dropped", "watch/length_exploded")


def run(watch: CollapseWatch, key: str, values: Sequence[float | None], start: int = 1, **also: Any):
    """Flags and warnings of every step."""
    flags, warnings = [], []
    for step, value in enumerate(values, start):
        warnings += watch.observe(step, {**HEALTHY, key: value, **also})
        flags.append(tuple(int(watch.metrics()[flag]) for flag in FLAGS))
    return flags, warnings


def test_entropy_below_the_floor_warns_once_an_episode() -> None:
    watch = CollapseWatch(WatchConfig(patience=3))
    flags, warnings = run(watch, "policy/entropy", [0.4, 0.005, 0.005, 0.4, *[0.005] * 6])
    assert [f[0] for f in flags] == [0] * 6 + [1] * 4  # the dip of two steps does not count
    assert len(warnings) == 1 and warnings[0].startswith("step 7: ")
    assert "0.005" in warnings[0] and "watch.entropy_floor=0.01" in warnings[0] and watch.collapsed
    flags, warnings = run(watch, "policy/entropy", [0.4, 0.4, 0.005, 0.4, 0.4, 0.4], start=11)
    assert [f[0] for f in flags] == [1, 1, 1, 1, 1, 0] and not warnings and not watch.collapsed
    _, warnings = run(watch, "policy/entropy", [0.005] * 3, start=17)
    assert len(warnings) == 1 and "step 19" in warnings[0]


def test_accuracy_that_falls_from_its_best_is_seen_and_noise_is_not() -> None:
    watch = CollapseWatch(WatchConfig())
    noisy = [0.3, 0.7, 0.2, 0.6, 0.1, 0.8] * 10
    assert run(watch, "reward/accuracy", noisy)[1] == []
    flags, warnings = run(watch, "reward/accuracy", [0.05] * 30, start=61)
    assert len(warnings) == 1 and "watch.accuracy_drop=0.5" in warnings[0]
    assert flags[0][1] == 0 and flags[-1] == (0, 1, 0)
    # Half of 0.45 is crossed after about six of the ten steps, and patience is five.
    assert 8 <= [f[1] for f in flags].index(1) <= 12


def test_a_slow_start_is_no_drop() -> None:
    rise = [0.0, 0.015, *[0.0] * 40]  # best mean 0.0015: a single right answer
    assert run(CollapseWatch(WatchConfig()), "reward/accuracy", rise)[1] == []
    assert run(CollapseWatch(WatchConfig()), "reward/accuracy", [0.01 * k for k in range(60)])[1] == []


def test_longer_responses_count_when_they_are_cut() -> None:
    growing = [100.0] * 10 + [500.0] * 10
    assert run(CollapseWatch(WatchConfig()), "rollout/response_length", growing)[1] == []
    watch = CollapseWatch(WatchConfig())
    run(watch, "rollout/response_length", growing[:10])
    cut = {"rollout/truncated_fraction": 0.3}
    flags, warnings = run(watch, "rollout/response_length", growing[10:], start=11, **cut)
    assert [f[2] for f in flags] == [0] * 4 + [1] * 6
    assert len(warnings) == 1 and "500 tokens" in warnings[0] and "30% of them are cut" in warnings[0]


def test_cut_responses_count_where_the_limit_leaves_no_room_to_grow() -> None:
    watch = CollapseWatch(WatchConfig())
    run(watch, "rollout/truncated_fraction", [0.1] * 10)
    length = {"rollout/response_length": 180.0}
    assert not run(watch, "rollout/truncated_fraction", [0.5] * 10, 11, **length)[1]
    assert run(watch, "rollout/truncated_fraction", [0.7] * 10, 21, **length)[1]


@pytest.mark.parametrize(
    ("option", "key", "bad"),
    [
        ("entropy_floor", "policy/entropy", 0.001),
        ("accuracy_drop", "reward/accuracy", 0.0),
        ("length_growth", "rollout/truncated_fraction", 1.0),
    ],
)
def test_null_switches_a_sign_off_and_the_threshold_counts(option: str, key: str, bad: float) -> None:
    series = [HEALTHY[key]] * 15 + [bad] * 30
    assert len(run(CollapseWatch(WatchConfig()), key, series)[1]) == 1
    off = CollapseWatch(WatchConfig(**{option: None}))
    assert run(off, key, series)[1] == [] and not off.collapsed
    patient = CollapseWatch(WatchConfig(patience=40))
    assert run(patient, key, series)[1] == []
    laxer = {"entropy_floor": 0.0005, "accuracy_drop": 0.99, "length_growth": 4.0}
    mild = {"entropy_floor": 0.001, "accuracy_drop": 0.02, "length_growth": 0.3}[option]
    lax = CollapseWatch(WatchConfig(**{option: laxer[option]}))
    assert run(lax, key, [HEALTHY[key]] * 15 + [mild] * 30)[1] == []


def test_what_is_missing_or_not_finite_says_nothing() -> None:
    watch = CollapseWatch(WatchConfig(patience=2))
    gaps = [0.001, None, float("nan"), 0.001]
    _, warnings = run(watch, "policy/entropy", gaps)
    assert len(warnings) == 1 and "step 4" in warnings[0]
    assert watch.observe(5, {}) == [] and watch.collapsed


def test_it_goes_on_where_it_stopped() -> None:
    series = [0.5] * 12 + [0.01] * 40
    straight = CollapseWatch(WatchConfig())
    expected = run(straight, "reward/accuracy", series)
    for stop in (3, 11, 18, 30):
        first = CollapseWatch(WatchConfig())
        before = run(first, "reward/accuracy", series[:stop])
        second = CollapseWatch(WatchConfig())
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = run(second, "reward/accuracy", series[stop:], start=stop + 1)
        assert (before[0] + after[0], before[1] + after[1]) == expected
        assert second.state_dict() == straight.state_dict()
    with pytest.raises(ValueError, match="version 9"):
        straight.load_state_dict({"version": 9})


def test_a_sign_switched_off_on_resume_does_not_stay_on() -> None:
    watch = CollapseWatch(WatchConfig(patience=1))
    run(watch, "policy/entropy", [0.001])
    resumed = CollapseWatch(WatchConfig(entropy_floor=None))
    resumed.load_state_dict(watch.state_dict())
    assert watch.collapsed and not resumed.collapsed


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("watch.entropy_floor=0", "watch.entropy_floor=0.0 must be greater than 0"),
        ("watch.accuracy_drop=1", "watch.accuracy_drop=1.0 must lie in"),
        ("watch.accuracy_drop=0", "watch.accuracy_drop=0.0 must lie in"),
        ("watch.length_growth=1", "watch.length_growth=1.0 must be greater than 1"),
        ("watch.patience=0", "watch.patience=0 must be greater than 0"),
    ],
)
def test_ranges(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(DIGITS, [override])


def test_options_that_nothing_reads() -> None:
    off = [f"watch.{k}=null" for k in ("entropy_floor", "accuracy_drop", "length_growth")]
    assert load_config(DIGITS, [*off[1:], "trainer.stop_on_collapse=true", "watch.patience=7"])
    with pytest.raises(UserError, match=r"trainer\.stop_on_collapse=true.*watch\.entropy_floor"):
        load_config(DIGITS, [*off, "trainer.stop_on_collapse=true"])
    with pytest.raises(UserError, match=r"watch\.patience=7 is read by nothing"):
        load_config(DIGITS, [*off, "watch.patience=7"])
