"""What a config may not say: values out of range, options that nothing reads, contradictions.

Every complaint is one line with the key, the reason and what to do.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from mssr import algorithms, rewards
from mssr.algorithms import plugins
from mssr.config import Config, flatten, to_dict
from mssr.config.data import PAPER_INSTRUCTION
from mssr.config.readers import check_nothing_unread
from mssr.data.sources import parse_sources
from mssr.data.validation_sets import validation_sets
from mssr.errors import UserError

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.attn_implementation": ("auto", "varlen", "sdpa", "eager", "flash_attention_2"),
    "rollout.engine": ("vllm", "hf"),
    "actor.score_early": ("auto", "always", "never"),
    "actor.lr_schedule": ("constant", "linear", "cosine"),
    "actor.optimizer": ("adamw", "adamw_8bit"),
    "actor.master_dtype": ("float32", "bfloat16"),
    "actor.rounding": ("stochastic", "kahan"),
    "actor.offload": ("none", "optimizer", "all"),
    "cluster.launcher": ("ray", "local"),
    "cluster.device": ("auto", "cpu", "cuda"),
    "actor.kl_probe": ("trained", "held_out"),
    "trainer.progress": ("auto", "live", "plain", "off"),
    "algorithm.weighting": ("sequence", "token"),
    "algorithm.discount.eta_rule": ("monotone", "published_code", "half_life"),
    "algorithm.discount.kl_source": ("update", "reference", "last_visit"),
    "algorithm.shaping.entropy": ("exact", "sampled"),
    "algorithm.loss.aggregation": ("token_mean", "sequence_mean", "constant_length"),
    "algorithm.kl.estimator": ("k1", "k2", "k3"),
    "algorithm.kl.placement": ("loss", "reward"),
    "algorithm.correction.weight": ("none", "token", "sequence"),
    "algorithm.correction.mask": ("none", "token", "sequence", "geometric"),
    "sampler.name": ("epochs", "uncertainty"),
}
LOGGERS = ("wandb", "tensorboard")

POSITIVE = (
    "algorithm.baseline.prior_strength algorithm.baseline.init_strength algorithm.discount.kl_target "
    "algorithm.discount.window algorithm.discount.half_life algorithm.eps algorithm.shaping.divisor "
    "algorithm.loss.clip_low algorithm.loss.clip_high algorithm.loss.tau_positive "
    "algorithm.loss.tau_negative algorithm.loss.constant_length algorithm.kl.target algorithm.kl.horizon "
    "algorithm.correction.max_weight algorithm.correction.mask_low sampler.max_draws "
    "rollout.rollouts_per_step rollout.temperature rollout.max_response_length rollout.workers "
    "rollout.max_num_seqs rollout.kv_cache_gib rollout.gpu_memory_utilization rollout.n "
    "actor.num_ranks actor.updates_per_step actor.lr actor.max_grad_norm actor.micro_batch_tokens "
    "actor.head_chunk_tokens actor.max_nonfinite_updates actor.kl_probe_fraction actor.lora.alpha "
    "cluster.threads_per_actor cluster.threads_per_rollout cluster.hang_timeout_s "
    "trainer.epochs trainer.keep_checkpoints data.min_pixels data.max_pixels data.max_prompt_length"
).split()
NON_NEGATIVE = (
    "algorithm.shaping.coef algorithm.kl.coef algorithm.baseline.init_rollouts "
    "algorithm.baseline.init_smoothing algorithm.loss.entropy_coef algorithm.loss.text_anchor_coef "
    "sampler.uncertainty_eps actor.warmup_steps actor.weight_decay actor.vision_cache_gib "
    "actor.lora.rank actor.lora.dropout data.image_cache_gib "
    "trainer.val_every trainer.save_every trainer.samples_every trainer.max_restarts data.max_bad_fraction"
).split()
UNIT_INTERVAL = (
    "data.max_bad_fraction algorithm.baseline.prior_mean algorithm.discount.eta actor.kl_probe_fraction"
).split()


def validate(config: Config) -> None:
    """Refuse a config that cannot mean what it says.

    Raises:
        UserError: one line with the key, the reason and what to do.
    """
    flat = flatten(to_dict(config))
    _check_values(config, flat)
    _check_method(config)
    _check_watch(config)
    _check_engine_options(config)
    _check_data(config)
    rewards.check(config.reward)
    check_nothing_unread(config, flat)
    _check_combinations(config)
    _check_memory(config)
    n, rollouts = config.responses_per_prompt, config.rollout.rollouts_per_step
    if rollouts % n:
        raise UserError(
            f"rollout.rollouts_per_step={rollouts} is not a multiple of the {n} responses per prompt "
            f"(rollout.n) that algorithm.name={config.algorithm.name} uses"
        )
    if rollouts % config.actor.updates_per_step:
        raise UserError(
            f"actor.updates_per_step={config.actor.updates_per_step} does not divide "
            f"rollout.rollouts_per_step={rollouts}"
        )
    if config.holds_out:
        prompts = config.prompts_per_step
        held = math.ceil(config.kl_probe_fraction * prompts)
        if (prompts - held) * n < config.actor.updates_per_step:
            raise UserError(
                f"actor.kl_probe=held_out takes {held} of the {prompts} prompts of a step, too many for "
                f"actor.updates_per_step={config.actor.updates_per_step}; lower actor.kl_probe_fraction, "
                "or set actor.kl_probe=trained"
            )
    _check_overlap(config)
    if config.cluster.launcher == "local":
        several = [f"{key}=1" for key in ("actor.num_ranks", "rollout.workers") if flat[key] != 1]
        if several:
            raise UserError(f"cluster.launcher=local runs in one process; set {' '.join(several)}")


def _check_overlap(config: Config) -> None:
    """What may run at the same time."""
    lag, early = config.rollout.lag, config.actor.score_early == "always"
    if lag not in (0, 1):
        raise UserError(f"rollout.lag={lag} must be 0 or 1")
    if config.cluster.launcher == "local" and (lag or early):
        key = "rollout.lag=1" if lag else "actor.score_early=always"
        raise UserError(f"{key} lets engines and ranks work at the same time: it needs cluster.launcher=ray")
    if early and not config.needs_reference and config.actor.updates_per_step == 1:
        raise UserError(
            "actor.score_early=always has nothing to score: there is no reference, and the only update of a "
            "step computes the log-probs itself; remove it"
        )
    if lag and early:
        raise UserError(
            "actor.score_early=always with rollout.lag=1: the ranks train while responses are generated; "
            "remove one of them"
        )
    if lag and config.correction_options["weight"] == "none" and config.algorithm.correction.mask == "none":
        raise UserError(
            "rollout.lag=1 trains on responses of older weights and algorithm.correction.weight=none does "
            "not correct for it; remove that, or set algorithm.correction.mask"
        )
    if lag and config.sampler.dynamic and config.sampler_name == "uncertainty":
        raise UserError(
            "rollout.lag=1 with sampler.dynamic=true and sampler.name=uncertainty: further draws would "
            "depend on how far the training of the step before is; turn one of them off"
        )


def responses_per_prompt(config: Config) -> int:
    """n of a config that is not checked yet.

    Raises:
        UserError: there is no such method.
    """
    try:
        return config.responses_per_prompt
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"algorithm.name={config.algorithm.name}: {error}") from error


def advice(config: Config) -> list[str]:
    """What is allowed and likely not meant; one line each, shown at the start of a run."""
    section, lines = config.algorithm, []
    if config.shapes_entropy and section.shaping.divisor < 1:
        lines.append(
            f"algorithm.shaping.divisor={section.shaping.divisor} is below 1: where entropy is high the "
            "bonus outweighs a negative advantage, so wrong answers are reinforced; watch "
            "shaping/sign_flip_fraction"
        )
    if config.kl_in_loss and section.kl.estimator == "k1":
        lines.append(
            "algorithm.kl.estimator=k1 in the loss has a gradient of mean zero: it adds noise and no "
            "regularisation; k2 and k3 regularise, and k1 is right with algorithm.kl.placement=reward"
        )
    if config.init_rollouts:
        lines.append(
            f"algorithm.baseline.init_rollouts={config.init_rollouts}: before training every prompt gets as "
            "many responses, beside the rollouts of the steps"
        )
    if config.actor.lora.rank and config.actor.lr < 5e-6:
        lines.append(
            f"actor.lr={config.actor.lr} is a rate for full training; adapters (actor.lora) learn at ten "
            "times that and more"
        )
    if config.algorithm.correction.mask == "sequence":
        lines.append(
            "algorithm.correction.mask=sequence bounds the product of all token ratios of a response, which "
            "long responses leave easily; geometric bounds their mean"
        )
    return lines + rewards.advice(config.reward, config.method.bounded_rewards)


def _check_values(config: Config, flat: dict[str, Any]) -> None:
    for key in ("model.path", "data.train"):
        if not flat[key]:
            raise UserError(f"{key} is not set")
    for key, choices in CHOICES.items():
        if flat[key] is not None and flat[key] not in choices:
            raise UserError(f"{key}={flat[key]} must be one of {', '.join(choices)}")
    for key in POSITIVE:
        if flat[key] is not None and not flat[key] > 0:
            raise UserError(f"{key}={flat[key]} must be greater than 0")
    for key in NON_NEGATIVE:
        if flat[key] is not None and not flat[key] >= 0:
            raise UserError(f"{key}={flat[key]} must not be negative")
    for key in UNIT_INTERVAL:
        if flat[key] is not None and not 0 <= flat[key] <= 1:
            raise UserError(f"{key}={flat[key]} must lie in [0, 1]")
    steps, epochs = config.trainer.steps, config.trainer.epochs
    if epochs is None and steps < 1:
        raise UserError(f"trainer.steps={steps} must be greater than 0")
    if epochs is not None and steps != 0:
        raise UserError(
            f"trainer.steps={steps} and trainer.epochs={epochs} both say how long to train; set one of them"
        )
    for section, low, high in (
        ("algorithm.discount", "eta_min", "eta_max"),
        ("data", "min_pixels", "max_pixels"),
    ):
        if flat[f"{section}.{low}"] > flat[f"{section}.{high}"]:
            raise UserError(
                f"{section}.{low}={flat[f'{section}.{low}']} exceeds {section}.{high}="
                f"{flat[f'{section}.{high}']}"
            )
    discount = config.algorithm.discount
    if not (discount.eta_min > 0 and discount.eta_max < 1):
        raise UserError(
            f"algorithm.discount.eta_min={discount.eta_min} and algorithm.discount.eta_max="
            f"{discount.eta_max} must lie in (0, 1)"
        )
    if len(config.actor.betas) != 2 or not all(0 <= b < 1 for b in config.actor.betas):
        raise UserError(f"actor.betas={config.actor.betas} must be two numbers in [0, 1)")
    for logger in config.trainer.loggers:
        if logger not in LOGGERS:
            raise UserError(f"trainer.loggers: {logger} must be one of {', '.join(LOGGERS)}")


def _check_method(config: Config) -> None:
    section = config.algorithm
    try:
        method = config.method
        for key, options, name in (
            ("algorithm.options", section.options, section.name),
            ("algorithm.loss.options", section.loss.options, section.loss.name),
        ):
            if options and not plugins.is_spec(name):
                raise UserError(f"{key} is for a method or loss from a file; {name} has keys of its own")
        _try_loss(config)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"algorithm.name={section.name}, loss.name={section.loss.name}: {error}") from error
    if config.responses_per_prompt < method.min_n:
        raise UserError(
            f"rollout.n={config.rollout.n}: algorithm.name={section.name} compares the responses of a prompt "
            f"and needs at least {method.min_n}; remove rollout.n for the default of {method.default_n}"
        )


def _try_loss(config: Config) -> None:
    """Call loss and correction on one token: they know their options' ranges themselves."""
    import torch

    from mssr.algorithms.correction import rollout_correction
    from mssr.algorithms.losses import aggregation_denominator, policy_loss

    token, length = torch.zeros(1), torch.ones(1, dtype=torch.int64)
    policy_loss(token, token, token, length, name=config.algorithm.loss.name, **config.loss_options)
    rollout_correction(token, token, length, **config.correction_options)
    aggregation_denominator(length, config.aggregation, config.constant_length)


def _check_watch(config: Config) -> None:
    watch = config.watch
    for key, value in (("entropy_floor", watch.entropy_floor), ("patience", watch.patience)):
        if value is not None and not value > 0:
            raise UserError(f"watch.{key}={value} must be greater than 0")
    if watch.accuracy_drop is not None and not 0 < watch.accuracy_drop < 1:
        raise UserError(f"watch.accuracy_drop={watch.accuracy_drop} must lie in (0, 1), or be null for off")
    if watch.length_growth is not None and not watch.length_growth > 1:
        raise UserError(f"watch.length_growth={watch.length_growth} must be greater than 1, or null for off")
    if config.trainer.stop_on_collapse and not watch.signs:
        raise UserError(
            "trainer.stop_on_collapse=true stops for nothing, because every sign in watch is null; set "
            "watch.entropy_floor, watch.accuracy_drop or watch.length_growth"
        )


def _check_engine_options(config: Config) -> None:
    options = config.rollout.engine_options
    if "trust_remote_code" in options:
        raise UserError(
            "rollout.engine_options.trust_remote_code: set model.trust_remote_code, which decides for "
            "engine and actor alike"
        )
    for name in ("mm_processor_kwargs", "mm_processor_cache_gb", "mm_device_do_normalize"):
        if name in options:
            raise UserError(
                f"rollout.engine_options.{name}: engines get their images ready from our encoder; set "
                "data.min_pixels, data.max_pixels or data.image_cache_gib"
            )


def _check_data(config: Config) -> None:
    parse_sources(config.data.train, "data.train")
    validation_sets(config.data.val)
    if config.data.prompt_template and config.data.instruction not in (PAPER_INSTRUCTION, ""):
        raise UserError(
            "data.instruction is read by nothing with data.prompt_template; put it into the template"
        )


def _check_combinations(config: Config) -> None:
    section = config.algorithm
    try:
        estimator = algorithms.create(section.name, **config.estimator_options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"algorithm.name={section.name}: {error}") from error
    if config.sampler_name == "uncertainty" and estimator.baseline is None:
        raise UserError(
            "sampler.name=uncertainty draws by the Beta baseline, and "
            f"algorithm.name={section.name} keeps none"
        )
    if config.sampler.dynamic and config.responses_per_prompt < 2:
        raise UserError(
            f"sampler.dynamic=true draws again for groups of equal rewards; algorithm.name={section.name} "
            "has one response per prompt"
        )
    if config.kl_in_reward and estimator.bounded_rewards:
        raise UserError(
            f"algorithm.kl.placement=reward: the Beta baseline of algorithm.name={section.name} takes "
            "rewards in [0, 1] only; use placement=loss"
        )
    if section.kl.placement == "reward" and section.kl.coef == 0:
        raise UserError("algorithm.kl.placement=reward with algorithm.kl.coef=0 does nothing; remove it")


def _check_memory(config: Config) -> None:
    actor = config.actor
    if actor.lora.dropout >= 1:
        raise UserError(f"actor.lora.dropout={actor.lora.dropout} must be below 1")
    for setting, wanted, package, extra in (
        (f"actor.lora.rank={actor.lora.rank}", actor.lora.rank > 0, "peft", "lora"),
        (f"actor.optimizer={actor.optimizer}", actor.optimizer == "adamw_8bit", "torchao", "int8"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{setting} needs the package {package}; install mssr[{extra}]")
    if actor.optimizer == "adamw_8bit" and actor.master_dtype == "bfloat16":
        raise UserError(
            "actor.optimizer=adamw_8bit trains float32 parameters; set actor.master_dtype=float32, or "
            "actor.optimizer=adamw, whose moments are bfloat16 with actor.master_dtype=bfloat16"
        )
    if actor.optimizer == "adamw_8bit" and actor.offload == "all":
        raise UserError(
            "actor.offload=all runs the optimizer on the host, for which adamw_8bit is not made; set "
            "actor.optimizer=adamw, or actor.offload=optimizer"
        )
    if actor.keep_gathered and actor.offload == "all":
        raise UserError(
            "actor.keep_gathered=true holds whole parameters on the device, off which actor.offload=all is "
            "to keep them; set one of the two"
        )
