"""REINFORCE++: rewards whitened over all tokens of the batch; and its form with a group baseline.

Source: arXiv 2501.03262.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import Floats, check_weighting
from mssr.algorithms.base import Algorithm, Signal, check_batch, group_indices, register, signal_metrics
from mssr.algorithms.checks import check_number


@register("reinforce_pp")
@dataclass(kw_only=True, eq=False)
class ReinforcePP(Algorithm):
    """A = (G - mu)/sqrt(var + eps), mu and var over all tokens; G = r with KL in the loss.

    With KL in the reward, G_t is r less the penalties from token t on, as in the method's first form.
    """

    choices = ("none", "whiten")

    weighting: str = "token"
    """Each "token" counts the same in mu and var, or each "sequence" that has a token."""
    eps: float = 1e-8
    """Added to the variance. verl has 1e-8."""

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        check_number("eps", self.eps)

    def advantages(self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Signal:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        returns, constant = self._returns(prompt_ids, r)
        weights = tokens if self.weighting == "token" else np.sign(tokens)
        advantages = estimators.reinforce_pp(returns, weights, self.eps)
        return advantages, signal_metrics(advantages, constant | (not advantages.any()), tokens)

    def token_advantages(
        self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike, token_penalties: ArrayLike
    ) -> Signal:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        returns, constant = self._returns(prompt_ids, r)
        to_go = estimators.returns_to_go(returns, tokens, token_penalties)
        advantages = estimators.whiten(to_go, tokens, self.eps, self.weighting)
        return advantages, signal_metrics(advantages, constant | (not advantages.any()), tokens)

    def _returns(self, prompt_ids: Sequence[str], rewards: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        """(B,) returns before any penalty, and (B,) True for those that say nothing about their answer."""
        return rewards, np.zeros(len(rewards), bool)


@register("reinforce_pp_baseline")
class ReinforcePPBaseline(ReinforcePP):
    """`ReinforcePP` of r - mean_g, the response's reward against the mean of its prompt's.

    A rollout counts as degenerate where its prompt's rewards are all equal: the little that whitening
    or a penalty gives it says nothing about its answer.
    """

    choices = ("group_mean", "whiten")
    default_n = 8
    min_n = 2

    def _returns(self, prompt_ids: Sequence[str], rewards: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        groups = group_indices(prompt_ids)
        centred = estimators.centred(rewards, groups, "REINFORCE++-baseline")
        return centred, estimators.constant_groups(rewards, groups)
