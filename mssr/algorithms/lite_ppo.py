"""Lite PPO: each response against those of its prompt, in units of the batch's spread.

Source: arXiv 2508.08221. A prompt whose responses hardly differ is not scaled up, as it is in GRPO.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import FloatVector
from mssr.algorithms.base import Algorithm, check_batch, group_indices, signal_metrics
from mssr.algorithms.registry import register


@register("lite_ppo")
class LitePPO(Algorithm):
    """A = (r - mean_g)/(std r + eps), std unbiased over the batch; the loss is a token mean.

    Zero where a prompt's scores are all equal.

    Args:
        weighting: The standard deviation is over each "sequence" alike, or over each "token".
        eps: Added to the standard deviation. TRL's ``scale_rewards="batch"`` has 1e-4.
    """

    default_n = 8
    min_n = 2
    aggregation = "token_mean"

    def __init__(self, *, weighting: str = "sequence", eps: float = 1e-6) -> None:
        estimators.check_weighting(weighting)
        estimators.check_eps(eps)
        self.weighting = weighting
        self.eps = eps

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        groups = group_indices(prompt_ids)
        advantages = estimators.lite_ppo(r, groups, self.eps, tokens if self.weighting == "token" else None)
        return advantages, signal_metrics(advantages, estimators.constant_groups(r, groups), tokens)
