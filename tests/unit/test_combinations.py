"""Any baseline with any normalisation, by value; and the methods that are nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mssr import algorithms
from mssr.algorithms.baselines import BASELINES
from mssr.algorithms.methods import _keywords
from mssr.algorithms.normalisations import NORMALISATIONS

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", sorted(set(algorithms.names()) - {"dbb"}))
def test_a_method_is_its_two_choices_bit_for_bit(name: str) -> None:
    method = algorithms.get(name)
    rng = np.random.default_rng(3)
    ids = [f"p{i}" for i in rng.integers(0, 5, 20) for _ in range(2)]
    r, lengths = rng.integers(0, 2, 40) * 1.0, rng.integers(1, 9, 40)
    choices = {"baseline": method.baseline, "normalisation": method.normalisation}
    own, made = algorithms.create(name), algorithms.create("reinforce_pp", choices)
    for one in (own, made):
        if one.baseline is not None:
            one.baseline.update(ids[::-1], r, 0.9)
    for a, b in zip(own.advantages(ids, r, lengths), made.advantages(ids, r, lengths), strict=True):
        np.testing.assert_equal(a, b)


def test_flash_reinforce_subtracts_the_mean_and_scales_nothing() -> None:
    method = algorithms.create("flash_reinforce")
    signal, metrics = method.advantages(["a", "b", "c", "d"], [1, 0, 0, 0], [1, 9, 2, 3])
    assert signal.tolist() == [0.75, -0.25, -0.25, -0.25]
    assert metrics["advantage/degenerate_fraction"] == 0
    signal, metrics = method.advantages(["a", "b", "c"], [0.1] * 3, [1, 1, 1])
    assert signal.tolist() == [0, 0, 0] and metrics["advantage/degenerate_fraction"] == 1
    assert algorithms.get("flash_reinforce").default_loss == "flash_reinforce"  # type: ignore[attr-defined]


def test_maxrl_divides_by_the_mean() -> None:
    method, ids = algorithms.create("maxrl"), ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    signal, metrics = method.advantages(ids, [1, 0, 0, 0] + [0] * 4 + [1] * 4, [1] * 12)
    assert signal.tolist() == [3, -1, -1, -1] + [0] * 8
    assert metrics["advantage/degenerate_fraction"] == pytest.approx(8 / 12)
    with pytest.raises(ValueError, match="n >= 2"):
        method.advantages(["a", "b"], [1, 0], [1, 1])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        method.advantages(["a", "a"], [2, 0], [1, 1])
    single = algorithms.create("mvsr", {"normalisation": "mean"}, prior_mean=0.0, floor=0.05)
    np.testing.assert_allclose(single.advantages(["a", "b"], [1, 0], [1, 1])[0], [20, 0])


def test_dbb_of_a_group_counts_the_group() -> None:
    method = algorithms.create("dbb", prior_mean=0.5, prior_strength=2.0, eta=0.5)
    signal, _ = method.advantages(["a"] * 3, [1, 1, 1], [1] * 3)
    v = (0.5 * 1 + 3) / (0.5 * 2 + 3)
    np.testing.assert_allclose(signal, [(1 - v) / math.sqrt(v * (1 - v))] * 3, rtol=1e-6)
    method.observe(["a"] * 3, [1, 1, 1], 0.0)
    assert method.baseline is not None
    np.testing.assert_allclose(method.baseline.counts(["a"]), [[3.5, 0.5]])  # one discount for the group
    # One response: the value is from before the step.
    signal, metrics = method.advantages(["a"], [0], [1])
    np.testing.assert_allclose(signal, [-v / math.sqrt(v * (1 - v))], rtol=1e-6)
    assert metrics["baseline/unseen_fraction"] == 0
    certain = algorithms.create("dbb", prior_mean=1.0, floor=0.1)
    np.testing.assert_allclose(certain.advantages(["a", "b"], [0, 1], [1, 1])[0], [-1 / 0.3, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="last_visit"):
        algorithms.create("dbb", kl_source="last_visit")


def test_a_baseline_shrinks_by_the_share_of_noise() -> None:
    ids, r = ["a", "a", "b", "b", "c", "c"], np.array([1, 0, 1, 1, 0, 0.0])
    method = algorithms.create("dr_grpo", {"shrinkage": True})
    signal, _ = method.advantages(ids, r, [1] * 6)
    # For a the others are 1 and 0, without noise: own mean. For b they are 1/2 (noise 1/4) and 0: v = 1/8,
    # m = 1/4, s = 1/16, lam = 2/3 * 2/3, and b moves from 1 to 2/3. For c likewise from 0 to 1/3.
    np.testing.assert_allclose(signal, np.array([3, -3, 2, 2, -2, -2]) / 6, rtol=1e-6)
    # Of two prompts the other's mean has no spread: lam = 1/2, if it has noise.
    rloo = algorithms.create("rloo", {"shrinkage": True})
    np.testing.assert_allclose(rloo.advantages(ids[:4], r[:4], [1] * 4)[0], [1, -1, 0.25, 0.25])
    assert rloo.advantages(ids[:2], r[:2], [1] * 2)[0].tolist() == [1, -1]  # alone


def test_leave_one_out_stays_independent_of_its_own_reward() -> None:
    ids, r = ["a", "a", "b", "b", "c", "c"], np.array([1, 0, 1, 0, 0, 0.0])
    method = algorithms.create("rloo", {"shrinkage": True})
    changed = r.copy()
    changed[0] = 0.25
    first, second = (method.advantages(ids, x, [1] * 6)[0][0] for x in (r, changed))
    assert first - second == pytest.approx(0.75)


def test_v_shrinks_at_one_response() -> None:
    method = algorithms.create("mvsr", {"shrinkage": True, "normalisation": "none"}, prior_mean=0.5)
    signal, _ = method.advantages(["a", "b", "c"], [1, 0, 0], [1] * 3)
    # All values are the prior: they differ by nothing but noise, so the others' mean takes their place.
    np.testing.assert_allclose(signal, [1, -0.5, -0.5])
    assert method.baseline is not None
    method.baseline.update(["a", "b"], [1, 0], 1.0)  # (1.5, 0.5), (0.5, 1.5): v = 3/4, 1/4, noise 1/16
    signal, _ = method.advantages(["a", "b"], [1, 0], [1] * 2)
    share = (1 / 16) / (1 / 16 + 1 / 8)
    np.testing.assert_allclose(signal, [1 - (1 - share) * 0.75, -((1 - share) * 0.25 + share)], rtol=1e-6)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_every_pair_works_or_says_why_not(baseline: str, normalisation: str) -> None:
    choices = {"baseline": baseline, "normalisation": normalisation}
    try:
        method = algorithms.create("grpo", choices)
    except ValueError as error:
        assert normalisation in ("mean", "bernoulli_std") and "baseline" in str(error)
        return
    assert algorithms.options("grpo", choices).keys() >= _keywords(NORMALISATIONS[normalisation]).keys()
    assert (method.baseline is not None) == (baseline == "beta") and method.default_n == 8
    signal, metrics = method.advantages(["a", "a", "b", "b"], [1, 0.1, 0.6, 0.25], [3, 1, 2, 2])
    assert np.isfinite(signal).all() and signal[0] > signal[1]
    method.load_state_dict(method.state_dict())
    assert metrics["advantage/degenerate_fraction"] == 0


def test_what_does_not_go_together_is_refused() -> None:
    for name, choices, message in (
        ("mssr", {"baseline": "mean"}, "baseline must be one of"),
        ("mssr", {"normalisation": "std"}, "normalisation must be one of"),
        ("reinforce_pp", {"normalisation": "mean"}, "divides by the baseline"),
        ("reinforce_pp", {"shrinkage": True}, "shrinkage is of the baseline of each prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            algorithms.create(name, choices)
    with pytest.raises(ValueError, match=r"each of defaults must be one of .*half_life.*, not 'half_lif'"):
        replace(algorithms.get("spo"), defaults={"half_lif": 0.2})  # type: ignore[type-var]
    with pytest.raises(TypeError, match="half_lif"):
        algorithms.get("spo")(half_lif=0.2)
    assert algorithms.get("mssr", baseline="beta", shrinkage=False) == algorithms.get("mssr")
    spo = algorithms.create("spo", {"normalisation": "none"})
    assert (spo.init_rollouts, spo.kl_source, spo.default_sampler) == (8, "last_visit", "uncertainty")
    assert algorithms.get("spo", baseline="batch_mean").default_sampler == "epochs"
    assert algorithms.get("mssr", baseline="group_mean").shapes_entropy
    assert algorithms.get("mssr", baseline="group_mean").default_n == 8
