"""Config section ``actor``: the ranks that train the policy."""

from __future__ import annotations

from dataclasses import dataclass

from mssr.config.options import FORM, FREE, LISTED, REFUSED, option, section


@dataclass
class LoraConfig:
    """Low-rank adapters in place of full training (arXiv 2106.09685); see docs/memory.md."""

    rank: int = option(0, ">= 0", resume=FORM)
    """Rank of the adapters; 0 trains the whole model."""
    alpha: float = option(32.0, "> 0")
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = option(0.0, ">= 0 and < 1", resume=LISTED)
    """Dropout of an adapter's input, in passes with a gradient only."""
    targets: list[str] = option([], resume=FORM)
    """Names of the language model's linear layers that get adapters (q_proj, v_proj); empty means all."""


@dataclass
class ActorConfig:
    """The FSDP2 policy update."""

    num_ranks: int = option(1, "> 0", resume=FREE)
    """Processes that share the policy, one GPU each where there are GPUs."""
    shard_size: int | None = option(None, "> 0", resume=FREE)
    """Ranks that share one copy of the policy, a divisor of actor.num_ranks: with fewer than all, there are
    several copies (HSDP), and only sums of gradients go from one to another. null: all share one."""
    updates_per_step: int = option(4, "> 0")
    """Optimizer steps a step; every method gets the same number."""
    lr: float = option(1e-6, "> 0")
    """Peak learning rate of AdamW."""
    lr_schedule: str = option("constant", choices="constant, linear, cosine")
    """constant, linear or cosine decay to 0 over trainer.steps, after the warm-up."""
    warmup_steps: int = option(0, ">= 0")
    """Steps of linear warm-up."""
    betas: list[float] = option([0.9, 0.999], "[0, 1)")
    """AdamW moments."""
    weight_decay: float = option(0.01, ">= 0")
    """AdamW decoupled weight decay."""
    max_grad_norm: float = option(1.0, "> 0")
    """Clip the global gradient norm to this."""
    micro_batch_tokens: int = option(16384, "> 0", resume=FREE)
    """Tokens a rank packs into one forward pass."""
    keep_gathered: bool = option(False, resume=FREE)
    """Hold whole parameters and gradients through an update instead of gathering them for every
    layer and pass: less communication for more memory, right for small models."""
    head_chunk_tokens: int | None = option(None, "> 0", resume=FREE)
    """As many logits exist at the same time (twice) as so many tokens have; null: 2048 on GPU, 256 on CPU."""
    score_early: str = option("auto", choices="auto, always, never", resume=FREE)
    """Have the ranks score responses (log-probs before the step and of the reference) while others are still
    being generated: always, never, or auto (where ranks have GPUs of their own, which would be idle)."""
    kl_probe: str = option("trained", choices="trained, held_out")
    """Rollouts on which policy/kl_update is measured: trained (some of those that the step trains on, where
    it is too high, the more so the fewer they are), or held_out (whole prompts that are scored and observed
    and in no update: unbiased, and so many rollouts fewer to train on). docs/algorithms.md has numbers."""
    kl_probe_fraction: float | None = option(None, "(0, 1]")
    """Their share of a step's rollouts, in (0, 1]; null: 0.25 of those trained on, 0.0625 held out."""
    vision_cache_gib: float = option(
        1.0, ">= 0", read_if="model.freeze_vision = true or actor.lora.rank != 0"
    )
    """Device memory of a rank for image features that later passes and steps need not compute; 0: none."""
    activation_checkpointing: bool = option(False, resume=FREE)
    """Recompute activations in the backward pass."""
    lora: LoraConfig = section(LoraConfig, read_if="actor.lora.rank != 0", resume=REFUSED)
    optimizer: str = option("adamw", choices="adamw, adamw_8bit", resume=FORM)
    """adamw, or adamw_8bit: its moments in 8 bits (torchao)."""
    master_dtype: str = option("float32", choices="float32, bfloat16", resume=FORM)
    """Dtype of what is trained: float32, or bfloat16, rounded as actor.rounding says."""
    rounding: str = option(
        "stochastic", choices="stochastic, kahan", read_if="master_dtype = bfloat16", resume=FORM
    )
    """How updates too small for bfloat16 are kept: stochastic (rounded up or down at random, unbiased;
    moments too) or kahan (what rounding takes away is kept beside)."""
    offload: str = option("none", choices="none, optimizer, all", resume=FREE)
    """What waits in host memory, on a GPU: none, optimizer (its states, but while it steps), or all
    (parameters, gradients and states; the optimizer steps on the host)."""
    offload_reference: bool = option(
        False,
        read_if="offload != all and lora.rank = 0 and algorithm.kl.coef != 0 or "
        "algorithm.discount.kl_source = reference",
        resume=FREE,
    )
    """The reference's parameters wait in host memory, on a GPU, but for the layer in use."""
    max_nonfinite_updates: int = option(3, "> 0", resume=FREE)
    """Stop after this many updates in a row that were skipped because loss, gradient or a log-prob (the
    engine's too) was not finite; what spoilt them is in <run_dir>/nonfinite."""

    def head_chunk(self, device: str) -> int:
        """``head_chunk_tokens`` on "cpu" or "cuda"; `mssr.models.head` says why they differ."""
        return self.head_chunk_tokens or (2048 if device == "cuda" else 256)
