"""A method is a baseline and a normalisation: D = r - b, then A = normalise(D). Any two go together.

Formulas and sources are in `baselines` and `normalisations`. `choose` gives a named method other choices.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mssr.algorithms import advantages as estimators
from mssr.algorithms import baselines
from mssr.algorithms.advantages import Floats, FloatVector, Ints, check_weighting
from mssr.algorithms.base import (
    ALGORITHMS,
    Algorithm,
    Signal,
    check_batch,
    group_indices,
    register,
    signal_metrics,
)
from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.checks import check_number
from mssr.algorithms.normalisations import NORMALISATIONS, normalise
from mssr.algorithms.plugins import is_spec
from mssr.algorithms.single_rollout import SingleRollout

BASELINES = (*baselines.STATELESS, "beta")
_OF_A_GROUP = ("group_mean", "leave_one_out")
_SHARES = ("mean", "bernoulli_std")  # normalisations that take b as a chance of success


@dataclass(kw_only=True, eq=False)
class Combined(Algorithm):
    """D = r - b; A = normalise(D), as `choices` say. A class from a file may give its own `difference`."""

    choices: ClassVar[tuple[str, str]] = ("none", "none")
    shrinkage: ClassVar[bool] = False

    eps: float = 1e-6
    weighting: str = "sequence"
    floor: float = 0.01
    """Of the normalisations that read them."""

    def __post_init__(self) -> None:
        check_number("eps", self.eps)
        check_weighting(self.weighting)
        check_number("floor", self.floor)
        if self.floor >= 0.5:
            raise ValueError(f"floor must be below 0.5, not {self.floor}")

    def difference(self, prompt_ids: Sequence[str], rewards: Floats, groups: Ints) -> Floats:
        """(B,) float64 D, of (B,) rewards and groups as of `group_indices`."""
        d = baselines.difference(self.choices[0], rewards, groups, self.name)
        return baselines.shrink_groups(rewards, rewards - d, groups) if self.shrinkage else d

    def advantages(self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Signal:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        if self.bounded_rewards:
            BetaBaseline().check_rewards(prompt_ids, r)
        groups = group_indices(prompt_ids)
        estimators.constant_groups(r, groups)  # refuses an empty batch and what is not finite
        d = self.difference(prompt_ids, r, groups)
        a = normalise(self.choices[1], d, r, groups, tokens, self.eps, self.weighting, self.floor)
        return a, self._metrics(a, r, groups, tokens)

    def token_advantages(
        self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike, token_penalties: ArrayLike
    ) -> Signal:
        if self.choices[1] != "whiten" or self.bounded_rewards:
            return super().token_advantages(prompt_ids, rewards, lengths, token_penalties)
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        groups = group_indices(prompt_ids)
        to_go = estimators.returns_to_go(self.difference(prompt_ids, r, groups), tokens, token_penalties)
        a = estimators.whiten(to_go, tokens, self.eps, self.weighting)
        return a, self._metrics(a, r, groups, tokens)

    def _metrics(self, a: FloatVector, r: Floats, groups: Ints, tokens: Ints) -> dict[str, float]:
        """Those of every method. A batch that is scaled as one lacks a signal as one."""
        baseline, normalisation = self.choices
        compared = baseline in _OF_A_GROUP and not self.shrinkage
        constant = compared & estimators.constant_groups(r, groups)
        if normalisation in ("batch_std", "whiten"):
            return signal_metrics(a, constant | (not a.any()), tokens)
        return signal_metrics(a, constant if compared else a == 0, tokens)


@dataclass(kw_only=True, eq=False)
class BetaCombined(Combined, SingleRollout):
    """`Combined` with the Beta baseline of `SingleRollout`, its options and its state."""

    choices: ClassVar[tuple[str, str]] = ("beta", "batch_std")
    posterior: ClassVar[bool] = False
    """Whether the value of a prompt with several responses in the batch counts these, once discounted."""

    def __post_init__(self) -> None:
        Combined.__post_init__(self)
        SingleRollout.__post_init__(self)
        if self.posterior and self.kl_source == "last_visit":
            raise ValueError("kl_source 'last_visit' has a discount for each response, dbb one for a group")

    def difference(self, prompt_ids: Sequence[str], rewards: Floats, groups: Ints) -> Floats:
        v = self.baseline.values(prompt_ids).astype(np.float64)
        a, b = self.baseline.counts(prompt_ids).T
        if self.posterior:
            size, successes = np.bincount(groups)[groups], np.bincount(groups, rewards)[groups]
            eta = self.discount.eta
            after = (eta * a + successes) / (eta * (a + b) + size)
            v = np.where(size > 1, after, v)
        return rewards - (baselines.shrink_values(rewards, v, a + b) if self.shrinkage else v)

    def advantages(self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Signal:
        a, metrics = super().advantages(prompt_ids, rewards, lengths)
        return a, metrics | {"baseline/unseen_fraction": self.baseline.unseen_fraction(prompt_ids)}

    def observe(self, prompt_ids: Sequence[str], rewards: ArrayLike, kl: ArrayLike) -> None:
        if not self.posterior:
            return super().observe(prompt_ids, rewards, kl)
        self.discount.observe(float(np.asarray(kl)))
        first = np.zeros(len(prompt_ids), bool)
        first[np.unique(group_indices(prompt_ids), return_index=True)[1]] = True
        self.baseline.update(prompt_ids, rewards, np.where(first, self.discount.eta, 1.0))


def _compose(method: type[Algorithm], baseline: str, normalisation: str, shrinkage: bool) -> type[Algorithm]:
    """The class of a method with these choices; its options are those that they read."""
    _check_choices(baseline, normalisation, shrinkage)
    beta = baseline == "beta"
    base = BetaCombined if beta else Combined
    # SPO has other defaults than the baseline that it is made of.
    own = {} if issubclass(method, Combined) else inspect.signature(method).parameters
    read = dict(NORMALISATIONS[normalisation])
    known = inspect.signature(base).parameters
    keep = set(known) - {"eps", "weighting", "floor"} | set(read)
    defaults = {
        k: own[k].default if k in own and (k not in read or method.choices[1:] == (normalisation,)) else
        read.get(k, known[k].default)
        for k in known
        if k in keep
    }  # fmt: skip
    least = 2 if baseline in _OF_A_GROUP or normalisation == "group_std" else 1
    facts: dict[str, Any] = {
        "choices": (baseline, normalisation),
        "shrinkage": shrinkage,
        "min_n": least,
        "default_n": 8 if least > method.default_n else method.default_n,
        "bounded_rewards": beta or normalisation in _SHARES,
        "default_sampler": method.default_sampler if beta else "epochs",
        "__doc__": method.__doc__,
        "__module__": __name__,
    }
    for fact in ("name", "shapes_entropy", "aggregation", "default_loss", "posterior"):
        if hasattr(method, fact):
            facts[fact] = getattr(method, fact)
    fields = [(k, object, field(default=v)) for k, v in defaults.items()]
    made = make_dataclass(method.__name__, fields, bases=(base,), namespace=facts, kw_only=True, eq=False)
    kind = inspect.Parameter.KEYWORD_ONLY
    made.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(k, kind, default=v) for k, v in defaults.items() if v is not MISSING]
    )
    return made


_composed = functools.lru_cache(maxsize=256)(_compose)


def _check_choices(baseline: str, normalisation: str, shrinkage: bool) -> None:
    for key, value, known in (
        ("baseline", baseline, BASELINES),
        ("normalisation", normalisation, tuple(NORMALISATIONS)),
    ):
        if value not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, not {value!r}")
    if normalisation in _SHARES and baseline == "none":
        raise ValueError(f"normalisation {normalisation!r} divides by the baseline, and baseline is none")
    if shrinkage and baseline not in (*_OF_A_GROUP, "beta"):
        raise ValueError(f"shrinkage is of the baseline of each prompt, and baseline {baseline!r} has none")
    if normalisation == "bernoulli_std" and baseline == "leave_one_out":
        raise ValueError("normalisation 'bernoulli_std' needs a baseline that is one chance for a prompt")


def choose(
    name: str,
    *,
    baseline: str | None = None,
    normalisation: str | None = None,
    shrinkage: bool | None = None,
) -> type[Algorithm]:
    """The class of the method ``name``, with other choices than its own where they are given.

    Raises:
        ValueError: There is no such choice, two do not go together, or the method is from a file.
    """
    method = ALGORITHMS.get(name)
    if baseline is None and normalisation is None and shrinkage is None:
        return method
    if is_spec(name) or not method.choices:
        raise ValueError(f"{name} has an estimator of its own: baseline and normalisation must stay null")
    own = (*method.choices, bool(getattr(method, "shrinkage", False)))
    asked = (baseline, normalisation, shrinkage)
    chosen = tuple(o if a is None else a for o, a in zip(own, asked, strict=True))
    return method if chosen == own else _composed(method, *chosen)


def create(name: str, choices: dict[str, Any] | None = None, /, **settings: Any) -> Algorithm:
    """Build an algorithm, for example ``create("mssr", kl_target=0.02)``; ``choices`` are of `choose`."""
    algorithm: Algorithm = ALGORITHMS.bind(name, settings, choose(name, **(choices or {})))()
    return algorithm


def options(name: str, choices: dict[str, Any] | None = None, /) -> dict[str, Any]:
    """The options of a method with these choices, and their defaults."""
    return {k: p.default for k, p in inspect.signature(choose(name, **(choices or {}))).parameters.items()}


def method(name: str) -> Callable[[type[Combined]], type[Algorithm]]:
    """Decorator: register what `choices` and the other facts of a class say as a method."""
    return lambda cls: register(name)(_compose(cls, *cls.choices, False))  # type: ignore[no-any-return]


@method("grpo")
class GRPO(Combined):
    """A = (r - mean_g)/(std_g + eps) with the unbiased std. arXiv 2402.03300. TRL's eps is 1e-4."""

    choices = ("group_mean", "group_std")


@method("dr_grpo")
class DrGRPO(Combined):
    """A = r - mean_g: GRPO without the divisions that favour easy prompts and long failures.

    The loss is the sum over tokens divided by a constant length, so that a token counts the same
    whatever the length of its response. arXiv 2503.20783.
    """

    choices = ("group_mean", "none")
    aggregation = "constant_length"


@method("rloo")
class RLOO(Combined):
    """A_i = r_i - mean of the others of its prompt. arXiv 2402.14740."""

    choices = ("leave_one_out", "none")


@method("lite_ppo")
class LitePPO(Combined):
    """A = (r - mean_g)/(std r + eps), std unbiased over the batch; the loss is a token mean.

    A prompt whose responses hardly differ is not scaled up, as it is in GRPO. arXiv 2508.08221.
    """

    choices = ("group_mean", "reward_std")
    aggregation = "token_mean"


@method("reinforce_pp")
class ReinforcePP(Combined):
    """A = (G - mu)/sqrt(var + eps), mu and var over all tokens; G = r with KL in the loss.

    With KL in the reward, G_t is r less the penalties from token t on. arXiv 2501.03262.
    """

    choices = ("none", "whiten")


@method("reinforce_pp_baseline")
class ReinforcePPBaseline(Combined):
    """`ReinforcePP` of r - mean_g. Degenerate where a prompt's rewards are equal: what whitening or a
    penalty gives such a rollout says nothing about its answer. arXiv 2501.03262.
    """

    choices = ("group_mean", "whiten")


@method("flash_reinforce")
class FlashREINFORCE(Combined):
    """A = r - mean r of the batch, without whitening; loss and gate are those of the loss of this name.

    FlashREINFORCE (Zhang), section "Objective" in verl's docs/algo of 10/05/2026 and the estimator of molt.
    """

    choices = ("batch_mean", "none")
    default_loss = "flash_reinforce"
    aggregation = "sequence_mean"


@method("maxrl")
class MaxRL(Combined):
    """A = (r - mean_g)/mean_g: the gradient of the truncated log-likelihood. arXiv 2602.02710.

    A group without a success has r = mean = 0, so A = 0.
    """

    choices = ("group_mean", "mean")


@method("dbb")
class DBB(BetaCombined):
    """A = (r - v)/sqrt(v(1 - v)), v a discounted Beta-Bernoulli estimate. arXiv 2603.18444.

    With several responses v counts them: (eta*a + s)/(eta*(a + b) + n), so that a group of equal scores
    has a signal; with one it is a/(a + b) from before the step, or else r were in its own baseline.
    """

    choices = ("beta", "bernoulli_std")
    default_n = 8
    posterior = True
