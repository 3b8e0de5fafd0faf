"""The KL controller: the rule by hand, what it converges to, its state, errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mssr.algorithms.kl_control import KLController

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("kl", "rollouts", "factor"),
    [
        (0.010, 2048, 1.0),  # on target
        (0.0105, 2048, 1 + 0.05 * 0.2048),
        (0.020, 2048, 1 + 0.2 * 0.2048),  # the error is clipped
        (5.0, 2048, 1 + 0.2 * 0.2048),
        (0.009, 1000, 1 - 0.1 * 0.1),
        (0.0, 1000, 1 - 0.2 * 0.1),
        (-0.001, 1000, 1 - 0.2 * 0.1),  # an estimate below 0
        (0.020, 0, 1.0),
    ],
)
def test_adaptive_rule_by_hand(kl: float, rollouts: int, factor: float) -> None:
    controller = KLController(0.1, target=0.01, horizon=10000)
    controller.observe(kl, rollouts)
    assert controller.coef == pytest.approx(0.1 * factor, rel=1e-12)


def test_without_a_target_the_weight_is_fixed() -> None:
    for coef in (0.0, 0.01):
        controller = KLController(coef)
        for kl in (0.0, 3.0, math.nan):
            controller.observe(kl, 2048)
        assert controller.coef == coef


def test_it_holds_a_policy_at_the_target() -> None:
    """A policy that drifts the further the weaker the KL term is: kl = 0.001 / coef."""
    for start in (1e-3, 10.0):
        controller = KLController(start, target=0.02, horizon=4000)
        for _ in range(500):
            controller.observe(0.001 / controller.coef, 2048)
        assert 0.001 / controller.coef == pytest.approx(0.02, rel=1e-3)


@settings(derandomize=True, deadline=None)
@given(
    kls=st.lists(st.floats(-1, 1e6), max_size=20),
    target=st.floats(1e-6, 10),
    horizon=st.floats(1, 1e6),
    rollouts=st.integers(0, 100_000),
)
def test_each_step_moves_towards_the_target_by_at_most_a_fifth(
    kls: list[float], target: float, horizon: float, rollouts: int
) -> None:
    controller = KLController(0.01, target, horizon)
    for kl in kls:
        before = controller.coef
        controller.observe(kl, rollouts)
        factor = controller.coef / before
        # Far more rollouts than the horizon: without a bound this would be negative.
        assert 0.8 - 1e-12 <= factor <= 1.2 + 1e-12
        assert (factor - 1) * (kl - target) >= 0


def test_state_goes_on_where_it_was_taken() -> None:
    controller = KLController(0.1, target=0.01)
    controller.observe(0.5, 2048)
    state = json.loads(json.dumps(controller.state_dict()))
    again = KLController(0.1, target=0.01)
    again.load_state_dict(state)
    assert again.coef == controller.coef != 0.1
    again.observe(0.0, 300)
    controller.observe(0.0, 300)
    assert again.coef == controller.coef


def test_a_fixed_weight_is_a_setting_and_not_restored() -> None:
    fixed = KLController(0.05)
    fixed.load_state_dict(KLController(0.01).state_dict())
    assert fixed.coef == 0.05


def test_states_that_are_refused() -> None:
    controller = KLController(0.1, target=0.01)
    with pytest.raises(ValueError, match="version 2"):
        controller.load_state_dict({"version": 2, "coef": 0.1})
    for wrong in (math.nan, -1.0):
        with pytest.raises(ValueError, match="saved KL coefficient"):
            controller.load_state_dict({"version": 1, "coef": wrong})
    assert controller.coef == 0.1


def test_numbers_that_are_refused() -> None:
    for coef in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="coefficient"):
            KLController(coef)
    with pytest.raises(ValueError, match="start above 0"):
        KLController(0.0, target=0.01)
    for target in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="target"):
            KLController(0.1, target)
    for horizon in (0.0, math.inf):
        with pytest.raises(ValueError, match="horizon"):
            KLController(0.1, 0.01, horizon)
    controller = KLController(0.1, target=0.01)
    with pytest.raises(ValueError, match="finite"):
        controller.observe(math.nan, 1)
    with pytest.raises(ValueError, match="rollouts"):
        controller.observe(0.1, -1)
    assert controller.coef == 0.1


def test_the_driver_needs_no_torch_for_it() -> None:
    code = "import sys, mssr.algorithms.kl_control; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
