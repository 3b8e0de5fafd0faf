"""What verl's config says of a method, and what of verl does not go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mssr.algorithms import Algorithm
from mssr.algorithms.checks import check_number
from mssr.integrations import base

VERSION, MODE = "0.9.1", "mssr_sync"
METHODS = tuple(name for name in base.METHODS if name != "reinforce_pp")  # verl has its own


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``algorithm.mssr`` of verl's config, beside the options of the method."""

    shaping: bool | None = None
    """Entropy-shaped advantages; None: for mssr, and for no other method."""
    shaping_coef: float = 0.4
    """Multiplies the entropy, in nats."""
    shaping_divisor: float = 2.0
    """Bounds the bonus by |A| / divisor."""
    kl_probe_fraction: float = 0.25
    """Share of the rollouts, in (0, 1], scored again after the update for the discount."""

    def __post_init__(self) -> None:
        if self.shaping not in (None, True, False):
            raise ValueError(f"shaping must be true, false or null, not {self.shaping!r}")
        check_number("shaping_coef", self.shaping_coef, ">= 0")
        check_number("shaping_divisor", self.shaping_divisor)
        check_number("kl_probe_fraction", self.kl_probe_fraction)
        check_number("kl_probe_fraction", self.kl_probe_fraction, "in [0, 1]")


def read(config: DictConfig, version: str) -> tuple[Algorithm, Settings]:
    """The method without a history, and how it is used, of verl's whole config.

    Raises:
        ValueError: an option is wrong, or verl's version or setting would make the method wrong.
    """
    _check(config, version)
    options: dict[str, Any] = dict(config.algorithm.get("mssr") or {})
    ours = {key: options.pop(key) for key in Settings.__dataclass_fields__ if key in options}
    try:
        return base.create(config.algorithm.adv_estimator, options), Settings(**ours)
    except (TypeError, ValueError) as error:  # TypeError: a word where a number is needed
        raise ValueError(f"algorithm.mssr: {error}") from None


def _check(config: DictConfig, version: str) -> None:
    algorithm, trainer, n = config.algorithm, config.trainer, config.actor_rollout_ref.rollout.n
    name, in_reward, warmup = algorithm.adv_estimator, algorithm.use_kl_in_reward, trainer.critic_warmup
    bypass = OmegaConf.select(algorithm, "rollout_correction.bypass_mode")
    groups = OmegaConf.select(algorithm, "filter_groups.enable")
    for wrong, why in (
        (version != VERSION, f"verl {version}: this plugin is for verl {VERSION}, install that one"),
        (not trainer.use_v1, f"trainer.use_v1=false: {MODE} is of verl's V1 trainers, set it to true"),
        (
            name not in METHODS,
            f"algorithm.adv_estimator={name}: {MODE} is for {', '.join(METHODS)}",
        ),
        (n != 1, f"actor_rollout_ref.rollout.n={n}: a prompt has one response here, set it to 1"),
        (in_reward, "algorithm.use_kl_in_reward=true: rewards must stay in [0, 1], set it to false"),
        (bypass, "algorithm.rollout_correction.bypass_mode=true: verl keeps no entropy, set it to false"),
        (groups, "algorithm.filter_groups.enable=true: one response makes no group, set it to false"),
        (warmup, f"trainer.critic_warmup={warmup}: every step must update the actor, set it to 0"),
    ):
        if wrong:
            raise ValueError(why)
