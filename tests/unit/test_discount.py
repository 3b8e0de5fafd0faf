"""The discount of the Beta baseline: its rules, its window, and one KL a response."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mssr.algorithms import AdaptiveDiscount

pytestmark = pytest.mark.unit

KLS = st.floats(-0.1, 10) | st.floats(0, 0.02)
EXPECTED = {
    "monotone": {0: 0.96, 0.005: 0.9175, 0.01: 0.875, 0.011: 0.875, 3: 0.875, -0.1: 0.96},
    "published_code": {0: 0.875, 0.005: 0.9175, 0.01: 0.96, 0.011: 0.875, 3: 0.875, -0.1: 0.875},
    # 2^(-D/.06): half after .06, the square root of a half .7071 after .03, 2^(-1/12) after .005.
    "half_life": {0: 0.96, 0.005: 2 ** (-1 / 12), 0.01: 2 ** (-1 / 6), 0.03: 0.875, 0.06: 0.875, -1: 0.96},
}


@pytest.mark.parametrize("rule", EXPECTED)
def test_the_rules_by_hand(rule: str) -> None:
    kls, etas = zip(*EXPECTED[rule].items(), strict=True)
    discount = AdaptiveDiscount(rule=rule)
    np.testing.assert_allclose(discount.of(kls), etas, rtol=1e-12)
    for kl, eta in EXPECTED[rule].items():
        step = AdaptiveDiscount(rule=rule)
        step.observe(kl)
        assert step.eta == float(discount.of(kl)) == pytest.approx(eta)
    assert discount.eta == float(discount.of(0.0))  # nothing observed


def test_the_ends_are_exact() -> None:
    assert AdaptiveDiscount().of([0.0, 0.01]).tolist() == [0.96, 0.875]
    assert AdaptiveDiscount(rule="published_code").of([0.0, 0.01]).tolist() == [0.875, 0.96]
    assert AdaptiveDiscount(rule="half_life").of([0.0, 1.0]).tolist() == [0.96, 0.875]


def test_the_half_life_is_what_it_says() -> None:
    wide = AdaptiveDiscount(0, 1, rule="half_life", half_life=0.2)
    np.testing.assert_allclose(wide.of([0, 0.2, 0.4, 0.1]), [1, 0.5, 0.25, math.sqrt(0.5)])


@given(
    st.lists(KLS, min_size=1), st.sampled_from(["monotone", "half_life"]), st.floats(0, 1), st.floats(0, 1)
)
def test_eta_falls_with_the_kl_and_stays_in_its_range(
    kls: list[float], rule: str, a: float, b: float
) -> None:
    discount = AdaptiveDiscount(min(a, b), max(a, b), rule=rule)
    etas = discount.of(np.sort(kls))
    assert (np.diff(etas) <= 1e-15).all()
    assert ((etas >= min(a, b) - 1e-15) & (etas <= max(a, b) + 1e-15)).all()


@given(st.lists(KLS, min_size=1), st.sampled_from([*EXPECTED]))
def test_one_kl_each_is_the_same_as_one_at_a_time(kls: list[float], rule: str) -> None:
    discount = AdaptiveDiscount(rule=rule)
    etas = discount.observe_each(kls)
    assert etas.tolist() == [float(discount.of(kl)) for kl in kls]
    assert discount.eta == pytest.approx(np.mean(etas))
    assert ((etas >= 0.875) & (etas <= 0.96)).all()


@pytest.mark.parametrize("rule", EXPECTED)
def test_a_first_visit_keeps_most(rule: str) -> None:
    etas = AdaptiveDiscount(rule=rule).of([math.nan, 0.006])
    assert etas[0] == 0.96 != etas[1]


def test_a_fixed_discount_follows_nothing() -> None:
    discount = AdaptiveDiscount(eta=0.5)
    discount.observe(3.0)
    assert discount.eta == 0.5
    assert discount.observe_each([math.nan, 0.0, 9.0]).tolist() == [0.5] * 3


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
    for kl in (1.0, 0.0, 0.005):
        discount.observe(kl)
    assert discount.eta == pytest.approx(0.96 - 0.25 * 0.085)


@pytest.mark.parametrize("each", [False, True])
def test_the_state_goes_on(each: bool) -> None:
    discount, restored = AdaptiveDiscount(window=3), AdaptiveDiscount(window=3)
    for kl in (0.1, 0.001, 0.002, 0.003):
        discount.observe(kl)
    if each:
        discount.observe_each([0.001, 0.009, math.nan])
    restored.load_state_dict(json.loads(json.dumps(discount.state_dict())))
    assert restored.eta == discount.eta
    for d in (discount, restored):
        d.observe(0.004)
    assert restored.eta == discount.eta == pytest.approx(0.96 - 0.3 * 0.085)
    restored.load_state_dict({"version": 1, "kls": [0.005]})  # a checkpoint of before there was a mean
    assert restored.eta == pytest.approx(0.9175)
    for version in (0, 3):
        with pytest.raises(ValueError, match=f"version {version}"):
            restored.load_state_dict({"version": version, "kls": [], "mean": None})


def test_infinite_or_missing_kls_are_refused() -> None:
    discount = AdaptiveDiscount()
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            discount.observe(wrong)
    with pytest.raises(ValueError, match="finite"):
        discount.observe_each([0.1, math.inf])
    assert discount.eta == 0.96


@pytest.mark.parametrize(
    "settings",
    [
        {"eta_min": 0.97},
        {"eta_max": 1.1},
        {"eta_min": -0.1},
        {"eta_min": math.nan},
        {"kl_target": 0.0},
        {"kl_target": math.inf},
        {"window": 0},
        {"window": 2.5},
        {"half_life": 0.0},
        {"half_life": math.nan},
        {"rule": "linear"},
        {"eta": 1.5},
        {"eta": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdaptiveDiscount(**settings)
