"""What a config may not say: values out of range, options that nothing reads, contradictions.

Every error is one line with the key, the reason and what to do.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Iterator

from mssr import algorithms
from mssr.algorithms.plugins import is_spec
from mssr.config.data import PAPER_INSTRUCTION
from mssr.config.options import check_read, check_values, describe, in_yaml
from mssr.config.run import Config, RolloutConfig
from mssr.errors import UserError

TOO_LATE = ("LD_", "PYTHON", "RAY_")
"""How the names of variables begin that a process reads as it starts."""
OURS = {"CUDA_VISIBLE_DEVICES": "the placement"} | dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"),
    "cluster.threads_per_actor or cluster.threads_per_rollout",
)


def validate(config: Config) -> None:
    """Refuse a config that cannot mean what it says, with a UserError."""
    check_values(config)
    _check_numbers(config)
    _check_method(config)
    _check_engine_options(config)
    _check_memory(config)
    _check_budget(config)
    _check_placement(config)
    _check_overlap(config)
    _check_environment(config)


def advice(config: Config) -> Iterator[str]:
    """What is allowed and likely not meant; one line each, shown at the start of a run."""
    section = config.algorithm
    if config.shapes_entropy and section.shaping.divisor < 1:
        yield (
            f"algorithm.shaping.divisor={section.shaping.divisor} is below 1: where entropy is high the "
            "bonus outweighs a negative advantage, so wrong answers are reinforced; watch "
            "shaping/sign_flip_fraction"
        )
    if config.kl_in_loss and section.kl.estimator == "k1":
        yield (
            "algorithm.kl.estimator=k1 in the loss has a gradient of mean zero: it adds noise and no "
            "regularisation; k2 and k3 regularise, and k1 is right with algorithm.kl.placement=reward"
        )
    if config.loss_name == "flash_reinforce" and config.actor.updates_per_step > 1:
        yield (
            f"actor.updates_per_step={config.actor.updates_per_step}: algorithm.loss.name=flash_reinforce is "
            "defined for one; later ones drop the responses that earlier ones moved most"
        )
    if config.init_rollouts:
        yield (
            f"algorithm.baseline.init_rollouts={config.init_rollouts}: before training every prompt gets as "
            "many responses, beside the rollouts of the steps"
        )
    if config.actor.lora.rank and config.actor.lr < 5e-6:
        yield (
            f"actor.lr={config.actor.lr} is a rate for full training; adapters (actor.lora) learn at ten "
            "times that and more"
        )
    if section.correction.mask == "sequence":
        yield (
            "algorithm.correction.mask=sequence bounds the product of all token ratios of a response, which "
            "long responses leave easily; geometric bounds their mean"
        )


@contextlib.contextmanager
def naming(setting: str) -> Iterator[None]:
    """Let a complaint of a method or a loss begin with the setting that chose it."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from error


def _check_numbers(config: Config) -> None:
    """Numbers that only mean something beside others."""
    steps, epochs = config.trainer.steps, config.trainer.epochs
    if epochs is None and steps < 1:
        raise UserError(f"trainer.steps={steps} must be greater than 0")
    if epochs is not None and steps != 0:
        raise UserError(
            f"trainer.steps={steps} and trainer.epochs={epochs} both say how long to train; set one of them"
        )
    data, discount = config.data, config.algorithm.discount
    if (low := discount.eta_min) > (high := discount.eta_max):
        raise UserError(f"algorithm.discount.eta_min={low} exceeds algorithm.discount.eta_max={high}")
    if data.min_pixels > data.max_pixels:
        raise UserError(f"data.min_pixels={data.min_pixels} exceeds data.max_pixels={data.max_pixels}")
    if len(config.actor.betas) != 2:
        raise UserError(f"actor.betas={config.actor.betas} must be two numbers in [0, 1)")
    if data.prompt_template and data.instruction not in (PAPER_INSTRUCTION, ""):
        raise UserError(
            "data.instruction is read by nothing with data.prompt_template; put it into the template"
        )


def _check_method(config: Config) -> None:
    """Method, loss and sampler; and, as these decide it, what is read."""
    section = config.algorithm
    chosen = f"algorithm.name={section.name}"
    with naming(chosen):
        method, loss = config.method, config.loss_name
    for key, options, name in (
        ("algorithm.options", section.options, section.name),
        ("algorithm.loss.options", section.loss.options, loss),
    ):
        if options and not is_spec(name):
            raise UserError(f"{key} is for a method or loss from a file; {name} has keys of its own")
    with naming(f"{chosen}, loss.name={loss}"):
        _try_loss(config)
    correction = section.correction
    if config.corrects_itself and (correction.weight or "none", correction.mask) != ("none", "none"):
        raise UserError(
            "algorithm.correction would weigh by policy and engine a second time: "
            f"algorithm.loss.name={loss} does it itself; remove its weight and mask"
        )
    if config.responses_per_prompt < method.min_n:
        raise UserError(
            f"rollout.n={config.rollout.n}: {chosen} compares the responses of a prompt "
            f"and needs at least {method.min_n}; remove rollout.n for the default of {method.default_n}"
        )
    check_read(config, meant=config.meant)
    with naming(chosen):
        estimator = algorithms.create(section.name, config.choices, **config.estimator_options)
    if config.sampler_name == "uncertainty" and estimator.baseline is None:
        raise UserError(f"sampler.name=uncertainty draws by the Beta baseline, and {chosen} keeps none")
    if config.sampler.dynamic and config.responses_per_prompt < 2:
        raise UserError(
            f"sampler.dynamic=true draws again for groups of equal rewards; {chosen} has one response per "
            "prompt"
        )
    weights = config.reward.weights or [1.0] * len(config.reward.names)
    if estimator.bounded_rewards and (min(weights, default=0) < 0 or sum(weights) > 1 + 1e-9):
        raise UserError(
            f"reward.weights={in_yaml(config.reward.weights)}: {chosen} takes rewards in [0, 1] only, so the "
            "weights (null is 1 each) must not be negative and sum to at most 1"
        )
    if config.kl_in_reward and estimator.bounded_rewards:
        part = "normalisation" if estimator.baseline is None else "Beta baseline"
        raise UserError(
            f"algorithm.kl.placement=reward: the {part} of {chosen} takes rewards in [0, 1] only; use "
            "placement=loss"
        )
    if section.kl.placement == "reward" and section.kl.coef == 0:
        raise UserError("algorithm.kl.placement=reward with algorithm.kl.coef=0 does nothing; remove it")


def _try_loss(config: Config) -> None:
    """Call loss and correction on one token: they know their options' ranges themselves."""
    import torch

    from mssr.algorithms.correction import rollout_correction
    from mssr.algorithms.losses import aggregation_denominator, policy_loss

    token, length = torch.zeros(1), torch.ones(1, dtype=torch.int64)
    policy_loss(token, token, token, length, name=config.loss_name, **config.loss_options)
    rollout_correction(token, token, length, **config.correction_options)
    aggregation_denominator(length, config.aggregation, config.constant_length)


_ENGINE_OPTIONS_ELSEWHERE = {
    "model": "set model.path",
    "dtype": "set model.dtype",
    "seed": "set seed",
    "max_model_len": "it is data.max_prompt_length + rollout.max_response_length; set these",
    "tensor_parallel_size": "set rollout.tensor_parallel, which gives an engine so many devices, too",
    "distributed_executor_backend": "set rollout.tensor_parallel, which chooses it",
    "pipeline_parallel_size": "engines have no stages; set rollout.tensor_parallel",
    "data_parallel_size": "set rollout.workers, the number of engines",
    "enable_sleep_mode": "set cluster.placement=colocated, where engines sleep",
    "weight_transfer_config": "set cluster.weight_transfer",
    "worker_cls": "engines get their weights through a worker of ours; remove it",
    "worker_extension_cls": "engines get their weights through a worker of ours; remove it",
    "logprobs_mode": "the log-probs must be those of what is sampled; remove it",
    **dict.fromkeys(
        ("mm_processor_kwargs", "mm_processor_cache_gb", "mm_device_do_normalize"),
        "engines get their images ready from our encoder; set data.min_pixels, data.max_pixels or "
        "data.image_cache_gib",
    ),
}
"""Arguments of vLLM that are decided elsewhere, and where."""


def _check_engine_options(config: Config) -> None:
    if "trust_remote_code" in config.rollout.engine_options:
        raise UserError(
            "rollout.engine_options.trust_remote_code: set model.trust_remote_code, which decides for "
            "engine and actor alike"
        )
    for name in config.rollout.engine_options:
        if name in _ENGINE_OPTIONS_ELSEWHERE:
            raise UserError(f"rollout.engine_options.{name}: {_ENGINE_OPTIONS_ELSEWHERE[name]}")
        if name in describe(RolloutConfig):
            raise UserError(f"rollout.engine_options.{name}: set rollout.{name}")


def _check_memory(config: Config) -> None:
    actor = config.actor
    in_8_bits, offloads_all = actor.optimizer == "adamw_8bit", actor.offload == "all"
    for setting, wanted, package, extra in (
        (f"actor.lora.rank={actor.lora.rank}", actor.lora.rank > 0, "peft", "lora"),
        ("actor.optimizer=adamw_8bit", in_8_bits, "torchao", "int8"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{setting} needs the package {package}; install mssr[{extra}]")
    if in_8_bits and actor.master_dtype == "bfloat16":
        raise UserError(
            "actor.optimizer=adamw_8bit trains float32 parameters; set actor.master_dtype=float32, or "
            "actor.optimizer=adamw, whose moments are bfloat16 with actor.master_dtype=bfloat16"
        )
    if in_8_bits and offloads_all:
        raise UserError(
            "actor.offload=all runs the optimizer on the host, for which adamw_8bit is not made; set "
            "actor.optimizer=adamw, or actor.offload=optimizer"
        )
    if actor.keep_gathered and (offloads_all or actor.offload_reference):
        offload = "actor.offload=all" if offloads_all else "actor.offload_reference=true"
        raise UserError(
            f"actor.keep_gathered=true holds whole parameters on the device, off which {offload} is "
            "to keep them; set one of the two"
        )
    if actor.shard_size and actor.num_ranks % actor.shard_size:
        raise UserError(
            f"actor.shard_size={actor.shard_size} does not divide actor.num_ranks={actor.num_ranks} into "
            "whole copies of the policy; set a divisor, or null for one copy that all ranks share"
        )


def _check_budget(config: Config) -> None:
    """Whole groups, whole updates."""
    n, rollouts = config.responses_per_prompt, config.rollout.rollouts_per_step
    updates = config.actor.updates_per_step
    if rollouts % n:
        raise UserError(
            f"rollout.rollouts_per_step={rollouts} is not a multiple of the {n} responses per prompt "
            f"(rollout.n) that algorithm.name={config.algorithm.name} uses"
        )
    if rollouts % updates:
        raise UserError(
            f"actor.updates_per_step={updates} does not divide rollout.rollouts_per_step={rollouts}"
        )
    if config.holds_out:
        prompts = config.prompts_per_step
        held = math.ceil(config.kl_probe_fraction * prompts)
        if (prompts - held) * n < updates:
            raise UserError(
                f"actor.kl_probe=held_out takes {held} of the {prompts} prompts of a step, too many for "
                f"actor.updates_per_step={updates}; lower actor.kl_probe_fraction, or set "
                "actor.kl_probe=trained"
            )


def _check_overlap(config: Config) -> None:
    """What may run at the same time."""
    lag, early = config.rollout.lag, config.actor.score_early == "always"
    local = config.cluster.launcher == "local"
    if local and (lag or early):
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
    uncorrected = config.correction_options["weight"] == "none" and not config.corrects_itself
    if lag and uncorrected and config.algorithm.correction.mask == "none":
        raise UserError(
            "rollout.lag=1 trains on responses of older weights and algorithm.correction.weight=none does "
            "not correct for it; remove that, or set algorithm.correction.mask"
        )
    if lag and config.sampler.dynamic and config.sampler_name == "uncertainty":
        raise UserError(
            "rollout.lag=1 with sampler.dynamic=true and sampler.name=uncertainty: further draws would "
            "depend on how far the training of the step before is; turn one of them off"
        )
    counts = {
        "actor.num_ranks": config.actor.num_ranks,
        "rollout.workers": config.rollout.workers,
        "rollout.tensor_parallel": config.rollout.tensor_parallel,
    }
    if local and (several := [f"{key}=1" for key, count in counts.items() if count != 1]):
        raise UserError(f"cluster.launcher=local runs in one process; set {' '.join(several)}")


def _check_placement(config: Config) -> None:
    """Engines and ranks that take turns on the same devices, and how weights get from one to the other."""
    if config.cluster.placement != "auto" and config.cluster.launcher == "local":
        raise UserError(
            f"cluster.placement={config.cluster.placement} places processes, and cluster.launcher=local runs "
            "in one; remove it"
        )
    if config.cluster.weight_transfer == "object_store" and config.rollout.tensor_parallel > 1:
        raise UserError(
            "cluster.weight_transfer=object_store reaches an engine's first process only, and "
            f"rollout.tensor_parallel={config.rollout.tensor_parallel} gives it several; set broadcast, or "
            "ipc where engines and ranks share devices"
        )
    if config.cluster.weight_transfer == "ipc" and config.cluster.placement == "apart":
        raise UserError(
            "cluster.weight_transfer=ipc is between processes on one device, and cluster.placement=apart "
            "gives each its own; set broadcast"
        )
    if config.cluster.placement != "colocated":
        return
    chosen = "cluster.placement=colocated has engines and ranks take turns on the same devices"
    for key, at_the_same_time in (
        ("rollout.lag=1", config.rollout.lag == 1),
        ("actor.score_early=always", config.actor.score_early == "always"),
    ):
        if at_the_same_time:
            raise UserError(f"{chosen}, and {key} works at the same time; set cluster.placement=apart")
    each, ranks = config.rollout.tensor_parallel, config.actor.num_ranks
    if (shared := config.rollout.workers * each) != ranks:
        raise UserError(
            f"{chosen}: rollout.workers={config.rollout.workers} times rollout.tensor_parallel={each} is "
            f"{shared}, which must be actor.num_ranks={ranks}"
        )


def _check_environment(config: Config) -> None:
    """What workers get in their environment."""
    for name, value in config.cluster.env.items():
        key = f"cluster.env.{name}"
        if not isinstance(value, str | int | float | None) or isinstance(value, bool):
            raise UserError(
                f"{key}={in_yaml(value)} must be text, a number or null; write what it is to hold"
            )
        if name.startswith(TOO_LATE):
            raise UserError(
                f"{key} is read before a worker could set it; set it where Ray is started on a node"
            )
        if name in OURS:
            raise UserError(f"{key} is overwritten; {OURS[name]} decides")
