"""What is subtracted from a reward: D = r - b, (B,) float64. Four without a state, and `Beta`.

Shrinkage (arXiv 2511.03710) moves the baseline of a prompt towards that of the others by the share
that noise has in how the prompts differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.checks import check_choice, check_number, check_whole
from mssr.algorithms.discount import AdaptiveDiscount
from mssr.algorithms.step import Floats, Step, group_indices

KL_SOURCES = ("update", "reference", "last_visit")
_STRENGTH_NEEDED = "with a discount of 1 evidence never fades, so init_strength must be given"


def none(step: Step) -> Floats:
    """D = r."""
    return step.rewards


def batch_mean(step: Step) -> Floats:
    """D = r - mean of the batch."""
    return replace(step, prompt_ids=[""] * len(step.rewards)).centred


def group_mean(step: Step) -> Floats:
    """D = r - mean of the responses to the prompt."""
    return step.centred


def leave_one_out(step: Step) -> Floats:
    """D = r - mean of the others of the prompt = n/(n - 1) * (r - mean_g). RLOO, arXiv 2402.14740."""
    return (step.size / (step.size - 1))[step.groups] * step.centred


STATELESS = {f.__name__: f for f in (none, batch_mean, group_mean, leave_one_out)}


@dataclass(eq=False)
class Beta:
    """D = r - v, v the mean of each prompt's Beta posterior from before the step. Rewards are in [0, 1].

    After the step: eta from the KL between policies, then a <- eta*a + r, b <- eta*b + (1 - r). More than
    one response for each prompt works: each is a visit. The keywords are the options.

    Sources: MVSR and MSSR, arXiv 2512.18215; SPO, arXiv 2509.13232.
    """

    posterior: bool = False
    """v of a prompt with several responses counts these, and the prompt is discounted once: DBB, arXiv
    2603.18444v1, eq. 11 and 12."""
    shrinkage: bool = False
    """v is that of `shrink_values`."""
    _: KW_ONLY
    prior_strength: float = 1.0
    prior_mean: float | None = None
    """These two are of `BetaBaseline`, the `tracker`."""
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

    def __post_init__(self) -> None:
        check_choice("kl_source", self.kl_source, KL_SOURCES)
        each = self.kl_source == "last_visit"
        self.discount = AdaptiveDiscount(
            self.eta_min,
            self.eta_max,
            self.kl_target,
            self.window,
            rule=self.eta_rule,
            half_life=self.half_life,
            eta=self.eta,
        )
        if self.eta_rule == "half_life" and not each:
            raise ValueError(
                "eta_rule 'half_life' follows the drift of each prompt:"
                f" it needs kl_source 'last_visit', not {self.kl_source!r}"
            )
        if self.posterior and each:
            raise ValueError("kl_source 'last_visit' has a discount for each response, dbb one for a group")
        check_whole("init_rollouts", self.init_rollouts, 0)
        check_number("init_strength", self.init_strength, optional=True)
        check_number("init_smoothing", self.init_smoothing, ">= 0")
        slowest = self.eta_min if self.eta is None else self.eta
        if self.init_strength is None and slowest < 1:
            self.init_strength = 1 / (1 - slowest)
        if self.init_strength is None and self.init_rollouts:
            raise ValueError(_STRENGTH_NEEDED)
        self.tracker = BetaBaseline(self.prior_strength, self.prior_mean)
        self.divergence: Literal["k3", "abs"] = "abs" if self.eta_rule == "half_life" else "k3"

    def difference(self, step: Step) -> Floats:
        v = self.tracker.values(step.prompt_ids).astype(np.float64)
        if not (self.posterior or self.shrinkage):
            return step.rewards - v
        a, b = self.tracker.counts(step.prompt_ids).T
        if self.posterior:
            eta, size = self.discount.eta, step.size[step.groups]
            successes = np.bincount(step.groups, step.rewards)[step.groups]
            v = np.where(size > 1, (eta * a + successes) / (eta * (a + b) + size), v)
        return step.rewards - (shrink_values(step.rewards, v, a + b) if self.shrinkage else v)

    def observe(self, prompt_ids: Sequence[str], rewards: ArrayLike, kl: ArrayLike) -> None:
        each = self.kl_source == "last_visit"
        if np.shape(kl) != ((len(prompt_ids),) if each else ()):
            needed = f"the drift of each of {len(prompt_ids)} responses" if each else "one KL a step"
            raise ValueError(f"kl_source {self.kl_source!r} needs {needed}, not shape {np.shape(kl)}")
        if each:
            eta: ArrayLike = self.discount.observe_each(kl)
        else:
            self.discount.observe(float(np.asarray(kl)))
            eta = self.discount.eta
        if self.posterior:
            first = np.unique(group_indices(prompt_ids), return_index=True)[1]
            eta = np.where(np.isin(np.arange(len(prompt_ids)), first), eta, 1.0)
        self.tracker.update(prompt_ids, rewards, eta)

    def initialize(self, prompt_ids: Sequence[str], successes: ArrayLike, trials: ArrayLike) -> None:
        if self.init_strength is None:
            raise ValueError(_STRENGTH_NEEDED)
        self.tracker.initialize(prompt_ids, successes, trials, self.init_strength, self.init_smoothing)


BASELINES: dict[str, Callable[..., object]] = {**STATELESS, "beta": Beta}


def shrink_groups(d: Floats, step: Step) -> Floats:
    """(B,) r - ((1 - lam_g)*b + lam_g*m_g), with b = r - d and m_g the mean of the other prompts' means.

    lam_g = (G - 1)/G * v_g/(v_g + s_g), over the other prompts: v_g is the mean of std^2/n, std unbiased, and
    s_g the mean of (mean_k - m_g)^2. Own rewards enter neither, so leave_one_out stays unbiased. 0 where the
    others have no noise, or there are none. arXiv 2511.03710v1, eq. 13 to 16, whose b is leave_one_out.
    """
    r, groups, size = step.rewards, step.groups, step.size
    others = len(size) - 1
    if not others:
        return d
    mean = np.bincount(groups, r) / size
    noise = np.bincount(groups, (r - mean[groups]) ** 2) / (size - 1) / size
    v = (noise.sum() - noise) / others
    m = (mean.sum() - mean) / others
    from_all = (mean - mean.mean()) ** 2
    s = np.maximum(from_all.sum() - from_all * len(size) / others, 0) / others
    lam = (others / len(size) * _share(v, v + s))[groups]
    return r - ((1 - lam) * (r - d) + lam * m[groups])


def shrink_values(rewards: Floats, values: Floats, evidence: Floats) -> Floats:
    """(B,) (1 - lam)*v + lam*m for one response a prompt: m is the mean of the other rewards.

    lam = noise/(noise + var v), noise = v(1 - v)/(a + b + 1), the variance of Beta(a, b), and var v the
    unbiased variance over the batch; ``evidence`` is (B,) a + b. Ours: the source has groups only.
    """
    if len(rewards) < 2:
        return values
    noise = values * (1 - values) / (evidence + 1)
    lam = _share(noise, noise + values.var(ddof=1))
    return (1 - lam) * values + lam * (rewards.sum() - rewards) / (len(rewards) - 1)


def _share(part: Floats, total: Floats) -> Floats:
    """part/total; 0 where there is no part."""
    return np.divide(part, total, out=np.zeros_like(part), where=part > 0)
