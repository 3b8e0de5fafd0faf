"""The Beta baseline: closed forms, repeated visits, errors, exact resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mssr.algorithms import BetaBaseline
from mssr.runs.checkpoint import read_state, write_state

pytestmark = pytest.mark.unit


class Reference:
    """The definition, one visit after the other, in a dict."""

    def __init__(self, strength: float, mean: float | None) -> None:
        self.strength, self.prior_mean = strength, mean
        self.counts: dict[str, tuple[float, float]] = {}
        self.rewards: list[float] = []

    @property
    def unseen(self) -> float:
        if self.prior_mean is not None:
            return self.prior_mean
        return sum(self.rewards) / len(self.rewards) if self.rewards else 0.5

    def values(self, ids: list[str]) -> list[float]:
        pairs = [self.counts.get(i) for i in ids]
        return [self.unseen if p is None else p[0] / (p[0] + p[1]) for p in pairs]

    def update(self, ids: list[str], rewards: Any, etas: Any) -> None:
        prior = self.strength * self.unseen, self.strength * (1 - self.unseen)
        for key, reward, eta in zip(ids, rewards, etas, strict=True):
            a, b = self.counts.get(key, prior)
            self.counts[key] = eta * a + reward, eta * b + (1 - reward)
        self.rewards += list(rewards)


def visits(rng: np.random.Generator, prompts: int, count: int) -> tuple[list[str], Any]:
    return [f"p{i}" for i in rng.integers(0, prompts, count)], rng.random(count)


# --- BetaBaseline --------------------------------------------------------------------------------


def test_baseline_follows_the_beta_update() -> None:
    baseline = BetaBaseline(prior_strength=2.0, prior_mean=0.25)  # a, b = 0.5, 1.5
    assert baseline.values(["x"]) == pytest.approx([0.25])
    baseline.update(["x"], [1.0], eta=0.9)  # a = .45 + 1, b = 1.35
    assert baseline.values(["x"]) == pytest.approx([1.45 / 2.8])
    baseline.update(["x"], [0.25], eta=0.5)  # a = .725 + .25, b = .675 + .75
    assert baseline.values(["x"]) == pytest.approx([0.975 / 2.4])
    assert baseline.values(["x"]).dtype == np.float32


def test_baseline_forgets_faster_with_a_smaller_eta() -> None:
    values = []
    for eta in (0.5, 0.9, 1.0):
        baseline = BetaBaseline()
        for reward in (1.0, 1.0, 1.0, 0.0):
            baseline.update(["x"], [reward], eta)
        values.append(float(baseline.values(["x"])[0]))
    assert values[0] < values[1] < values[2]


def test_evidence_tends_to_its_closed_form() -> None:
    baseline = BetaBaseline()
    for _ in range(400):
        baseline.update(["x"], [1.0], eta=0.875)
    assert baseline.state_dict()["counts"][0].sum() == pytest.approx(8.0)


def test_unseen_prompts_start_at_the_running_mean() -> None:
    baseline = BetaBaseline(prior_strength=1.0)
    assert baseline.values(["new"]) == pytest.approx([0.5])
    # Both start at .5 although the first reward is known when the second is processed.
    baseline.update(["x", "y"], [1.0, 1.0], eta=1.0)
    assert baseline.values(["x", "y"]) == pytest.approx([0.75, 0.75])
    baseline.update(["z", "x"], [0.0, 1.0], eta=1.0)  # z starts at the mean 1: a, b = 1, 0 + 1
    assert baseline.values(["z"]) == pytest.approx([0.5])
    assert baseline.values(["new"]) == pytest.approx([0.75])  # mean of 1, 1, 0, 1
    assert BetaBaseline(prior_mean=0.1).values(["new"]) == pytest.approx([0.1])


def test_prior_strength_weighs_the_prior() -> None:
    for strength, expected in ((0.0, 1.0), (1.0, 0.75), (3.0, 0.625)):
        baseline = BetaBaseline(prior_strength=strength)
        baseline.update(["x"], [1.0], eta=1.0)
        assert baseline.values(["x"]) == pytest.approx([expected])


@pytest.mark.parametrize("per_visit", [False, True])
@pytest.mark.parametrize(("strength", "mean"), [(1.0, None), (3.0, 0.3), (0.0, None)])
def test_random_visits_follow_the_definition(strength: float, mean: float | None, per_visit: bool) -> None:
    rng = np.random.default_rng(0)
    baseline, reference = BetaBaseline(strength, mean), Reference(strength, mean)
    for _ in range(60):
        # Of up to 300 prompts, in batches with many repetitions, and at times none at all.
        ids, rewards = visits(rng, int(rng.integers(1, 300)), int(rng.integers(0, 90)))
        np.testing.assert_allclose(baseline.values(ids), reference.values(ids), rtol=1e-6, atol=1e-7)
        unseen = [i not in reference.counts for i in ids]
        assert baseline.unseen_fraction(ids) == (np.mean(unseen) if ids else 0.0)
        etas = rng.random(len(ids)) if per_visit else np.full(len(ids), rng.random())
        baseline.update(ids, rewards, etas if per_visit else float(etas[0]) if ids else 0.5)
        reference.update(ids, rewards, etas)
        assert len(baseline) == len(reference.counts)
        assert baseline.unseen_value == pytest.approx(reference.unseen, rel=1e-12)
        if reference.counts:
            assert baseline.mean() == pytest.approx(
                np.mean(reference.values(list(reference.counts))), abs=1e-10
            )
    np.testing.assert_allclose(baseline.state_dict()["counts"], list(reference.counts.values()), rtol=1e-12)


def test_growth_keeps_every_prompt() -> None:
    baseline = BetaBaseline(prior_mean=0.5)
    for first in range(0, 100_000, 1_777):
        ids = [f"p{i}" for i in range(first, first + 1_777)]
        baseline.update(ids, [i % 2 for i in range(first, first + 1_777)], eta=1.0)
    ids = [f"p{i}" for i in range(100_000)]
    expected = np.tile([0.25, 0.75], 50_000)
    np.testing.assert_array_equal(baseline.values(ids), expected)
    keys = baseline.keys(ids)
    np.testing.assert_array_equal(baseline.values(keys), expected)  # more than one part
    assert baseline.unseen_fraction(baseline.keys(["p7", "q"])) == 0.5
    np.testing.assert_array_equal(baseline.values(np.array(["p0", "p1", "q"])), [0.25, 0.75, 0.5])


def test_each_visit_has_its_own_eta() -> None:
    baseline = BetaBaseline(prior_strength=4.0, prior_mean=0.5)
    baseline.update(["x", "y", "x"], [1.0, 1.0, 0.0], [0.5, 1.0, 0.25])
    # x: (2, 2) -> (2, 1) -> (.5, 1.25); y: (2, 2) -> (3, 2)
    np.testing.assert_allclose(baseline.values(["x", "y"]), [0.5 / 1.75, 0.6], rtol=1e-6)


def test_the_order_of_distinct_prompts_changes_nothing() -> None:
    rng = np.random.default_rng(2)
    ids, rewards, etas = [f"p{i}" for i in range(200)], rng.random(200), rng.random(200)
    plain, permuted = BetaBaseline(), BetaBaseline()
    for _ in range(3):
        order = rng.permutation(200)
        plain.update(ids, rewards, etas)
        permuted.update([ids[i] for i in order], rewards[order], etas[order])
        np.testing.assert_array_equal(permuted.values([ids[i] for i in order]), plain.values(ids)[order])
        assert permuted.unseen_value == plain.unseen_value
        assert permuted.mean() == plain.mean()


@given(
    st.lists(st.tuples(st.sampled_from("xyz"), st.floats(0, 1), st.floats(0.8, 1)), max_size=40),
    st.floats(0.1, 100),
    st.floats(0.05, 0.95),
)
@settings(derandomize=True, deadline=None)
def test_with_a_prior_no_value_is_certain(
    history: list[tuple[str, float, float]], strength: float, mean: float
) -> None:
    baseline = BetaBaseline(strength, mean)
    for i, reward, eta in history:
        baseline.update([i], [reward], eta)
    values = baseline.values(["x", "y", "z"])
    assert ((values > 0) & (values < 1)).all()


def test_values_and_unseen_fraction_change_nothing() -> None:
    baseline = BetaBaseline()
    baseline.update(["x"], [1.0], eta=0.9)
    before = baseline.state_dict()["counts"]
    assert baseline.unseen_fraction(["x", "a", "b", "a"]) == 0.75
    baseline.values(["a", "b"])
    assert len(baseline) == 1
    np.testing.assert_array_equal(baseline.state_dict()["counts"], before)
    assert baseline.unseen_fraction([]) == 0.0


def test_mean_is_over_seen_prompts() -> None:
    baseline = BetaBaseline(prior_mean=0.2)
    assert baseline.mean() == pytest.approx(0.2)
    baseline.update(["x", "y"], [1.0, 0.0], eta=1.0)  # 1.2/2 and .2/2
    assert baseline.mean() == pytest.approx(0.35)


@pytest.mark.parametrize("reward", [math.nan, math.inf, -0.1, 1.5])
def test_a_wrong_reward_is_refused_by_name_and_changes_nothing(reward: float) -> None:
    baseline = BetaBaseline()
    with pytest.raises(ValueError, match="'bad'"):
        baseline.update(["good", "bad"], [1.0, reward], eta=0.9)
    assert len(baseline) == 0
    assert baseline.unseen_value == 0.5


def test_baseline_refuses_wrong_arguments() -> None:
    baseline = BetaBaseline()
    with pytest.raises(ValueError, match="single string"):
        baseline.values("abc")
    with pytest.raises(ValueError, match="strings"):
        baseline.values([7])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="shape"):
        baseline.update(["x"], [1.0, 0.0], eta=0.9)
    with pytest.raises(ValueError, match="eta"):
        baseline.update(["x"], [1.0], eta=1.1)
    with pytest.raises(ValueError, match="prior_strength"):
        BetaBaseline(prior_strength=-1.0)
    with pytest.raises(ValueError, match="prior_mean"):
        BetaBaseline(prior_mean=2.0)


def test_nothing_changes_when_an_argument_is_wrong() -> None:
    baseline = BetaBaseline()
    baseline.update(["x"], [1.0], 0.9)
    for ids, rewards, eta in (
        (["x", "new"], [1.0, 2.0], 0.9),
        (["x", "new"], [1.0], 0.9),
        (["x", 7], [1.0, 1.0], 0.9),
        (["x", "new"], [1.0, 1.0], math.nan),
        (["x", "new"], [1.0, 1.0], [0.9, 1.5]),
        (["x", "new"], [1.0, 1.0], [0.9, 0.9, 0.9]),
    ):
        with pytest.raises(ValueError):
            baseline.update(ids, rewards, eta)  # type: ignore[arg-type]
    assert len(baseline) == 1 and baseline.unseen_value == 1.0
    np.testing.assert_array_equal(baseline.state_dict()["counts"], [[0.45 + 1, 0.45]])


def test_rewards_can_be_checked_before_a_step() -> None:
    baseline = BetaBaseline()
    np.testing.assert_array_equal(baseline.check_rewards(["x", "y"], [0, 1]), [0.0, 1.0])
    with pytest.raises(ValueError, match=r"prompt 'y' must be in \[0, 1\], not 5.0"):
        baseline.check_rewards(["x", "y"], [1.0, 5.0])
    with pytest.raises(ValueError, match="shape"):
        baseline.check_rewards(["x"], [1.0, 0.0])
    assert len(baseline) == 0


def test_first_values_from_rollouts_before_training() -> None:
    baseline = BetaBaseline()
    baseline.initialize(["x", "y"], [8, 2.5], [8, 4], strength=8.0, smoothing=0.5)
    counts = [[8 * 8.5 / 9, 8 * 0.5 / 9], [8 * 3 / 5, 8 * 2 / 5]]
    np.testing.assert_allclose(baseline.state_dict()["counts"], counts, rtol=1e-14)
    assert baseline.unseen_value == pytest.approx(10.5 / 12)
    assert baseline.mean() == pytest.approx((8.5 / 9 + 0.6) / 2)
    baseline.update(["y"], [1.0], eta=0.5)
    assert baseline.values(["y"]) == pytest.approx([(2.4 + 1) / 5])
    baseline.initialize(["z"], [0], [1], strength=8.0, smoothing=0.0)
    assert baseline.values(["z"]).tolist() == [0.0]
    assert len(baseline) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["new", "x"]}, "'x' was visited before"),
        ({"ids": ["new", "new"]}, "'new' occurs twice"),
        ({"successes": [1.0, 2.5]}, "'b' needs a sum of rewards in"),
        ({"successes": [math.nan, 1.0]}, "'a' needs a sum of rewards in"),
        ({"successes": [-0.1, 1.0]}, "'a' needs a sum of rewards in"),
        ({"successes": [1.0]}, "successes of shape"),
        ({"trials": [2, 0]}, "'b' needs a whole number of trials"),
        ({"trials": [2, 2.5]}, "'b' needs a whole number of trials"),
        ({"trials": 2}, "trials of shape"),
        ({"strength": 0.0}, "strength"),
        ({"strength": math.inf}, "strength"),
        ({"smoothing": -1.0}, "smoothing"),
    ],
)
def test_wrong_first_values_are_refused(change: dict[str, Any], message: str) -> None:
    baseline = BetaBaseline()
    baseline.update(["x"], [1.0], eta=0.9)
    right: dict[str, Any] = {"ids": ["a", "b"], "successes": [1.0, 0.0], "trials": [2, 2], "strength": 8.0}
    with pytest.raises(ValueError, match=message):
        baseline.initialize(**right | change)
    assert len(baseline) == 1 and baseline.unseen_value == 1.0
    baseline.initialize(**right)


def test_baseline_state_goes_on_bit_for_bit(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    original = BetaBaseline()
    for _ in range(5):
        original.update(*visits(rng, 50, 20), eta=0.93)
    state = original.state_dict()
    before = {key: np.copy(value) for key, value in state.items()}
    write_state(tmp_path, {"baseline": state})
    restored = BetaBaseline()
    restored.load_state_dict(read_state(tmp_path)["baseline"])
    assert restored.mean() == original.mean()
    for prompts in (1, 90, 90):  # the last ones partly unseen: the running mean must survive too
        ids, rewards = visits(rng, prompts, 60)
        for baseline in (original, restored):
            baseline.update(ids, rewards, eta=0.9)
        np.testing.assert_array_equal(original.values(ids), restored.values(ids))
        assert original.mean() == restored.mean()
        assert original.unseen_value == restored.unseen_value
    for key, value in before.items():  # the saved state is a copy: going on did not change it
        np.testing.assert_array_equal(state[key], value)
    for version in (0, 99):
        with pytest.raises(ValueError, match="version"):
            restored.load_state_dict({**state, "version": version})
    with pytest.raises(ValueError, match="distinct"):
        restored.load_state_dict({**state, "keys": state["keys"][1:]})
    with pytest.raises(ValueError, match="twice"):
        restored.load_state_dict({**state, "keys": state["keys"][[0, *range(len(state["keys"]) - 1)]]})
    with pytest.raises(ValueError, match="Beta"):
        restored.load_state_dict({**state, "counts": state["counts"] - 1})
    np.testing.assert_array_equal(original.values(ids), restored.values(ids))  # refused, not half loaded
    write_state(tmp_path, BetaBaseline().state_dict())
    restored.load_state_dict(read_state(tmp_path))
    assert len(restored) == 0 and restored.unseen_value == 0.5


def test_a_state_of_version_1_is_still_read() -> None:
    state = {"version": 1, "ids": ["ü", "x"], "reward_sum": 1.5, "reward_count": 4}
    baseline = BetaBaseline()
    baseline.load_state_dict(state | {"counts": np.array([[1.0, 3.0], [2.0, 0.5]])})
    np.testing.assert_allclose(baseline.values(["x", "ü", "new"]), [0.8, 0.25, 0.375], rtol=1e-6)
    assert baseline.mean() == pytest.approx(0.525)
    with pytest.raises(ValueError, match="twice"):
        baseline.load_state_dict(state | {"ids": ["x", "x"], "counts": np.ones((2, 2))})
