"""What a run is made of: one dataclass a room, one docstring a field.

A YAML file and ``key=value`` overrides are merged over these defaults by `load_config`; nothing
rewrites a config afterwards. What follows from several fields (how many responses a prompt gets,
whether shaping is on) is asked of the methods here, in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from mssr import algorithms

PAPER_INSTRUCTION = (
    "First think about the reasoning process inside <think> </think> tags, "
    "then give the final answer inside \\boxed{}."
)


@dataclass
class ModelConfig:
    """The policy, and the frozen reference, which is a copy of it."""

    path: str = ""
    """Hugging Face directory or hub name of a Qwen2.5-VL model."""
    dtype: str = "auto"
    """Dtype of the forward pass: float32, bfloat16, or auto (float32 on CPU, bfloat16 on GPU).
    Master weights and optimizer are float32 in every case."""
    attn_implementation: str = "sdpa"
    """Attention of transformers in the actor: sdpa, eager, flash_attention_2."""
    freeze_vision: bool = False
    """Train the language model only."""
    trust_remote_code: bool = False
    """Let transformers and vLLM run code that ships with the model."""


@dataclass
class DataConfig:
    """Where the prompts come from and how a row becomes one."""

    train: str = ""
    """Parquet, JSON or JSONL file, a directory of a saved dataset, or hub/name@split."""
    val: str | None = None
    """The same for validation; null to train without."""
    id_column: str | None = None
    """Column with a stable id; null takes a hash of question, images and answer."""
    images_column: str = "images"
    """Column with a list of images (or one); a row may have none."""
    problem_column: str = "problem"
    """Column with the question; each <image> in it is replaced by an image, in order."""
    answer_column: str = "answer"
    """Column with the ground truth as text."""
    system_prompt: str | None = None
    """Put before the question as the system turn; null leaves it to the chat template."""
    instruction: str = PAPER_INSTRUCTION
    """Appended to every question; empty for none."""
    min_pixels: int = 262144
    """Smaller images are enlarged to this many pixels."""
    max_pixels: int = 4194304
    """Larger images are shrunk to this many pixels."""
    max_prompt_length: int = 2048
    """Longest prompt in tokens, vision placeholders included; longer ones are dropped with a count."""
    max_bad_fraction: float = 0.0
    """Go on if at most this fraction of the rows is unusable; they are listed in bad_rows.jsonl."""
    shuffle: bool = True
    """New random order in every epoch; false keeps the order of the file."""


@dataclass
class RewardConfig:
    """Which function turns a response into a score."""

    name: str = "exact_match"
    """exact_match, or path/to/file.py:function taking (response, answer)."""


@dataclass
class BaselineConfig:
    """Beta baseline of the single-rollout methods."""

    prior_strength: float = 1.0
    """Pseudo-counts behind the first value of a prompt, > 0."""
    prior_mean: float | None = None
    """First value of a prompt; null takes the running mean reward of the run."""


@dataclass
class DiscountConfig:
    """Adaptive discount eta of the Beta baseline (arXiv 2512.18215)."""

    eta_min: float = 0.875
    """Discount while the policy changes by kl_target or more a step: fast forgetting."""
    eta_max: float = 0.96
    """Discount while the policy does not change: long memory."""
    kl_target: float = 0.01
    """Mean KL between successive policies (nats per token) at which eta reaches eta_min."""
    window: int = 20
    """Steps over which the KL is averaged."""


@dataclass
class ShapingConfig:
    """Entropy-shaped advantage: A + min(coef * H, |A| / divisor) for every token."""

    enabled: bool | None = None
    """null follows the method: on for mssr, off for the others."""
    coef: float = 0.4
    """Multiplies the entropy (nats)."""
    divisor: float = 2.0
    """Bounds the bonus by |A| / divisor; above 1 the sign of an advantage never flips."""


@dataclass
class AlgorithmConfig:
    """Scores to gradients."""

    name: str = "mssr"
    """mssr, mvsr, grpo, rloo or reinforce_pp."""
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    """Read by mssr and mvsr."""
    discount: DiscountConfig = field(default_factory=DiscountConfig)
    """Read by mssr and mvsr."""
    shaping: ShapingConfig = field(default_factory=ShapingConfig)
    """Read where shaping is on."""
    eps: float | None = None
    """Keeps a division by a standard deviation finite; null takes the method's own. rloo has none."""
    clip_low: float = 0.2
    """The policy ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.3
    """The policy ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = 3.0
    """For negative advantages the loss is at most -dual_clip * A; null for none."""
    kl_coef: float = 0.01
    """Weight of the k3 KL to the reference policy in the loss; 0 drops the reference pass."""


@dataclass
class RolloutConfig:
    """Generation."""

    engine: str = "vllm"
    """vllm, or hf (transformers generate) for machines without vLLM."""
    rollouts_per_step: int = 2048
    """Responses a step; the same for every method."""
    n: int | None = None
    """Responses per prompt; null follows the method: 8 for grpo and rloo, 1 for the others."""
    temperature: float = 1.0
    """Sampling temperature; the actor's log-probs use it too."""
    max_response_length: int = 2048
    """Longest response in tokens."""
    workers: int = 1
    """Number of engines; the requests of a step are shared out among them."""
    max_num_seqs: int = 256
    """Sequences an engine decodes at the same time."""
    kv_cache_gib: int = 4
    """Memory for keys and values on CPU, GiB per engine."""
    gpu_memory_utilization: float = 0.85
    """Share of GPU memory an engine may take."""
    enforce_eager: bool = False
    """Do not capture CUDA graphs (always so on CPU)."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments for vllm.LLM, passed as they are."""


@dataclass
class ActorConfig:
    """The FSDP2 policy update."""

    num_ranks: int = 1
    """Processes that share the policy, one GPU each where there are GPUs."""
    updates_per_step: int = 4
    """Optimizer steps a step; every method gets the same number."""
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_schedule: str = "constant"
    """constant, linear or cosine decay to 0 over trainer.steps, after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW moments."""
    weight_decay: float = 0.01
    """AdamW decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this."""
    micro_batch_tokens: int = 16384
    """Tokens a rank packs into one forward pass."""
    keep_gathered: bool = False
    """Hold whole parameters and gradients through an update instead of gathering them for every
    layer and pass: less communication for more memory, right for small models."""
    head_chunk_tokens: int = 1024
    """Response tokens whose logits exist at the same time."""
    kl_probe_fraction: float = 0.25
    """Share of a step's rollouts on which the KL of the update is measured, in (0, 1]."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    max_nonfinite_updates: int = 3
    """Stop after this many skipped updates in a row."""


@dataclass
class ClusterConfig:
    """Processes and machines."""

    launcher: str = "ray"
    """ray, or local: everything in one process (pdb, notebooks, machines without Ray)."""
    address: str | None = None
    """Address of a running Ray cluster, or auto; null starts one on this machine."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads_per_actor: int = 1
    """CPU threads of an actor rank."""
    threads_per_rollout: int = 2
    """CPU threads of an engine."""


@dataclass
class TrainerConfig:
    """The loop around it all."""

    steps: int = 120
    """Training steps in all."""
    run_dir: str | None = None
    """Where everything is written; null is runs/<experiment_name>."""
    val_every: int = 10
    """Validate before the first step, then every so many steps and after the last; 0 never."""
    val_max_prompts: int | None = None
    """Validate on the first so many prompts; null on all."""
    save_every: int = 20
    """Checkpoint every so many steps and after the last; 0 never."""
    keep_checkpoints: int = 2
    """Delete older checkpoints once this many newer ones are complete."""
    samples_every: int = 10
    """Write train samples every so many steps; 0 never. Validation always writes its own."""
    resume: str = "auto"
    """auto (newest checkpoint of the run directory), never, or a checkpoint directory."""
    resume_force: bool = False
    """Resume although model, data or algorithm differ from the checkpoint's."""
    loggers: list[str] = field(default_factory=list)
    """Besides metrics.jsonl: wandb, tensorboard."""
    progress: str = "auto"
    """auto (live line on a terminal, else quiet), live, plain (a line a step), off."""


@dataclass
class Config:
    """A run. ``load_config`` makes one from a file and overrides."""

    experiment_name: str = "mssr"
    """Names the run directory and the run in loggers."""
    seed: int = 0
    """Decides data order and sampling."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.run_dir or f"runs/{self.experiment_name}")

    @property
    def responses_per_prompt(self) -> int:
        """n: as configured, else the method's default (8 for the group methods, 1 for the others)."""
        if self.rollout.n is not None:
            return self.rollout.n
        return algorithms.get(self.algorithm.name).default_n

    @property
    def prompts_per_step(self) -> int:
        return self.rollout.rollouts_per_step // self.responses_per_prompt

    @property
    def shapes_entropy(self) -> bool:
        if self.algorithm.shaping.enabled is not None:
            return self.algorithm.shaping.enabled
        return algorithms.get(self.algorithm.name).shapes_entropy

    @property
    def estimator_options(self) -> dict[str, Any]:
        """Those of the configured options that the method takes, by the method's names for them."""
        candidates = to_dict(self.algorithm.baseline) | to_dict(self.algorithm.discount)
        if self.algorithm.eps is not None:
            candidates["eps"] = self.algorithm.eps
        taken = algorithms.options(self.algorithm.name)
        return {name: value for name, value in candidates.items() if name in taken}


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config dataclass, ready for YAML or JSON."""
    result: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            result[f.name] = to_dict(value)
        else:
            result[f.name] = value
    return result


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; a dict-valued field (engine_options) is a leaf if empty."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
