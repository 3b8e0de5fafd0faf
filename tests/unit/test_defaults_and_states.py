"""The numbers that a user gets by saying nothing, from the papers; and states of checkpoints that exist."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from mssr import algorithms
from mssr.algorithms import AdaptiveDiscount, BetaBaseline, normalisations
from mssr.algorithms.correction import rollout_correction
from mssr.algorithms.entropy_control import EntropyController
from mssr.algorithms.kl_control import KLController
from mssr.algorithms.objective import MicroBatchLoss, Objective
from mssr.algorithms.policy_losses import get_loss, is_token_wise, loss_aggregation, loss_options
from mssr.algorithms.shaping import entropy_bonus

pytestmark = pytest.mark.unit

BETA = {"prior_strength": 1.0, "prior_mean": None, "init_strength": None, "init_smoothing": 0.5, "eta": None}
BETA |= {"eta_min": 0.875, "eta_max": 0.96, "kl_target": 0.01, "window": 20, "half_life": 0.06}
BETA |= {"weighting": "sequence", "eps": 1e-6}
MSSR = BETA | {"init_rollouts": 0, "eta_rule": "monotone", "kl_source": "update"}
METHODS: dict[str, tuple[dict[str, Any], int, int, str | None]] = {
    # options, responses for a prompt, the fewest, aggregation of its own
    "mssr": (MSSR, 1, 1, None),
    "mvsr": (MSSR, 1, 1, None),
    "spo": (BETA | {"init_rollouts": 8, "eta_rule": "half_life", "kl_source": "last_visit"}, 1, 1, None),
    "grpo": ({"eps": 1e-6}, 8, 2, None),
    "dr_grpo": ({}, 8, 2, "constant_length"),
    "rloo": ({}, 8, 2, None),
    "lite_ppo": ({"weighting": "sequence", "eps": 1e-6}, 8, 2, "token_mean"),
    "reinforce_pp": ({"weighting": "token", "eps": 1e-8}, 1, 1, None),
    "flash_reinforce": ({}, 1, 1, "sequence_mean"),
    "maxrl": ({"floor": 0.01}, 8, 2, None),
    "dbb": ({k: v for k, v in MSSR.items() if k not in ("eps", "weighting")} | {"floor": 0.01}, 8, 1, None),
    "reinforce_pp_baseline": ({"weighting": "token", "eps": 1e-8}, 8, 2, None),
}
LOSSES: dict[str, tuple[dict[str, Any], str | None, bool]] = {
    # options, aggregation of its own, whether every token stands for itself
    "ppo": ({"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}, None, True),
    "gspo": ({"clip_low": 3e-4, "clip_high": 4e-4}, "sequence_mean", False),
    "cispo": ({"clip_low": 1.0, "clip_high": 4.0}, None, True),
    "sapo": ({"tau_positive": 1.0, "tau_negative": 1.05}, None, True),
    "dis": ({"clip_low": 0.3, "clip_high": 5.0}, None, True),
    "flash_reinforce": ({"max_kl": 3e-3}, "sequence_mean", False),
}


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("name", METHODS)
def test_methods_start_from_the_numbers_of_their_papers(name: str) -> None:
    method = algorithms.get(name)
    found = algorithms.options(name), method.default_n, method.min_n, method.aggregation
    assert found == METHODS[name]
    algorithm = algorithms.create(name)
    assert algorithm.shapes_entropy == (name == "mssr")
    assert algorithm.default_sampler == ("uncertainty" if name == "spo" else "epochs")
    assert algorithm.bounded_rewards == (name in ("mssr", "mvsr", "spo", "dbb", "maxrl"))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_start_from_the_numbers_of_their_papers(name: str) -> None:
    assert (loss_options(name), loss_aggregation(name), is_token_wise(get_loss(name))) == LOSSES[name]


def test_the_parts_have_the_same_numbers() -> None:
    objective = Objective()
    assert defaults(entropy_bonus) == {"coef": 0.4, "divisor": 2.0}
    assert (objective.shaping_coef, objective.shaping_divisor, objective.shaping) == (0.4, 2.0, False)
    assert (objective.entropy_coef, objective.anchor_coef, objective.kl_estimator) == (0.0, 0.0, "k3")
    assert defaults(MicroBatchLoss) == {"kl_coef": 0.0, "entropy_alpha": 0.0}
    assert defaults(EntropyController) == {"target": None, "proportional": 1.0, "integral": 0.01}
    assert (objective.loss, objective.aggregation, objective.shaping_entropy) == (
        "ppo",
        "token_mean",
        "exact",
    )
    bounds = {"max_weight": 2.0, "mask_low": 0.5, "mask_high": 5.0}
    assert defaults(rollout_correction) == {"weight": "none", "mask": "none", **bounds}
    assert defaults(KLController) == {"target": None, "horizon": 10000}
    assert defaults(BetaBaseline) == {"prior_strength": 1.0, "prior_mean": None}
    names = ("eta_min", "eta_max", "kl_target", "window", "half_life", "eta")
    assert defaults(AdaptiveDiscount) == {name: BETA[name] for name in names} | {"rule": "monotone"}
    for scale in (normalisations.group_std, normalisations.reward_std, normalisations.batch_std):
        assert defaults(scale)["eps"] == 1e-6
    assert defaults(normalisations.whiten)["eps"] == 1e-8


def test_states_of_checkpoints_that_exist_are_read() -> None:
    """With their numbers of versions, so that a change of what is kept cannot go without a new one."""
    baseline = BetaBaseline()
    keys = baseline.keys(["a", "b"])
    sums = {"reward_sum": 3.0, "reward_count": 4}
    state = {"version": 2, "keys": keys, "counts": np.array([[0.1, 0.3], [2.0, 2.0]]), **sums}
    method = algorithms.create("mvsr")
    method.load_state_dict(
        {"version": 1, "baseline": state, "discount": {"version": 2, "kls": [0.002, 0.004], "mean": None}}
    )
    assert method.metrics() == pytest.approx({"baseline/mean": 0.375, "baseline/eta": 0.96 - 0.3 * 0.085})
    assert method.baseline.values(["b", "a", "new"]).tolist() == [0.5, 0.25, 0.75]
    again = method.state_dict()
    assert (again["version"], again["baseline"]["version"], again["discount"]["version"]) == (1, 2, 2)
    controller = KLController(0.1, target=0.01)
    controller.load_state_dict({"version": 1, "coef": 0.3})
    assert controller.coef == 0.3 and controller.state_dict()["version"] == 1
