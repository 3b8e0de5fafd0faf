"""REINFORCE++: scores whitened over all tokens of the batch. Source: arXiv 2501.03262."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import FloatVector
from mssr.algorithms.base import Algorithm, check_batch, signal_metrics
from mssr.algorithms.registry import register


@register("reinforce_pp")
class ReinforcePP(Algorithm):
    """A = (r - mu)/sqrt(var + eps), mu and var weighted by response length. KL goes into the loss.

    Args:
        eps: Added to the variance. verl has 1e-8.
    """

    def __init__(self, *, eps: float = 1e-8) -> None:
        estimators.reinforce_pp([0.0], [1], eps)  # an eps out of range is refused now, not at step 1
        self.eps = eps

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        check_batch(prompt_ids, rewards, lengths)
        advantages = estimators.reinforce_pp(rewards, lengths, self.eps)
        # An empty response has no token that could learn, whatever its score.
        empty = np.asarray(lengths) == 0
        return advantages, signal_metrics(
            advantages, empty | estimators.constant_over_tokens(rewards, lengths)
        )
