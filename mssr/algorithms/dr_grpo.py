"""Dr. GRPO: GRPO without the divisions that favour easy prompts and long failures.

Source: arXiv 2503.20783.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import FloatVector
from mssr.algorithms.base import Algorithm, check_batch, group_indices, signal_metrics
from mssr.algorithms.registry import register


@register("dr_grpo")
class DrGRPO(Algorithm):
    """A = r - mean_g; zero where a prompt's scores are all equal.

    The loss is the sum over tokens divided by a constant length, so that a token counts the same
    whatever the length of its response.
    """

    default_n = 8
    min_n = 2
    aggregation = "constant_length"

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        groups = group_indices(prompt_ids)
        advantages = estimators.dr_grpo(r, groups)
        return advantages, signal_metrics(advantages, estimators.constant_groups(r, groups), tokens)
