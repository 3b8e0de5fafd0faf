"""The single-rollout methods: one response for each prompt against its own Beta baseline.

Sources: MVSR and MSSR, arXiv 2512.18215, which differ only in entropy shaping, done by the actor because
only it has the entropies; SPO, arXiv 2509.13232, whose memory fades with each prompt's own drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import check_weighting
from mssr.algorithms.base import Algorithm, Signal, check_batch, register, signal_metrics
from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.checks import check_choice, check_number, check_whole
from mssr.algorithms.discount import AdaptiveDiscount

KL_SOURCES = ("update", "reference", "last_visit")
_STRENGTH_NEEDED = "with a discount of 1 evidence never fades, so init_strength must be given"


@dataclass(kw_only=True, eq=False)
class SingleRollout(Algorithm):
    """D = r - v with v from before the step; A = (D - mean D)/(std D + eps) over the batch.

    After the step: eta from the KL between policies, then a <- eta*a + r, b <- eta*b + (1 - r).
    Rewards must be in [0, 1]. More than one response for each prompt works: each is a visit.
    """

    choices = ("beta", "batch_std")
    bounded_rewards = True

    prior_strength: float = 1.0
    prior_mean: float | None = None
    """These two are of `BetaBaseline`."""
    init_rollouts: int = 0
    """Responses for each prompt before training, from which its baseline starts; 0 for no such pass."""
    init_strength: float | None = None
    """Pseudo-counts that they weigh; None for what a long-trained prompt has, 1/(1 - eta_min), or
    1/(1 - eta) where eta is fixed."""
    init_smoothing: float = 0.5
    """c in the value (s + c)/(n + 2c) that s successes of n give."""
    eta: float | None = None
    """A fixed discount; None adapts it."""
    eta_min: float = 0.875
    eta_max: float = 0.96
    kl_target: float = 0.01
    window: int = 20
    """These four are of `AdaptiveDiscount`."""
    eta_rule: str = "monotone"
    """Its rule. "half_life" is for the drift of each prompt, so with "last_visit" only."""
    kl_source: str = "update"
    """Which KL `observe` is given. With "last_visit" eta is each response's own, without a window, and
    eta_max at a prompt's first visit."""
    half_life: float = 0.06
    """Of `AdaptiveDiscount`."""
    weighting: str = "sequence"
    """Mean and std over each "sequence" alike, or over each "token" (SPO++)."""
    eps: float = 1e-6
    """Added to the standard deviation of the advantages."""
    baseline: BetaBaseline = field(init=False, repr=False)
    discount: AdaptiveDiscount = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("eps", self.eps)
        check_weighting(self.weighting)
        check_choice("kl_source", self.kl_source, KL_SOURCES)
        self.discount = AdaptiveDiscount(
            self.eta_min,
            self.eta_max,
            self.kl_target,
            self.window,
            rule=self.eta_rule,
            half_life=self.half_life,
            eta=self.eta,
        )
        if self.eta_rule == "half_life" and self.kl_source != "last_visit":
            raise ValueError(
                "eta_rule 'half_life' follows the drift of each prompt:"
                f" it needs kl_source 'last_visit', not {self.kl_source!r}"
            )
        check_whole("init_rollouts", self.init_rollouts, 0)
        check_number("init_strength", self.init_strength, optional=True)
        check_number("init_smoothing", self.init_smoothing, ">= 0")
        slowest = self.eta_min if self.eta is None else self.eta
        if self.init_strength is None and slowest < 1:
            self.init_strength = 1 / (1 - slowest)
        if self.init_strength is None and self.init_rollouts:
            raise ValueError(_STRENGTH_NEEDED)
        self.baseline = BetaBaseline(self.prior_strength, self.prior_mean)
        self.divergence = "abs" if self.eta_rule == "half_life" else "k3"

    def advantages(self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Signal:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        self.baseline.check_rewards(prompt_ids, r)  # now, not after the actor's update
        values = self.baseline.values(prompt_ids)
        weights = tokens if self.weighting == "token" else None
        advantages = estimators.single_rollout(r, values, self.eps, weights)
        # The batch is normalised as one: either all rollouts lack a signal or none does.
        metrics = signal_metrics(advantages, not advantages.any(), tokens)
        metrics["baseline/unseen_fraction"] = self.baseline.unseen_fraction(prompt_ids)
        return advantages, metrics

    def observe(self, prompt_ids: Sequence[str], rewards: ArrayLike, kl: ArrayLike) -> None:
        each = self.kl_source == "last_visit"
        if np.shape(kl) != ((len(prompt_ids),) if each else ()):
            needed = f"the drift of each of {len(prompt_ids)} responses" if each else "one KL a step"
            raise ValueError(f"kl_source {self.kl_source!r} needs {needed}, not shape {np.shape(kl)}")
        if each:
            self.baseline.update(prompt_ids, rewards, self.discount.observe_each(kl))
        else:
            self.discount.observe(float(np.asarray(kl)))
            self.baseline.update(prompt_ids, rewards, self.discount.eta)

    def initialize(self, prompt_ids: Sequence[str], successes: ArrayLike, trials: ArrayLike) -> None:
        if self.init_strength is None:
            raise ValueError(_STRENGTH_NEEDED)
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


@register("spo")
@dataclass(kw_only=True, eq=False)
class SPO(SingleRollout):
    """Single-rollout training with a memory of each prompt's own, and prompts drawn by their uncertainty.

    eta = 2^(-D/half_life) clamped to [eta_min, eta_max], where D is the mean change of a log-prob in the
    prompt's previous response since it was given. Eight responses for each prompt start its baseline:
    a = 8(s + 1/2)/9 and b = 8(8 - s + 1/2)/9 for s successes.
    """

    default_sampler = "uncertainty"

    init_rollouts: int = 8
    eta_rule: str = "half_life"
    kl_source: str = "last_visit"
