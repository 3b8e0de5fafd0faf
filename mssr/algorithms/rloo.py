"""RLOO: each response against the mean of the others of its prompt. Source: arXiv 2402.14740."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import FloatVector
from mssr.algorithms.base import Algorithm, check_batch, group_indices, signal_metrics
from mssr.algorithms.registry import register


@register("rloo")
class RLOO(Algorithm):
    """A_i = r_i - mean of the others of its prompt; zero where a prompt's scores are all equal."""

    default_n = 8
    min_n = 2

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        groups = group_indices(prompt_ids)
        advantages = estimators.rloo(r, groups)
        return advantages, signal_metrics(advantages, estimators.constant_groups(r, groups), tokens)
