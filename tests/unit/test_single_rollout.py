"""MVSR, MSSR and SPO: the baseline and discount behind them, as the driver calls them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mssr import algorithms
from tests.unit import formulas as advantages

pytestmark = pytest.mark.unit

NAMES = ["mssr", "mvsr", "spo"]


@pytest.mark.parametrize("name", ["mvsr", "mssr"])
def test_single_rollout_reads_the_baseline_before_it_updates(name: str) -> None:
    algorithm = algorithms.create(name, prior_mean=0.5)
    ids, rewards, lengths = ["x", "y", "z"], [1.0, 0.0, 1.0], [3, 3, 3]
    first, metrics = algorithm.advantages(ids, rewards, lengths)
    expected = advantages.single_rollout(rewards, [0.5] * 3)
    np.testing.assert_array_equal(first, expected)
    assert metrics["baseline/unseen_fraction"] == 1.0
    assert metrics["advantage/std"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["advantage/degenerate_fraction"] == 0.0
    again, _ = algorithm.advantages(ids, rewards, lengths)
    np.testing.assert_array_equal(again, first)  # asking does not learn

    algorithm.observe(ids, rewards, kl=0.005)  # eta .9175: a, b = .45875 + r, .45875 + 1 - r
    high = 1.45875 / 1.9175
    assert algorithm.metrics() == pytest.approx({"baseline/eta": 0.9175, "baseline/mean": (1 + high) / 3})
    second, metrics = algorithm.advantages(["x", "y", "new"], rewards, lengths)
    np.testing.assert_allclose(second, advantages.single_rollout(rewards, [high, 1 - high, 0.5]), rtol=1e-5)
    assert metrics["baseline/unseen_fraction"] == pytest.approx(1 / 3)


def test_observe_uses_the_new_eta() -> None:
    means = []
    for kl in (0.0, 1.0):
        algorithm = algorithms.create("mvsr")
        for reward in (1.0, 1.0, 1.0, 0.0):
            algorithm.observe(["x"], [reward], kl=kl)
        means.append(algorithm.metrics()["baseline/mean"])
    assert means[1] < means[0]  # a changing policy forgets its old successes faster


def test_spo_differs_by_its_defaults_only() -> None:
    changed = {"init_rollouts": 8, "eta_rule": "half_life", "kl_source": "last_visit"}
    assert algorithms.options("spo") == algorithms.options("mvsr") | changed
    assert list(algorithms.options("spo")) == list(algorithms.options("mssr"))
    built = algorithms.create("spo", init_rollouts=0, eta_rule="monotone", kl_source="update")
    mvsr = algorithms.create("mvsr")
    for algorithm in (built, mvsr):
        algorithm.observe(["x", "y"], [1.0, 0.0], 0.004)
    assert built.metrics() == mvsr.metrics()
    assert built.divergence == mvsr.divergence == "k3"


@pytest.mark.parametrize("name", NAMES)
def test_every_option_changes_something(name: str) -> None:
    start = {"eta_rule": "monotone", "kl_source": "last_visit", "init_rollouts": 2}

    def run(**settings: Any) -> list[Any]:
        algorithm = algorithms.create(name, **start | settings)
        each = algorithm.kl_source == "last_visit"
        algorithm.initialize(["x"], [1], [3])
        for reward, kl in ((1.0, 0.002), (0.0, 0.004), (1.0, 0.02), (1.0, 0.003)):
            algorithm.observe(["x"], [reward], kl=[kl] if each else kl)
        signal, _ = algorithm.advantages(["x", "y", "z"], [1.0, 0.0, 0.5], [1, 2, 1])
        told = [algorithm.kl_source, algorithm.divergence, algorithm.init_rollouts]
        return [*signal.tolist(), *algorithm.metrics().values(), *told]

    by_start: dict[str, dict[str, Any]] = {
        "prior_strength": {},  # of prompts that `initialize` was not told of, see below
        "prior_mean": {"prior_mean": 0.1},
        "init_rollouts": {"init_rollouts": 3},
        "init_strength": {"init_strength": 2.0},
        "init_smoothing": {"init_smoothing": 0.0},
        "eta": {"eta": 0.9},
        "eta_min": {"eta_min": 0.5},
        "eta_max": {"eta_max": 0.99},
        "kl_target": {"kl_target": 0.05},
        "window": {},  # of one KL a step, see below
        "eta_rule": {"eta_rule": "published_code"},
        "kl_source": {"kl_source": "reference"},
        "half_life": {},  # of the rule of that name, see below
        "weighting": {"weighting": "token"},
        "eps": {"eps": 0.5},
    }
    assert set(by_start) == set(algorithms.options(name))
    plain = run()
    for option, change in by_start.items():
        assert not change or run(**change) != plain, option
    assert run(kl_source="update", window=1) != run(kl_source="update")
    assert run(eta_rule="half_life", half_life=0.01) != run(eta_rule="half_life")

    def unseen(**settings: Any) -> list[float]:
        algorithm = algorithms.create(name, eta=0.9, kl_source="update", eta_rule="monotone", **settings)
        algorithm.observe(["x"], [1.0], kl=0.0)
        return list(algorithm.metrics().values())

    assert unseen(prior_strength=5.0) != unseen()


def test_each_prompt_fades_by_its_own_drift() -> None:
    spo = algorithms.create("spo", prior_mean=0.5, prior_strength=8.0)
    ids = ["x", "y", "z", "x"]
    spo.observe(ids, [1.0] * 4, [math.nan] * 4)  # nobody was there before
    assert spo.metrics()["baseline/eta"] == 0.96
    assert spo.baseline is not None
    # One visit adds 1 to .96 * 4 of .96 * 8 pseudo-counts; x is visited twice.
    once = (0.96 * 4 + 1) / (0.96 * 8 + 1)
    twice = (0.96 * (0.96 * 4 + 1) + 1) / (0.96 * (0.96 * 8 + 1) + 1)
    np.testing.assert_allclose(spo.baseline.values(["x", "y"]), [twice, once], rtol=1e-6)
    before = spo.baseline.values(["x", "y", "z"])
    spo.observe(["x", "y", "z"], [0.0] * 3, [0.0, 0.006, 9.0])
    etas = [0.96, 2**-0.1, 0.875]
    assert spo.metrics()["baseline/eta"] == pytest.approx(np.mean(etas))
    change = before - spo.baseline.values(["x", "y", "z"])
    assert change[2] > change[1] > 0
    y = etas[1] * (0.96 * 4 + 1) / (etas[1] * (0.96 * 8 + 1) + 1)
    assert spo.baseline.values(["y"]) == pytest.approx([y])


@given(
    st.lists(st.floats(0, 1) | st.just(math.nan), min_size=2, max_size=6), st.randoms(use_true_random=False)
)
def test_the_order_of_distinct_prompts_does_not_matter(drifts: list[float], random: Any) -> None:
    ids = [f"p{i}" for i in range(len(drifts))]
    rewards = [float(i % 2) for i in range(len(ids))]
    order = random.sample(range(len(ids)), len(ids))
    plain, permuted = algorithms.create("spo"), algorithms.create("spo")
    plain.observe(ids, rewards, drifts)
    permuted.observe([ids[i] for i in order], [rewards[i] for i in order], [drifts[i] for i in order])
    lengths = np.arange(len(ids)) + 1
    a, _ = plain.advantages(ids, rewards, lengths)
    b, _ = permuted.advantages([ids[i] for i in order], [rewards[i] for i in order], lengths[order])
    np.testing.assert_allclose(b, a[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "strength"),
    [({}, 8.0), ({"eta_min": 0.9}, 10.0), ({"eta": 0.96}, 25.0), ({"init_strength": 3.0}, 3.0)],
)
def test_rollouts_before_training_give_the_first_values(settings: dict, strength: float) -> None:
    spo = algorithms.create("spo", **settings)
    assert spo.baseline is not None
    spo.initialize(["x", "y"], [8, 2.5], [8, 8])
    np.testing.assert_allclose(spo.baseline.values(["x", "y"]), [8.5 / 9, 3 / 9], rtol=1e-6)
    spo.observe(["x"], [0.0], [math.nan])
    eta = settings.get("eta", 0.96)
    expected = eta * strength * 8.5 / 9 / (eta * strength + 1)
    assert spo.baseline.values(["x"]) == pytest.approx([expected], rel=1e-6)
    hard = algorithms.create("mvsr", init_rollouts=1, init_smoothing=0.0)
    hard.initialize(["x", "y"], [1, 0], [1, 1])  # the paper's way: a value is 0 or 1
    assert hard.baseline is not None and hard.baseline.values(["x", "y"]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_rewards_out_of_range_are_refused_before_the_update(name: str) -> None:
    algorithm = algorithms.create(name)
    for wrong in (5.0, -0.5, math.nan):
        with pytest.raises(ValueError, match=r"prompt 'y' must be in \[0, 1\]"):
            algorithm.advantages(["x", "y"], [1.0, wrong], [1, 1])
    half, _ = algorithm.advantages(["x", "y"], [1.0, 0.5], [1, 1])
    assert half[0] > 0 > half[1]


def test_the_kl_must_be_of_the_kind_that_is_asked_for() -> None:
    with pytest.raises(ValueError, match="needs the drift of each of 2 responses"):
        algorithms.create("spo").observe(["x", "y"], [1, 0], 0.01)
    with pytest.raises(ValueError, match="needs the drift of each of 2 responses"):
        algorithms.create("spo").observe(["x", "y"], [1, 0], [0.01])
    with pytest.raises(ValueError, match="'update' needs one KL a step"):
        algorithms.create("mssr").observe(["x", "y"], [1, 0], [0.01, 0.02])
    with pytest.raises(ValueError, match="finite"):
        algorithms.create("mssr").observe(["x"], [1], math.nan)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta_rule": "half_life"}, "needs kl_source 'last_visit', not 'update'"),
        ({"eta_rule": "half_life", "kl_source": "reference"}, "not 'reference'"),
        ({"eta_rule": "linear"}, "eta_rule must be one of monotone, published_code, half_life"),
        ({"kl_source": "previous"}, "kl_source must be one of update, reference, last_visit"),
        ({"init_rollouts": -1}, "init_rollouts must be a whole number"),
        ({"init_rollouts": 1.5}, "init_rollouts must be a whole number"),
        ({"init_rollouts": 1, "eta": 1.0}, "init_strength must be given"),
        ({"init_strength": 0.0}, "init_strength"),
        ({"init_smoothing": math.nan}, "init_smoothing"),
        ({"eta": 1.1}, "eta must be in"),
        ({"half_life": -1.0}, "half_life"),
        ({"prior_strength": -1.0}, "prior_strength"),
        ({"prior_mean": 2.0}, "prior_mean"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithms.create("mssr", **settings)


@pytest.mark.parametrize("name", sorted(set(algorithms.names()) - {*NAMES, "dbb"}))
def test_other_methods_have_no_first_values(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} keeps no baseline"):
        algorithms.create(name).initialize(["x"], [1], [1])
