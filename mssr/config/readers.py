"""Which options a config reads: those of the chosen method, loss, sampler and memory settings."""

from __future__ import annotations

from typing import Any

from mssr import algorithms
from mssr.config import Config, flatten, to_dict
from mssr.errors import UserError


def check_nothing_unread(config: Config, flat: dict[str, Any]) -> None:
    """An option that nothing reads would mislead, so a changed one is an error.

    Args:
        flat: the config by dotted keys.

    Raises:
        UserError: names the option and what decides that it is not read.
    """
    defaults = flatten(to_dict(Config()))
    for key, (read, fix) in _readers(config).items():
        if not read and flat[key] != defaults[key]:
            raise UserError(f"{key}={flat[key]} is read by nothing with {fix}; change that or remove it")


def _readers(config: Config) -> dict[str, tuple[bool, str]]:
    """Option -> whether this config reads it, and the setting that decides it."""
    from mssr.algorithms import policy_losses  # needs torch

    section = config.algorithm
    method = f"algorithm.name={section.name}"
    taken = algorithms.options(section.name)
    discount = section.discount
    rule = discount.eta_rule or taken.get("eta_rule")
    readers = {
        f"algorithm.{part}.{option}": (option in taken, method)
        for part in ("baseline", "discount")
        for option in to_dict(getattr(section, part))
    }
    readers["algorithm.eps"] = ("eps" in taken, method)
    readers["algorithm.weighting"] = ("weighting" in taken, method)

    def also(keys: str, read: bool, setting: str) -> None:
        for key in keys.split():
            if readers.get(key, (True, ""))[0]:
                readers[key] = (read, setting)

    also(
        "algorithm.baseline.init_strength algorithm.baseline.init_smoothing",
        config.init_rollouts > 0,
        "algorithm.baseline.init_rollouts=0",
    )
    also(
        " ".join(f"algorithm.discount.{o}" for o in to_dict(discount) if o != "eta"),
        discount.eta is None,
        f"algorithm.discount.eta={discount.eta}",
    )
    also("algorithm.discount.half_life", rule == "half_life", f"algorithm.discount.eta_rule={rule}")
    also("algorithm.discount.kl_target", rule != "half_life", f"algorithm.discount.eta_rule={rule}")
    source = f"algorithm.discount.kl_source={config.kl_source}"
    also("algorithm.discount.window", config.kl_source != "last_visit", source)
    also(
        "algorithm.shaping.coef algorithm.shaping.divisor algorithm.shaping.entropy",
        config.shapes_entropy,
        f"{method} unless algorithm.shaping.enabled=true",
    )
    loss = f"algorithm.loss.name={section.loss.name}"
    for option in ("clip_low", "clip_high", "dual_clip", "tau_positive", "tau_negative"):
        read = option in policy_losses.loss_options(section.loss.name)
        also(f"algorithm.loss.{option}", read, loss)
    also(
        "algorithm.loss.constant_length",
        config.aggregation == "constant_length",
        f"algorithm.loss.aggregation={config.aggregation}",
    )
    also("algorithm.kl.estimator algorithm.kl.target", section.kl.coef > 0, "algorithm.kl.coef=0")
    also("algorithm.kl.horizon", section.kl.target is not None, "algorithm.kl.target=null")
    correction = section.correction
    weighted = config.correction_options["weight"] != "none"
    also("algorithm.correction.max_weight", weighted, "algorithm.correction.weight=none")
    also(
        "algorithm.correction.mask_low algorithm.correction.mask_high",
        correction.mask != "none",
        "algorithm.correction.mask=none",
    )
    also(
        "sampler.uncertainty_eps",
        config.sampler_name == "uncertainty",
        f"sampler.name={config.sampler_name}",
    )
    also("sampler.max_draws", config.sampler.dynamic, "sampler.dynamic=false")
    also("actor.vision_cache_gib", not config.trains_vision, "model.freeze_vision=false")
    also(
        "actor.lora.alpha actor.lora.dropout actor.lora.targets",
        config.actor.lora.rank > 0,
        "actor.lora.rank=0",
    )
    also("actor.rounding", config.actor.master_dtype == "bfloat16", "actor.master_dtype=float32")
    also("watch.patience", bool(config.watch.signs), "every sign in watch null")
    return readers
