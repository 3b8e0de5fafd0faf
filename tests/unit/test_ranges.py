"""Every number of a method or a loss: the edges of its range are taken, what is just beyond is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mssr import algorithms
from mssr.algorithms import AdaptiveDiscount, BetaBaseline
from mssr.algorithms.correction import rollout_correction
from mssr.algorithms.kl_control import KLController
from mssr.algorithms.losses import aggregate, aggregation_denominator, policy_loss
from mssr.algorithms.shaping import entropy_bonus
from mssr.algorithms.step import per_token
from tests.unit import formulas as advantages

pytestmark = pytest.mark.unit
X = torch.zeros(2)
TWO = torch.tensor([2])
TINY, BELOW_ONE, ABOVE_ONE = 1e-12, 1 - 1e-12, 1 + 1e-12
NOT_FINITE = (math.nan, math.inf, -math.inf)
POSITIVE = ((TINY, 0.5, 3.0), (0.0, -TINY, -1.0, *NOT_FINITE))
NOT_NEGATIVE = ((0.0, 0.5, 3.0), (-TINY, -1.0, *NOT_FINITE))
SHARE = ((0.0, 0.5, 1.0), (-TINY, ABOVE_ONE, *NOT_FINITE))
WITHOUT_END = ((0.0, 0.5, 3.0), (-TINY, -1.0, math.nan, -math.inf))


def loss(name: str, option: str) -> Callable[[Any], Any]:
    return lambda value: policy_loss(X, X, X, TWO, name=name, **{option: value})


def correction(option: str) -> Callable[[Any], Any]:
    return lambda value: rollout_correction(X, X, TWO, **{option: value})  # type: ignore[arg-type]


def discount(option: str) -> Callable[[Any], Any]:
    return lambda value: AdaptiveDiscount(**{option: value})


def method(option: str, **others: Any) -> Callable[[Any], Any]:
    return lambda value: algorithms.create("mssr", **{option: value}, **others)


def first_values(**given: Any) -> Any:
    arguments = {"ids": ["a"], "successes": [1], "trials": [2], "strength": 1.0} | given
    return BetaBaseline().initialize(**arguments)


RANGES: dict[str, tuple[Callable[[Any], Any], tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "shaping coef": (lambda v: entropy_bonus(X, X, coef=v), NOT_NEGATIVE),
    "shaping divisor": (lambda v: entropy_bonus(X, X, divisor=v), ((TINY, 3.0), (0.0, -1.0, math.nan))),
    "ppo clip_low": (loss("ppo", "clip_low"), SHARE),
    "ppo clip_high": (loss("ppo", "clip_high"), WITHOUT_END),
    "ppo dual_clip": (loss("ppo", "dual_clip"), ((None, ABOVE_ONE, 3.0), (1.0, BELOW_ONE, math.nan))),
    "gspo clip_low": (loss("gspo", "clip_low"), SHARE),
    "gspo clip_high": (loss("gspo", "clip_high"), WITHOUT_END),
    "cispo clip_low": (loss("cispo", "clip_low"), WITHOUT_END),
    "cispo clip_high": (loss("cispo", "clip_high"), WITHOUT_END),
    "sapo tau_positive": (loss("sapo", "tau_positive"), POSITIVE),
    "sapo tau_negative": (loss("sapo", "tau_negative"), POSITIVE),
    "max_weight": (correction("max_weight"), POSITIVE),
    "mask_low": (correction("mask_low"), SHARE),
    "mask_high": (correction("mask_high"), ((1.0, 3.0, math.inf), (BELOW_ONE, 0.0, math.nan))),
    "eta_min": (discount("eta_min"), ((0.0, 0.5, 0.96), (-TINY, 0.96 + TINY, math.nan))),
    "eta_max": (discount("eta_max"), ((0.875, 1.0), (0.875 - TINY, ABOVE_ONE, math.nan))),
    "kl_target": (discount("kl_target"), POSITIVE),
    "half_life": (discount("half_life"), POSITIVE),
    "window": (discount("window"), ((1, 2), (0, -1, 1.5, True))),
    "eta": (discount("eta"), SHARE),
    "prior_strength": (BetaBaseline, NOT_NEGATIVE),
    "prior_mean": (lambda v: BetaBaseline(prior_mean=v), SHARE),
    "strength of first values": (lambda v: first_values(strength=v), POSITIVE),
    "smoothing of first values": (lambda v: first_values(smoothing=v), NOT_NEGATIVE),
    "trials": (lambda v: first_values(successes=[0], trials=[v]), ((1, 2.0), (0, -1, 1.5, *NOT_FINITE))),
    "successes": (lambda v: first_values(successes=[v]), ((0, 0.5, 2), (-TINY, 2.001, *NOT_FINITE))),
    "a reward": (lambda v: BetaBaseline().update(["a"], [v], 0.5), SHARE),
    "an eta of a visit": (lambda v: BetaBaseline().update(["a"], [1], v), SHARE),
    "init_rollouts": (method("init_rollouts"), ((0, 1), (-1, 1.0, True))),
    "init_strength": (method("init_strength"), ((None, *POSITIVE[0]), POSITIVE[1])),
    "init_smoothing": (method("init_smoothing"), NOT_NEGATIVE),
    "eps": (lambda v: advantages.grpo([1.0, 0.0], [0, 0], v), POSITIVE),
    "KL coefficient": (KLController, NOT_NEGATIVE),
    "adaptive KL coefficient": (lambda v: KLController(v, 0.1), POSITIVE),
    "KL target": (lambda v: KLController(0.1, v), ((None, *POSITIVE[0]), POSITIVE[1])),
    "KL horizon": (lambda v: KLController(0.1, 0.1, v), POSITIVE),
    "rollouts of a step": (lambda v: KLController(0.1, 0.1).observe(0.1, v), ((0, 1), (-1,))),
    "a saved KL coefficient": (
        lambda v: KLController(0.1, 0.1).load_state_dict({"version": 1, "coef": v}),
        NOT_NEGATIVE,
    ),
    "denominator": (lambda v: aggregate(X, v), POSITIVE),
    "constant_length": (lambda v: aggregation_denominator(TWO, "constant_length", v), ((1, 9), (0, -1))),
    "lengths": (lambda v: advantages.reinforce_pp([1, 0], [v, 1]), ((0, 1, 5), (-1, *NOT_FINITE))),
}


@pytest.mark.parametrize("name", RANGES)
def test_the_edges_are_taken_and_what_is_beyond_is_refused(name: str) -> None:
    call, (taken, refused) = RANGES[name]
    for value in taken:
        call(value)
    for value in refused:
        with pytest.raises(ValueError):
            call(value)
            pytest.fail(f"{name}={value} is taken")


def test_a_discount_of_one_needs_a_strength_of_its_own() -> None:
    """Evidence that never fades has no size that it tends to."""
    for settings in ({"eta": 1.0}, {"eta_min": 1.0, "eta_max": 1.0}):
        with pytest.raises(ValueError, match="init_strength must be given"):
            algorithms.create("mssr", init_rollouts=1, **settings)
        algorithms.create("mssr", init_rollouts=1, init_strength=2.0, **settings)
        without = algorithms.create("mssr", **settings)
        with pytest.raises(ValueError, match="init_strength must be given"):
            without.initialize(["a"], [1], [1])
    assert algorithms.create("mssr", eta=0.75).beta.init_strength == pytest.approx(4)  # type: ignore[attr-defined]
    assert algorithms.create("mssr").beta.init_strength == pytest.approx(8)  # type: ignore[attr-defined]


def test_shapes_that_do_not_fit_are_refused() -> None:
    baseline = BetaBaseline()
    for call in (
        lambda: baseline.update(["a"], [1, 0], 0.5),
        lambda: baseline.update(["a", "b"], [1, 0], [0.5]),
        lambda: baseline.update(["a", "b"], [1, 0], [[0.5, 0.5]]),
        lambda: first_values(successes=[1, 1]),
        lambda: first_values(trials=[1, 1]),
        lambda: advantages.single_rollout([], []),
        lambda: advantages.single_rollout(1.0, 0.5),
        lambda: advantages.single_rollout([[1.0]], [[0.5]]),
        lambda: advantages.reinforce_pp([1.0, 0.0], [1]),
        lambda: advantages.grpo([1.0, 0.0], [0]),
        lambda: per_token("penalties", [0.1], np.array([2])),
        lambda: per_token("penalties", [0.1, math.nan], np.array([2])),
    ):
        with pytest.raises(ValueError):
            call()
    assert len(baseline) == 0
    spo = algorithms.create("spo")
    for drifts in ([0.1], [0.1] * 3, [[0.1, 0.1]]):
        with pytest.raises(ValueError, match="the drift of each of 2 responses"):
            spo.observe(["a", "b"], [1, 0], drifts)


def test_groups_may_have_any_numbers() -> None:
    plain = advantages.grpo([1.0, 0.0, 0.5, 0.25], [0, 0, 1, 1])
    for groups in ([10**12, 10**12, 5, 5], [-1, -1, 2, 2], [4, 4, 3, 3]):
        np.testing.assert_array_equal(advantages.grpo([1.0, 0.0, 0.5, 0.25], groups), plain)
