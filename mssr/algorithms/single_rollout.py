"""MVSR and MSSR: one response for each prompt against its own Beta baseline.

Source: arXiv 2512.18215. They differ only in entropy shaping, which the actor does because only it has
the entropies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import FloatVector
from mssr.algorithms.base import Algorithm, check_batch, signal_metrics
from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.discount import AdaptiveDiscount
from mssr.algorithms.registry import register


class SingleRollout(Algorithm):
    """D = r - v with v from before the step; A = (D - mean D)/(std D + eps) over the batch.

    After the step: eta from the KL between policies, then a <- eta*a + r, b <- eta*b + (1 - r).
    Rewards must be in [0, 1]. More than one response for each prompt works: each is a visit.

    Args:
        prior_strength, prior_mean: Of `BetaBaseline`.
        eta_min, eta_max, kl_target, window: Of `AdaptiveDiscount`.
        eps: Added to the standard deviation of the advantages.
    """

    def __init__(
        self,
        *,
        prior_strength: float = 1.0,
        prior_mean: float | None = None,
        eta_min: float = 0.875,
        eta_max: float = 0.96,
        kl_target: float = 0.01,
        window: int = 20,
        eps: float = 1e-6,
    ) -> None:
        estimators.single_rollout([0.0], [0.0], eps)  # an eps out of range is refused now, not at step 1
        self.baseline = BetaBaseline(prior_strength, prior_mean)
        self.discount = AdaptiveDiscount(eta_min, eta_max, kl_target, window)
        self.eps = eps

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        check_batch(prompt_ids, rewards, lengths)
        advantages = estimators.single_rollout(rewards, self.baseline.values(prompt_ids), self.eps)
        # The batch is normalised as one: either all rollouts lack a signal or none does.
        metrics = signal_metrics(advantages, degenerate=float(not np.any(advantages)))
        metrics["baseline/unseen_fraction"] = self.baseline.unseen_fraction(prompt_ids)
        return advantages, metrics

    def observe(self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, kl_update: float) -> None:
        self.discount.observe(kl_update)
        self.baseline.update(prompt_ids, rewards, self.discount.eta)

    def metrics(self) -> dict[str, float]:
        return {"baseline/eta": self.discount.eta, "baseline/mean": self.baseline.mean()}

    def _parts(self) -> dict[str, Any]:
        return {"baseline": self.baseline, "discount": self.discount}


@register("mvsr")
class MVSR(SingleRollout):
    """Single-rollout training without entropy shaping."""


@register("mssr")
class MSSR(SingleRollout):
    """Single-rollout training with entropy-shaped advantages."""

    shapes_entropy = True
