"""GRPO: each response against the others of its prompt, in units of their spread.

Source: arXiv 2402.03300.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import FloatVector
from mssr.algorithms.base import Algorithm, check_batch, group_indices, signal_metrics
from mssr.algorithms.registry import register


@register("grpo")
class GRPO(Algorithm):
    """A = (r - mean_g)/(std_g + eps) with the unbiased std; zero where a prompt's scores are all equal.

    Args:
        eps: Added to the standard deviation. verl has 1e-6, TRL 1e-4.
    """

    default_n = 8
    min_n = 2

    def __init__(self, *, eps: float = 1e-6) -> None:
        estimators.check_eps(eps)
        self.eps = eps

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        groups = group_indices(prompt_ids)
        advantages = estimators.grpo(r, groups, self.eps)
        return advantages, signal_metrics(advantages, estimators.constant_groups(r, groups), tokens)
