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

_KL_SOURCES = ("update", "reference", "last_visit")


class SingleRollout(Algorithm):
    """D = r - v with v from before the step; A = (D - mean D)/(std D + eps) over the batch.

    After the step: eta from the KL between policies, then a <- eta*a + r, b <- eta*b + (1 - r).
    Rewards must be in [0, 1]. More than one response for each prompt works: each is a visit.

    Args:
        prior_strength, prior_mean: Of `BetaBaseline`.
        init_rollouts: Responses for each prompt before training, from which its baseline starts; 0 for
            no such pass.
        init_strength: Pseudo-counts that they weigh; None for what a long-trained prompt has,
            1/(1 - eta_min), or 1/(1 - eta) where eta is fixed.
        init_smoothing: c in the value (s + c)/(n + 2c) that s successes of n give.
        eta: A fixed discount; None adapts it.
        eta_min, eta_max, kl_target, window, half_life: Of `AdaptiveDiscount`.
        eta_rule: Its rule. "half_life" is for the drift of each prompt, so with "last_visit" only.
        kl_source: Which KL `observe` is given. With "last_visit" eta is each response's own, without a
            window, and eta_max at a prompt's first visit.
        weighting: Mean and std over each "sequence" alike, or over each "token" (SPO++).
        eps: Added to the standard deviation of the advantages.

    Raises:
        ValueError: An option is out of its range, or two do not go together.
    """

    bounded_rewards = True
    baseline: BetaBaseline

    def __init__(
        self,
        *,
        prior_strength: float = 1.0,
        prior_mean: float | None = None,
        init_rollouts: int = 0,
        init_strength: float | None = None,
        init_smoothing: float = 0.5,
        eta: float | None = None,
        eta_min: float = 0.875,
        eta_max: float = 0.96,
        kl_target: float = 0.01,
        window: int = 20,
        eta_rule: str = "monotone",
        kl_source: str = "update",
        half_life: float = 0.06,
        weighting: str = "sequence",
        eps: float = 1e-6,
    ) -> None:
        estimators.check_eps(eps)
        estimators.check_weighting(weighting)
        if kl_source not in _KL_SOURCES:
            raise ValueError(f"kl_source must be one of {', '.join(_KL_SOURCES)}, not {kl_source!r}")
        self.discount = AdaptiveDiscount(
            eta_min, eta_max, kl_target, window, rule=eta_rule, half_life=half_life, eta=eta
        )
        if eta_rule == "half_life" and kl_source != "last_visit":
            raise ValueError(
                "eta_rule 'half_life' follows the drift of each prompt:"
                f" it needs kl_source 'last_visit', not {kl_source!r}"
            )
        if isinstance(init_rollouts, bool) or not isinstance(init_rollouts, int) or init_rollouts < 0:
            raise ValueError(f"init_rollouts must be a whole number >= 0, not {init_rollouts!r}")
        if init_strength is not None and not (np.isfinite(init_strength) and init_strength > 0):
            raise ValueError(f"init_strength must be a finite number > 0 or None, not {init_strength}")
        if not (np.isfinite(init_smoothing) and init_smoothing >= 0):
            raise ValueError(f"init_smoothing must be a finite number >= 0, not {init_smoothing}")
        slowest = eta_min if eta is None else eta
        if init_strength is None and init_rollouts and slowest == 1:
            raise ValueError("with a discount of 1 evidence never fades, so init_strength must be given")
        self.baseline = BetaBaseline(prior_strength, prior_mean)
        self.init_rollouts = init_rollouts
        self.init_strength = 1 / (1 - slowest) if init_strength is None and slowest < 1 else init_strength
        self.init_smoothing = init_smoothing
        self.kl_source = kl_source
        self.divergence = "abs" if eta_rule == "half_life" else "k3"
        self.weighting = weighting
        self.eps = eps

    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        self.baseline.check_rewards(prompt_ids, r)  # now, not after the actor's update
        keys = self.baseline.keys(prompt_ids)
        advantages = estimators.single_rollout(
            r, self.baseline.values(keys), self.eps, tokens if self.weighting == "token" else None
        )
        # The batch is normalised as one: either all rollouts lack a signal or none does.
        metrics = signal_metrics(advantages, not advantages.any(), tokens)
        metrics["baseline/unseen_fraction"] = self.baseline.unseen_fraction(keys)
        return advantages, metrics

    def observe(self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, kl: float | npt.ArrayLike) -> None:
        if self.kl_source == "last_visit":
            if np.shape(kl) != (len(prompt_ids),):
                raise ValueError(
                    f"kl_source 'last_visit' needs the drift of each of {len(prompt_ids)} responses,"
                    f" not shape {np.shape(kl)}"
                )
            self.baseline.update(prompt_ids, rewards, self.discount.observe_each(kl))
        else:
            if np.ndim(kl):
                raise ValueError(
                    f"kl_source {self.kl_source!r} needs one KL a step, not shape {np.shape(kl)}"
                )
            self.discount.observe(float(np.asarray(kl)))
            self.baseline.update(prompt_ids, rewards, self.discount.eta)

    def initialize(self, prompt_ids: Sequence[str], successes: npt.ArrayLike, trials: npt.ArrayLike) -> None:
        if self.init_strength is None:
            raise ValueError("with a discount of 1 evidence never fades, so init_strength must be given")
        self.baseline.initialize(prompt_ids, successes, trials, self.init_strength, self.init_smoothing)

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
