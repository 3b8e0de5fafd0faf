"""What a run is made of: one dataclass a room, one docstring a field.

Nothing rewrites a config once `load_config` has made it. What follows from several fields (how many responses
a prompt gets, whether shaping is on) is asked of the properties of `Config`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from mssr import algorithms
from mssr.config.actor import ActorConfig
from mssr.config.algorithm import AlgorithmConfig, SamplerConfig
from mssr.config.data import DataConfig, RewardConfig
from mssr.config.options import FREE, READ, REFUSED, UNREAD, option, section

_T = TypeVar("_T")
_WATCHED = "watch.entropy_floor != null or watch.accuracy_drop != null or watch.length_growth != null"


@dataclass
class ModelConfig:
    """The policy, and the frozen reference, which is a copy of it."""

    path: str = option("", required=True, evaluation="--model")
    """Hugging Face directory or hub name of a model of one of the families in docs/models.md."""
    dtype: str = option("auto", choices="auto, float32, bfloat16")
    """Of the forward pass; auto is float32 on CPU, bfloat16 on GPU. What is trained: actor.master_dtype."""
    attn_implementation: str = option("auto", choices="auto, varlen, sdpa, eager, flash_attention_2")
    """Attention in the actor: auto (varlen, or sdpa where layers see a sliding window), varlen (each packed
    sequence by itself, on a GPU with torch's flash kernel), sdpa, eager (both with a mask whose cost is the
    square of actor.micro_batch_tokens), flash_attention_2 (the flash-attn package)."""
    freeze_vision: bool = option(False)
    """Train the language model only."""
    trust_remote_code: bool = option(False)
    """Let transformers and vLLM run code that ships with the model."""


@dataclass
class RolloutConfig:
    """Generation."""

    engine: str = option("vllm", choices="vllm, hf", resume=REFUSED, first_values=True)
    """vllm, or hf (transformers generate) for machines without vLLM."""
    rollouts_per_step: int = option(2048, "> 0", resume=REFUSED, evaluation=UNREAD)
    """Responses a step; the same for every method."""
    n: int | None = option(None, "> 0", resume=REFUSED, evaluation="--n")
    """Responses per prompt; null follows the method: 8 for grpo and rloo, 1 for the others."""
    temperature: float = option(1.0, "> 0", evaluation="--temperature", first_values=True)
    """Sampling temperature; the actor's log-probs use it too."""
    max_response_length: int = option(2048, "> 0", first_values=True)
    """Longest response in tokens."""
    lag: int = option(0, "0 or 1")
    """1: the next step's responses are generated, with the weights as they are, while the actor trains on
    this step's; algorithm.correction accounts for the difference. 0: one after the other."""
    workers: int = option(1, "> 0", resume=FREE)
    """Number of engines; they share one queue of requests."""
    tensor_parallel: int = option(1, "> 0", resume=FREE, read_if="rollout.engine = vllm")
    """Devices that share an engine's weights, for models that do not fit on one; else 1 is faster."""
    max_num_seqs: int | None = option(None, "> 0", resume=FREE)
    """Sequences an engine decodes at the same time; null: what vLLM thinks right for the GPU, 256 on CPU."""
    max_num_batched_tokens: int | None = option(None, "> 0", resume=FREE, read_if="rollout.engine = vllm")
    """Tokens an engine computes in one pass; null: what vLLM thinks right for the GPU, enough for a prompt
    of any length on CPU."""
    kv_cache_gib: int = option(4, "> 0", resume=FREE)
    """Memory for keys and values on CPU, GiB per engine."""
    gpu_memory_utilization: float | None = option(None, "(0, 1]", resume=FREE)
    """Share of GPU memory an engine may take; null: 0.9, or 0.65 where an actor rank is on the same GPU."""
    enforce_eager: bool = option(False, resume=FREE)
    """Do not capture CUDA graphs (always so on CPU)."""
    check_weights: str = option("first", choices="first, always, never", resume=FREE, evaluation=UNREAD)
    """Compare the engines' weights with the actor's, by checksum, after a transfer: first (the first of a run
    and of an engine that was replaced), always, never."""
    engine_options: dict[str, Any] = option({}, resume=FREE, first_values=True)
    """Further arguments for vllm.LLM, passed as they are."""


@dataclass
class ClusterConfig:
    """Processes and machines."""

    launcher: str = option("ray", choices="ray, local")
    """ray, or local: everything in one process (pdb, notebooks, machines without Ray)."""
    address: str | None = option(None)
    """Address of a running Ray cluster, or auto; null starts one on this machine."""
    device: str = option("auto", choices="auto, cpu, cuda")
    """cpu, cuda, or auto: cuda where there is one."""
    placement: str = option("auto", choices="auto, colocated, apart", evaluation=UNREAD)
    """colocated (an engine and as many ranks as it has devices take turns on these), apart (each has its
    own), or auto: colocated on GPUs where counts and memory allow, apart otherwise."""
    weight_transfer: str = option(
        "auto", choices="auto, object_store, ipc, broadcast", read_if="launcher = ray", evaluation=UNREAD
    )
    """How engines get weights: object_store (Ray's, through host memory), ipc (in buckets from a rank on
    the same device), broadcast (NCCL, on CPU gloo), or auto: ipc where colocated on GPUs, broadcast where
    apart on GPUs or an engine has several processes, else object_store."""
    env: dict[str, Any] = option({}, read_if="launcher = ray")
    """Environment variables of all workers, beside those of the driver that begin with NCCL_, GLOO_, VLLM_ or
    HF_, and before these; null: as the driver has it."""
    threads_per_actor: int | None = option(None, "> 0")
    """CPU threads of an actor rank; null: 1, or with actor.offload=all on a GPU its share of the cores."""
    threads_per_rollout: int = option(2, "> 0")
    """CPU threads of an engine, shared out over its processes; on a GPU so many prepare prompts meanwhile."""
    hang_timeout_s: float = option(900.0, "> 0")
    """A worker that shows no sign of life for so long (no engine step, no micro-batch, no answer) is
    taken for hung: its stacks are written to the run directory, and it is replaced."""
    start_timeout_s: float = option(1800.0, "> 0")
    """How long a worker may take to start and load its model."""
    replace_timeout_s: float = option(300.0, "> 0", read_if="launcher = ray")
    """How long a machine that is gone is waited for, or another; then the run goes on without its engines,
    and ends if it had actor ranks."""


@dataclass
class TrainerConfig:
    """The loop around it all."""

    steps: int = option(120)
    """Training steps in all. A later setting of trainer.epochs takes its place and makes it 0."""
    epochs: int | None = option(None, "> 0")
    """In place of trainer.steps: so many times as many steps as the usable prompts of data.train are enough
    for (what is left over begins the next epoch; further draws of sampler.dynamic are not counted)."""
    run_dir: str | None = option(None)
    """Where everything is written; null is runs/<experiment_name>."""
    val_every: int = option(10, ">= 0")
    """Validate before the first step, then every so many steps and after the last; 0 never."""
    val_max_prompts: int | None = option(None, "> 0")
    """Validate on the first so many prompts; null on all."""
    save_every: int = option(20, ">= 0")
    """Checkpoint every so many steps and after the last; 0 never."""
    save_in_background: bool = option(True)
    """Copy the state to host memory and write it while training goes on; false waits for the disk."""
    keep_checkpoints: int = option(2, "> 0")
    """Newest complete checkpoints to keep; that with the best validation accuracy is kept besides."""
    samples_every: int = option(10, ">= 0")
    """Write train samples and the report every so many steps; 0 never (the report then at the end).
    Validation always writes its own samples."""
    resume: str = option("auto")
    """auto (newest checkpoint of the run directory), never, or a checkpoint directory."""
    resume_force: bool = option(False)
    """Resume although model, data or algorithm differ from the checkpoint's."""
    max_restarts: int = option(3, ">= 0", evaluation=READ)
    """Workers that died or hung are replaced so many times between two checkpoints; then the run stops."""
    loggers: list[str] = option([], choices="wandb, tensorboard")
    """Besides metrics.jsonl: wandb, tensorboard."""
    progress: str = option("auto", choices="auto, live, plain, off", evaluation=READ)
    """auto (live line on a terminal, else quiet), live, plain (a line a step), off."""
    profile_steps: list[int] = option([])
    """Steps whose update is traced on every rank with the torch profiler (Chrome trace in
    <run_dir>/profiles), beside a timeline of all Ray workers up to then."""
    stop_on_collapse: bool = option(False, read_if=_WATCHED)
    """Checkpoint and stop when one of the signs in watch lasts; false only warns."""


@dataclass
class WatchConfig:
    """Signs that a run collapses: warned of once an episode, and marked in curves and report."""

    entropy_floor: float | None = option(0.01, "> 0")
    """Policy entropy (nats per token) below this: the policy says one thing only. null: not watched."""
    accuracy_drop: float | None = option(0.5, "(0, 1)")
    """Train accuracy (mean of 10 steps) has lost more than this share of its best. null: not watched."""
    length_growth: float | None = option(4.0, "> 1")
    """Responses longer than so many times their mean over the first 10 steps while more of them are cut
    (a tenth of all more than then), or half of all more cut than then. null: not watched."""
    patience: int = option(5, "> 0", read_if=_WATCHED)
    """Steps in a row that a sign must last to count, and be absent to be over."""


@dataclass
class Config:
    """A run. ``load_config`` makes one from a file and overrides."""

    experiment_name: str = option("mssr", resume=FREE, evaluation=UNREAD)
    """Names the run directory and the run in loggers."""
    seed: int = option(0, resume=REFUSED, first_values=True)
    """Decides data order and sampling."""
    model: ModelConfig = section(ModelConfig, resume=REFUSED, first_values=True)
    data: DataConfig = section(DataConfig, resume=REFUSED, first_values=True)
    reward: RewardConfig = section(RewardConfig, resume=REFUSED, first_values=True)
    algorithm: AlgorithmConfig = section(AlgorithmConfig, resume=REFUSED, evaluation=UNREAD)
    sampler: SamplerConfig = section(SamplerConfig, resume=REFUSED, evaluation=UNREAD)
    rollout: RolloutConfig = section(RolloutConfig)
    actor: ActorConfig = section(ActorConfig, evaluation=UNREAD)
    cluster: ClusterConfig = section(ClusterConfig, resume=FREE)
    trainer: TrainerConfig = section(TrainerConfig, resume=FREE, evaluation=UNREAD)
    watch: WatchConfig = section(WatchConfig, evaluation=UNREAD)

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.run_dir or f"runs/{self.experiment_name}")

    @property
    def responses_per_prompt(self) -> int:
        """n: as configured, else the method's default (8 for the group methods, 1 for the others)."""
        return _own(self.rollout.n, self.method.default_n)

    @property
    def prompts_per_step(self) -> int:
        return self.rollout.rollouts_per_step // self.responses_per_prompt

    @property
    def shapes_entropy(self) -> bool:
        return _own(self.algorithm.shaping.enabled, self.method.shapes_entropy)

    @property
    def method(self) -> algorithms.Method | type[algorithms.Algorithm]:
        """What ``algorithm.name`` means."""
        return algorithms.get(self.algorithm.name, **self.choices)

    @property
    def choices(self) -> dict[str, Any]:
        """Baseline and normalisation in place of the method's own, see `mssr.algorithms.get`."""
        own = self.algorithm
        return {
            "baseline": own.baseline.name,
            "normalisation": own.normalisation,
            "shrinkage": own.baseline.shrinkage,
        }

    @property
    def loss_name(self) -> str:
        return _own(self.algorithm.loss.name, self.method.default_loss)

    @property
    def corrects_itself(self) -> bool:
        """Whether the loss weighs by policy and engine, which a correction would do twice."""
        losses = algorithms.policy_losses
        return losses.is_against_engine(losses.get_loss(self.loss_name))

    @property
    def estimator_options(self) -> dict[str, Any]:
        """Those of the configured options that the method takes; a null is left to the method."""
        section = self.algorithm
        candidates = to_dict(section.baseline) | to_dict(section.discount)
        candidates |= {"eps": section.eps, "weighting": section.weighting, "floor": section.floor}
        taken = algorithms.options(section.name, self.choices)
        return {k: v for k, v in candidates.items() if v is not None and k in taken} | section.options

    @property
    def _method_options(self) -> dict[str, Any]:
        """All of the method, as configured, else its own."""
        return algorithms.options(self.algorithm.name, self.choices) | self.estimator_options

    @property
    def kl_source(self) -> str:
        """Which KL the method's discount follows."""
        return self._method_options.get("kl_source", self.method.kl_source)

    @property
    def kl_probe_fraction(self) -> float:
        return _own(self.actor.kl_probe_fraction, 0.0625 if self.holds_out else 0.25)

    @property
    def holds_out(self) -> bool:
        """Whether some rollouts of a step are scored and observed but not trained on."""
        return self.actor.kl_probe == "held_out"

    @property
    def init_rollouts(self) -> int:
        return self._method_options.get("init_rollouts", 0)

    @property
    def sampler_name(self) -> str:
        return _own(self.sampler.name, self.method.default_sampler)

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen base model is to be held."""
        return self.algorithm.kl.coef > 0 or self.kl_source == "reference"

    @property
    def replicas(self) -> int:
        """Whole copies of the policy, each of which ``actor.shard_size`` ranks share."""
        return self.actor.num_ranks // _own(self.actor.shard_size, self.actor.num_ranks or 1)

    @property
    def trains_vision(self) -> bool:
        """Whether the vision tower changes; with LoRA only the language model does."""
        return not self.model.freeze_vision and self.actor.lora.rank == 0

    @property
    def kl_in_loss(self) -> bool:
        return self.algorithm.kl.coef > 0 and self.algorithm.kl.placement == "loss"

    @property
    def kl_in_reward(self) -> bool:
        return self.algorithm.kl.coef > 0 and self.algorithm.kl.placement == "reward"

    @property
    def meant(self) -> dict[str, Any]:
        """What options that may be null mean here, by key."""
        return {
            "algorithm.baseline.init_rollouts": self.init_rollouts,
            "algorithm.discount.eta_rule": self._method_options.get("eta_rule"),
            "algorithm.discount.kl_source": self.kl_source,
            "algorithm.shaping.enabled": self.shapes_entropy,
            "algorithm.loss.name": self.loss_name,
            "algorithm.loss.aggregation": self.aggregation,
            "algorithm.correction.weight": self.correction_options["weight"],
            "sampler.name": self.sampler_name,
        }

    @property
    def loss_options(self) -> dict[str, Any]:
        """Those of the configured options that the policy loss takes; a null is left to the loss."""
        loss = self.algorithm.loss
        names = ("clip_low", "clip_high", "dual_clip", "tau_positive", "tau_negative", "max_kl")
        taken = algorithms.policy_losses.loss_options(self.loss_name)
        options = {k: getattr(loss, k) for k in names if k in taken}
        # A null dual_clip turns it off.
        return {k: v for k, v in options.items() if v is not None or k == "dual_clip"} | loss.options

    @property
    def aggregation(self) -> str:
        """How the losses of tokens become one: as configured, or the method's, or the loss's own."""
        loss = self.algorithm.loss
        of_loss = algorithms.policy_losses.loss_aggregation(self.loss_name)
        return _own(loss.aggregation, self.method.aggregation or of_loss or "token_mean")

    @property
    def correction_options(self) -> dict[str, Any]:
        """Those of `mssr.algorithms.correction.rollout_correction`."""
        options = to_dict(self.algorithm.correction)
        own = "token" if self.rollout.lag and not self.corrects_itself else "none"
        return options | {"weight": _own(options["weight"], own)}

    @property
    def constant_length(self) -> int:
        return _own(self.algorithm.loss.constant_length, self.rollout.max_response_length)


def _own(configured: _T | None, default: _T) -> _T:
    return default if configured is None else configured


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config dataclass, ready for YAML or JSON."""
    return asdict(config)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a dict-valued field (engine_options) is a leaf if empty."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
