"""The methods by name: D = r - b, then A = normalise(D). Any baseline goes with any normalisation.

The formulas are in `baselines` and `normalisations`; docs/algorithms.md has them in one place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from mssr.algorithms import normalisations
from mssr.algorithms.base import Algorithm, Signal
from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.baselines import BASELINES, STATELESS, Beta, shrink_groups
from mssr.algorithms.checks import check_choice
from mssr.algorithms.normalisations import NORMALISATIONS
from mssr.algorithms.plugins import Registry
from mssr.algorithms.step import Floats, FloatVector, Step

_OF_A_GROUP = ("group_mean", "leave_one_out")
_SHARES = ("mean", "bernoulli_std")  # normalisations that take b as a chance of success
_FACTS = (
    "name default_n min_n shapes_entropy aggregation default_loss default_sampler bounded_rewards".split()
)


def _keywords(function: Callable[..., Any]) -> dict[str, Any]:
    """The options of a baseline or a normalisation, and their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class Method:
    """A baseline, a normalisation, and what goes with them; called with options it is an `Estimator`.

    It has the facts of a class of `Algorithm` (``default_n`` and so on), which say what they mean.
    """

    baseline: str
    normalisation: str
    n: int = 1
    """``default_n``, or 8 where one response is too few."""
    aggregation: str | None = None
    default_loss: str = "ppo"
    shapes_entropy: bool = False
    sampler: str = "epochs"
    """``default_sampler``, with the Beta baseline."""
    posterior: bool = False
    """Of `Beta`."""
    shrinkage: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of options, where they are not those of the baseline and the normalisation."""
    name: str = ""
    kl_source: ClassVar[str] = "update"  # with the Beta baseline it is an option

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, list(BASELINES))
        check_choice("normalisation", self.normalisation, list(NORMALISATIONS))
        for option in self.defaults:
            known = set[str]().union(*map(_keywords, (*BASELINES.values(), *NORMALISATIONS.values())))
            check_choice("each of defaults", option, sorted(known))
        b, scale = self.baseline, self.normalisation
        if scale in _SHARES and b == "none":
            raise ValueError(f"normalisation {scale!r} divides by the baseline, and baseline is none")
        if self.shrinkage and b not in (*_OF_A_GROUP, "beta"):
            raise ValueError(f"shrinkage is of the baseline of each prompt, and baseline {b!r} has none")
        if scale == "bernoulli_std" and b == "leave_one_out":
            raise ValueError(f"normalisation {scale!r} needs a baseline that is one chance for a prompt")

    @property
    def min_n(self) -> int:
        return 2 if self.baseline in _OF_A_GROUP or self.normalisation == "group_std" else 1

    @property
    def default_n(self) -> int:
        return self.n if self.n >= self.min_n else 8

    @property
    def bounded_rewards(self) -> bool:
        return self.baseline == "beta" or self.normalisation in _SHARES

    @property
    def default_sampler(self) -> str:
        return self.sampler if self.baseline == "beta" else "epochs"

    @property
    def __signature__(self) -> inspect.Signature:
        """The options that baseline and normalisation read, as a registry asks any method for them."""
        read = _keywords(BASELINES[self.baseline]) | _keywords(NORMALISATIONS[self.normalisation])
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Signature(
            [inspect.Parameter(k, kind, default=self.defaults.get(k, v)) for k, v in read.items()]
        )

    def __call__(self, **options: Any) -> Estimator:
        bound = self.__signature__.bind(**options)
        bound.apply_defaults()
        scale = NORMALISATIONS[self.normalisation]
        scaling = {k: bound.arguments.pop(k) for k in _keywords(scale)}
        normalisations.check_options(**scaling)
        estimator = Estimator()
        estimator.method, estimator.normalise = self, partial(scale, **scaling)
        for fact in _FACTS:
            setattr(estimator, fact, getattr(self, fact))
        if self.baseline == "beta":
            estimator.beta = beta = Beta(self.posterior, self.shrinkage, **bound.arguments)
            estimator.baseline, estimator.kl_source = beta.tracker, beta.kl_source
            estimator.divergence, estimator.init_rollouts = beta.divergence, beta.init_rollouts
        return estimator


class Estimator(Algorithm):
    """What a `Method` makes. A class of a user's own, with b = 0 and A = D, gives a `difference`."""

    method = Method("none", "none")
    normalise: Callable[[Floats, Step], Floats] = staticmethod(normalisations.none)
    beta: Beta | None = None

    def difference(self, step: Step) -> Floats:
        """(B,) float64 D = r - b."""
        if self.beta is not None:
            return self.beta.difference(step)
        d = STATELESS[self.method.baseline](step)
        return shrink_groups(d, step) if self.method.shrinkage else d

    def advantages(self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Signal:
        step = self._step(prompt_ids, rewards, lengths)
        a = self.normalise(self.difference(step), step).astype(np.float32)
        return a, self._metrics(a, step)

    def token_advantages(
        self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike, token_penalties: ArrayLike
    ) -> Signal:
        if self.method.normalisation != "whiten" or self.bounded_rewards:
            return super().token_advantages(prompt_ids, rewards, lengths, token_penalties)
        step = self._step(prompt_ids, rewards, lengths)
        to_go = normalisations.returns_to_go(self.difference(step), step.lengths, token_penalties)
        options = _keywords(self.normalise)
        a = normalisations.whiten_tokens(to_go, step.lengths, options["eps"], options["weighting"])
        return a, self._metrics(a, step)

    def _step(self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Step:
        if self.bounded_rewards:  # now, not after the actor's update
            BetaBaseline.check_rewards(prompt_ids, rewards)
        step = Step.of(prompt_ids, rewards, lengths)
        if self.min_n > 1:
            step.check_groups(self.name)
        return step

    def _metrics(self, a: FloatVector, step: Step) -> dict[str, float]:
        """Of (B,) advantages, or (N,) of the tokens. A batch that is scaled as one lacks a signal as one."""
        compared = self.method.baseline in _OF_A_GROUP and not self.method.shrinkage
        if self.method.normalisation in ("batch_std", "whiten"):
            silent = (compared and step.constant) | (not a.any())
        else:
            silent = step.constant if compared else a == 0
        metrics = {
            "advantage/std": float(np.std(a, dtype=np.float64)) if len(a) else 0.0,
            # An empty response has no token that could learn.
            "advantage/degenerate_fraction": float(np.mean((step.lengths == 0) | silent)),
        }
        if self.beta is not None:
            metrics["baseline/unseen_fraction"] = self.beta.tracker.unseen_fraction(step.prompt_ids)
        return metrics

    def observe(self, prompt_ids: Sequence[str], rewards: ArrayLike, kl: ArrayLike) -> None:
        if self.beta is not None:
            self.beta.observe(prompt_ids, rewards, kl)

    def initialize(self, prompt_ids: Sequence[str], successes: ArrayLike, trials: ArrayLike) -> None:
        if self.beta is None:
            return super().initialize(prompt_ids, successes, trials)
        self.beta.initialize(prompt_ids, successes, trials)

    def metrics(self) -> dict[str, float]:
        beta = self.beta
        return (
            {} if beta is None else {"baseline/eta": beta.discount.eta, "baseline/mean": beta.tracker.mean()}
        )

    def _parts(self) -> dict[str, Any]:
        return {} if self.beta is None else {"baseline": self.beta.tracker, "discount": self.beta.discount}


def _check(thing: Any, called: str) -> None:
    """A method takes keywords with defaults only, the options of a config, and is a class or a `Method`."""
    if isinstance(thing, Method):
        return
    if not (isinstance(thing, type) and issubclass(thing, Algorithm)):
        raise ValueError(f"{called} is not a subclass of mssr.algorithms.Algorithm")
    if inspect.isabstract(thing):
        raise ValueError(f"{called} does not define {', '.join(sorted(thing.__abstractmethods__))}")
    for option in inspect.signature(thing).parameters.values():
        if option.default is option.empty or option.kind is option.POSITIONAL_ONLY:
            raise ValueError(f"option {option.name!r} of {called} must be a keyword with a default")


MSSR = Method("beta", "batch_std", shapes_entropy=True)
ALGORITHMS: Registry[Method | type[Algorithm]] = Registry("algorithm", "class", _check)
ALGORITHMS.known |= {
    # A = (D - mean D)/(std D + eps), D = r - v. MSSR, arXiv 2512.18215; MVSR is MSSR without entropy shaping.
    "mssr": MSSR,
    "mvsr": replace(MSSR, shapes_entropy=False),
    # MVSR with eta = 2^(-D/half_life) of each prompt's own drift D. SPO, arXiv 2509.13232.
    "spo": Method(
        "beta",
        "batch_std",
        sampler="uncertainty",
        defaults={"init_rollouts": 8, "eta_rule": "half_life", "kl_source": "last_visit"},
    ),
    # A = (r - v)/sqrt(v(1 - v)), v = (eta*a + s)/(eta*(a + b) + n) of n responses with s successes, so that a
    # group of equal scores has a signal. DBB, arXiv 2603.18444v1, eq. 2 and 11 to 13, whose prior is
    # a = b = 1 and whose eta is fixed, 0.5 (1.7B) or 0.75 (8B). With one response v is a/(a + b) from before
    # the step, or else r were in its own baseline: ours, the paper has groups only.
    "dbb": Method("beta", "bernoulli_std", n=8, posterior=True),
    # A = (r - mean_g)/(std_g + eps). GRPO, arXiv 2402.03300. TRL's eps is 1e-4.
    "grpo": Method("group_mean", "group_std"),
    # A = r - mean_g, over a constant length: no division favours easy prompts and long failures.
    # Dr. GRPO, arXiv 2503.20783.
    "dr_grpo": Method("group_mean", "none", aggregation="constant_length"),
    # A = (r - mean_g)/(std r + eps): no prompt is scaled up for hardly differing. Lite PPO, arXiv 2508.08221.
    "lite_ppo": Method("group_mean", "reward_std", aggregation="token_mean"),
    # A = (r - mean_g)/mean_g, 0 in a group without a success. MaxRL, arXiv 2602.02710.
    "maxrl": Method("group_mean", "mean"),
    # A = r - mean of the others of the prompt. RLOO, arXiv 2402.14740.
    "rloo": Method("leave_one_out", "none"),
    # A = (G - mu)/sqrt(var + eps) over tokens, G = r, or with KL in the reward less the penalties to come.
    # REINFORCE++, arXiv 2501.03262. With G - mean_g a group of equal rewards is as good as silent.
    "reinforce_pp": Method("none", "whiten"),
    "reinforce_pp_baseline": Method("group_mean", "whiten"),
    # A = r - mean r; weights and gate are those of the loss. FlashREINFORCE, as the reference loss of its
    # authors (github.com/yifanzhang-pro/FlashREINFORCE).
    "flash_reinforce": Method(
        "batch_mean", "none", default_loss="flash_reinforce", aggregation="sequence_mean"
    ),
}
register, names = ALGORITHMS.register, ALGORITHMS.names


def get(name: str, **choices: Any) -> Method | type[Algorithm]:
    """The method ``name``, with another ``baseline``, ``normalisation`` or ``shrinkage`` where not None.

    Raises:
        ValueError: There is no such method or choice, two do not go together, or the method is a class.
        UserError: The file or the attribute of ``path/to/file.py:attribute`` cannot be had, or is no method.
    """
    method = ALGORITHMS.get(name)
    asked = {k: v for k, v in choices.items() if v is not None}
    if isinstance(method, Method):
        return replace(method, name=name, n=method.default_n, **asked)
    if asked:
        raise ValueError(f"{name} has an estimator of its own: baseline and normalisation must stay null")
    return method


def create(name: str, choices: Mapping[str, Any] | None = None, /, **settings: Any) -> Algorithm:
    """Build a method, for example ``create("mssr", kl_target=0.02)``; ``choices`` are of `get`."""
    algorithm: Algorithm = ALGORITHMS.bind(name, settings, get(name, **(choices or {})))()
    return algorithm


def options(name: str, choices: Mapping[str, Any] | None = None, /) -> dict[str, Any]:
    """The options of a method with these choices, and their defaults."""
    return {k: p.default for k, p in inspect.signature(get(name, **(choices or {}))).parameters.items()}
