"""The Beta baseline and the adaptive discount: closed forms, repeated visits, errors, exact resume."""

from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from mssr.algorithms import AdaptiveDiscount, BetaBaseline

pytestmark = pytest.mark.unit


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


def test_repeated_prompts_are_visits_in_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = [f"p{i}" for i in rng.integers(0, 6, 30)]
        rewards = rng.random(30)
        at_once, one_by_one = BetaBaseline(prior_mean=0.3), BetaBaseline(prior_mean=0.3)
        at_once.update(ids, rewards, eta=0.9)
        for key, reward in zip(ids, rewards, strict=True):
            one_by_one.update([key], [reward], eta=0.9)
        np.testing.assert_array_equal(at_once.values(ids), one_by_one.values(ids))
        assert len(at_once) == len(set(ids))


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


def test_baseline_state_goes_on_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    original = BetaBaseline()
    for _ in range(5):
        original.update([f"ü{i}" for i in rng.integers(0, 50, 20)], rng.random(20), eta=0.93)
    state = original.state_dict()
    json.dumps({k: v for k, v in state.items() if not isinstance(v, np.ndarray)})
    restored = BetaBaseline()
    restored.load_state_dict(state)
    ids = [f"ü{i}" for i in range(60)]  # some of them unseen: the running mean must survive too
    rewards = rng.random(60)
    for baseline in (original, restored):
        baseline.update(ids, rewards, eta=0.9)
    np.testing.assert_array_equal(original.values(ids), restored.values(ids))
    assert original.mean() == restored.mean()
    assert original.unseen_value == restored.unseen_value
    # The saved state is a copy: going on did not change it.
    assert len(state["ids"]) == len(state["counts"]) <= 50
    with pytest.raises(ValueError, match="version"):
        restored.load_state_dict({**state, "version": 99})
    with pytest.raises(ValueError, match="distinct"):
        restored.load_state_dict({**state, "ids": state["ids"][1:]})


def test_a_large_baseline_is_fast() -> None:
    baseline = BetaBaseline()
    start = time.perf_counter()
    for first in range(0, 200_000, 2_000):
        ids = [str(i) for i in range(first, first + 2_000)]
        baseline.update(ids, np.ones(2_000), eta=0.9)
    assert len(baseline) == 200_000
    assert time.perf_counter() - start < 5  # takes 0.2 s


# --- AdaptiveDiscount ----------------------------------------------------------------------------


def test_eta_is_the_formula() -> None:
    discount = AdaptiveDiscount()
    assert discount.eta == 0.96
    discount.observe(0.005)
    assert discount.eta == pytest.approx(0.9175)
    discount.observe(0.001)  # the mean is .003
    assert discount.eta == pytest.approx(0.96 - 0.3 * 0.085)
    discount.observe(1.0)
    assert discount.eta == 0.875
    negative = AdaptiveDiscount()
    negative.observe(-0.01)
    assert negative.eta == 0.96


def test_eta_falls_with_the_kl_without_a_jump() -> None:
    def eta(kl: float) -> float:
        discount = AdaptiveDiscount()
        discount.observe(kl)
        return discount.eta

    etas = np.array([eta(kl) for kl in np.linspace(0, 0.02, 201)])
    assert (np.diff(etas) <= 1e-15).all()
    assert etas[0] == 0.96 and etas[-1] == 0.875
    assert np.abs(np.diff(etas)).max() < 0.001


def test_the_window_forgets() -> None:
    discount = AdaptiveDiscount(window=2)
    for kl in (1.0, 0.0, 0.0):
        discount.observe(kl)
    assert discount.eta == 0.96


def test_discount_state_and_errors() -> None:
    discount = AdaptiveDiscount(window=3)
    for kl in (0.1, 0.001, 0.002, 0.003):
        discount.observe(kl)
    state = json.loads(json.dumps(discount.state_dict()))
    restored = AdaptiveDiscount(window=3)
    restored.load_state_dict(state)
    for d in (discount, restored):
        d.observe(0.004)
    assert restored.eta == discount.eta != 0.96
    with pytest.raises(ValueError, match="version"):
        restored.load_state_dict({"version": 0, "kls": []})
    with pytest.raises(ValueError, match="finite"):
        discount.observe(math.nan)


@pytest.mark.parametrize(
    "settings",
    [
        {"eta_min": 0.97},
        {"eta_max": 1.1},
        {"eta_min": -0.1},
        {"kl_target": 0.0},
        {"kl_target": math.inf},
        {"window": 0},
        {"window": 2.5},
    ],
)
def test_discount_refuses_wrong_settings(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdaptiveDiscount(**settings)
