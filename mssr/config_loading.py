"""YAML file + key=value overrides -> a checked Config. Every complaint is one line with the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mssr import algorithms
from mssr.config import Config, flatten, to_dict
from mssr.errors import UserError

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "rollout.engine": ("vllm", "hf"),
    "actor.lr_schedule": ("constant", "linear", "cosine"),
    "cluster.launcher": ("ray", "local"),
    "cluster.device": ("auto", "cpu", "cuda"),
    "trainer.progress": ("auto", "live", "plain", "off"),
}
LOGGERS = ("wandb", "tensorboard")

POSITIVE = (
    "algorithm.baseline.prior_strength algorithm.discount.kl_target algorithm.discount.window "
    "algorithm.shaping.divisor rollout.rollouts_per_step rollout.temperature "
    "rollout.max_response_length rollout.workers rollout.max_num_seqs rollout.kv_cache_gib "
    "actor.num_ranks actor.updates_per_step actor.lr actor.max_grad_norm actor.micro_batch_tokens "
    "actor.head_chunk_tokens actor.max_nonfinite_updates cluster.threads_per_actor "
    "cluster.threads_per_rollout trainer.steps trainer.keep_checkpoints data.min_pixels "
    "data.max_pixels data.max_prompt_length rollout.gpu_memory_utilization actor.kl_probe_fraction "
    "algorithm.clip_low algorithm.clip_high"
).split()
NON_NEGATIVE = (
    "algorithm.shaping.coef algorithm.kl_coef actor.warmup_steps actor.weight_decay "
    "trainer.val_every trainer.save_every trainer.samples_every data.max_bad_fraction"
).split()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Merge a YAML file and ``key=value`` overrides over the defaults, and check the result.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown, a value has the wrong type, or
            values contradict each other.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    schema = OmegaConf.structured(Config)
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml and omegaconf raise many types; all mean the same to the user
        raise UserError(f"{path} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold key: value pairs at the top level")
    merged = _merge(schema, loaded, str(path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"override {override!r} must look like key=value")
        try:
            parsed = OmegaConf.from_dotlist([f"{key}={value}"])
        except Exception as error:
            raise UserError(f"override {override!r} cannot be read: {_first_line(error)}") from error
        merged = _merge(merged, parsed, f"override {override!r}")
    config = cast(Config, OmegaConf.to_object(merged))
    validate(config)
    return config


def from_dict(tree: dict[str, Any]) -> Config:
    """The Config that `mssr.config.to_dict` was made from (config.yaml, checkpoints)."""
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), tree)))


def save_config(config: Config, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def _merge(base: DictConfig, extra: DictConfig, source: str) -> DictConfig:
    known = set(flatten(to_dict(Config())))
    sections = {k.rsplit(".", i)[0] for k in known for i in range(1, k.count(".") + 1)}
    for key in flatten(cast(dict[str, Any], OmegaConf.to_container(extra))):
        if key not in known and key not in sections and not key.startswith("rollout.engine_options."):
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.4)
            same_leaf = [k for k in sorted(known) if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
            hint = f"; did you mean {(same_leaf or near)[0]}?" if same_leaf or near else ""
            raise UserError(f"{source}: unknown key {key}{hint}")
    try:
        return cast(DictConfig, OmegaConf.merge(base, extra))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a value"
        reason = re.sub(r"\s+", " ", _first_line(error))
        raise UserError(f"{source}: {key} has the wrong type: {reason}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def validate(config: Config) -> None:
    """Refuse a config that cannot mean what it says.

    Raises:
        UserError: one line with the key, the reason and what to do.
    """
    flat = flatten(to_dict(config))
    _check_algorithm(config)
    _check_values(config, flat)
    n, rollouts = config.responses_per_prompt, config.rollout.rollouts_per_step
    if n < 1 or rollouts % n:
        raise UserError(
            f"rollout.rollouts_per_step={rollouts} is not a multiple of the {n} responses per prompt "
            f"(rollout.n) that algorithm.name={config.algorithm.name} uses"
        )
    if rollouts % config.actor.updates_per_step:
        raise UserError(
            f"actor.updates_per_step={config.actor.updates_per_step} does not divide "
            f"rollout.rollouts_per_step={rollouts}"
        )
    if config.cluster.launcher == "local":
        for key in ("actor.num_ranks", "rollout.workers"):
            if flat[key] != 1:
                raise UserError(f"cluster.launcher=local runs in one process; set {key}=1")


def _check_values(config: Config, flat: dict[str, Any]) -> None:
    for key in ("model.path", "data.train"):
        if not flat[key]:
            raise UserError(f"{key} is not set")
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise UserError(f"{key}={flat[key]} must be one of {', '.join(choices)}")
    for key in POSITIVE:
        if not flat[key] > 0:
            raise UserError(f"{key}={flat[key]} must be greater than 0")
    for key in NON_NEGATIVE:
        if not flat[key] >= 0:
            raise UserError(f"{key}={flat[key]} must not be negative")
    if not 0 <= config.data.max_bad_fraction <= 1:
        raise UserError(f"data.max_bad_fraction={config.data.max_bad_fraction} must lie in [0, 1]")
    if config.actor.kl_probe_fraction > 1:
        raise UserError(f"actor.kl_probe_fraction={config.actor.kl_probe_fraction} must be at most 1")
    if config.algorithm.eps is not None and config.algorithm.eps <= 0:
        raise UserError(f"algorithm.eps={config.algorithm.eps} must be greater than 0, or null")
    if config.algorithm.clip_low >= 1:
        raise UserError(f"algorithm.clip_low={config.algorithm.clip_low} must be less than 1")
    if config.algorithm.dual_clip is not None and config.algorithm.dual_clip <= 1:
        raise UserError(f"algorithm.dual_clip={config.algorithm.dual_clip} must be greater than 1, or null")
    prior_mean = config.algorithm.baseline.prior_mean
    if prior_mean is not None and not 0 <= prior_mean <= 1:
        raise UserError(f"algorithm.baseline.prior_mean={prior_mean} must lie in [0, 1]")
    discount = config.algorithm.discount
    if not 0 < discount.eta_min <= discount.eta_max < 1:
        raise UserError(
            f"algorithm.discount.eta_min={discount.eta_min} and eta_max={discount.eta_max}: "
            "0 < eta_min <= eta_max < 1 must hold"
        )
    if len(config.actor.betas) != 2 or not all(0 <= b < 1 for b in config.actor.betas):
        raise UserError(f"actor.betas={config.actor.betas} must be two numbers in [0, 1)")
    if config.data.min_pixels > config.data.max_pixels:
        raise UserError(
            f"data.min_pixels={config.data.min_pixels} exceeds data.max_pixels={config.data.max_pixels}"
        )
    for logger in config.trainer.loggers:
        if logger not in LOGGERS:
            raise UserError(f"trainer.loggers: {logger} must be one of {', '.join(LOGGERS)}")


def _check_algorithm(config: Config) -> None:
    name = config.algorithm.name
    try:
        method = algorithms.get(name)
    except ValueError as error:
        raise UserError(f"algorithm.name={name}: {error}") from error
    if config.responses_per_prompt < method.min_n:
        raise UserError(
            f"rollout.n={config.rollout.n}: algorithm.name={name} compares the responses of a prompt and "
            f"needs at least {method.min_n}; remove rollout.n for the default of {method.default_n}"
        )
    # An option that nothing reads would mislead, so a changed one is an error.
    taken = algorithms.options(name)
    read = {
        **{f"algorithm.{s}.{o}": o in taken for s, o in _leaves("baseline", "discount")},
        "algorithm.eps": "eps" in taken,
        "algorithm.shaping.coef": config.shapes_entropy,
        "algorithm.shaping.divisor": config.shapes_entropy,
    }
    defaults, values = flatten(to_dict(Config())), flatten(to_dict(config))
    for key, is_read in read.items():
        if not is_read and values[key] != defaults[key]:
            fix = "set algorithm.shaping.enabled=true or " if "shaping" in key else ""
            raise UserError(
                f"{key}={values[key]} is read by nothing with algorithm.name={name}; {fix}remove it"
            )


def _leaves(*sections: str) -> list[tuple[str, str]]:
    tree = to_dict(Config())["algorithm"]
    return [(section, option) for section in sections for option in tree[section]]
