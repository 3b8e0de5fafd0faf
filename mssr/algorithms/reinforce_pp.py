"""REINFORCE++: scores whitened over all tokens of the batch; and its form with a group baseline.

Source: arXiv 2501.03262.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import FloatVector
from mssr.algorithms.base import Algorithm, check_batch, group_indices, signal_metrics
from mssr.algorithms.registry import register


@register("reinforce_pp")
class ReinforcePP(Algorithm):
    """A = (G - mu)/sqrt(var + eps), mu and var over all tokens; G = r with KL in the loss.

    With KL in the reward, G_t is r less the penalties from token t on, as in the method's first form.

    Args:
        weighting: Each "token" counts the same in mu and var, or each "sequence" that has a token.
        eps: Added to the variance. verl has 1e-8.
    """

    token_level = True

    def __init__(self, *, weighting: str = "token", eps: float = 1e-8) -> None:
        estimators.check_weighting(weighting)
        estimators.check_eps(eps)
        self.weighting = weighting
        self.eps = eps

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        advantages = estimators.reinforce_pp(r, self._weights(tokens), self.eps)
        return advantages, signal_metrics(advantages, not advantages.any(), tokens)

    def token_advantages(
        self,
        prompt_ids: Sequence[str],
        rewards: npt.ArrayLike,
        lengths: npt.ArrayLike,
        token_penalties: npt.ArrayLike,
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        returns = estimators.returns_to_go(r, tokens, token_penalties)
        advantages = estimators.whiten(returns, tokens, self.eps, self.weighting)
        return advantages, signal_metrics(advantages, not advantages.any(), tokens)

    def _weights(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return lengths if self.weighting == "token" else np.sign(lengths)


@register("reinforce_pp_baseline")
class ReinforcePPBaseline(ReinforcePP):
    """`ReinforcePP` of r - mean_g, the response's score against the mean of its prompt's.

    A rollout counts as degenerate where its prompt's scores are all equal: the little that whitening
    or a penalty gives it says nothing about its answer.

    Args: as of `ReinforcePP`.
    """

    default_n = 8
    min_n = 2

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        groups = group_indices(prompt_ids)
        advantages = estimators.reinforce_pp_baseline(r, groups, self._weights(tokens), self.eps)
        return advantages, signal_metrics(advantages, self._degenerate(r, groups, advantages), tokens)

    def token_advantages(
        self,
        prompt_ids: Sequence[str],
        rewards: npt.ArrayLike,
        lengths: npt.ArrayLike,
        token_penalties: npt.ArrayLike,
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        groups = group_indices(prompt_ids)
        returns = estimators.returns_to_go(
            estimators.centred(r, groups, "REINFORCE++-baseline"), tokens, token_penalties
        )
        advantages = estimators.whiten(returns, tokens, self.eps, self.weighting)
        return advantages, signal_metrics(advantages, self._degenerate(r, groups, advantages), tokens)

    @staticmethod
    def _degenerate(
        rewards: npt.NDArray[np.float64], groups: npt.NDArray[np.int64], advantages: FloatVector
    ) -> npt.NDArray[np.bool_]:
        return estimators.constant_groups(rewards, groups) | (not advantages.any())
