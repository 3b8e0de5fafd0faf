"""The sections of a config that say how scores become gradients, and which prompts are drawn.

``null`` always means the method's own (or the loss's own) value; which those are is in the classes of
`mssr.algorithms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mssr.config.options import option, section


@dataclass
class BaselineConfig:
    """What is subtracted from a score; the first two apart, the Beta baseline of single-rollout methods."""

    name: str | None = option(None, choices="none, batch_mean, group_mean, leave_one_out, beta")
    """null is the method's own; another gives the method another baseline."""
    shrinkage: bool | None = option(None)
    """Shrink the baseline of a prompt towards that of the others (arXiv 2511.03710), for group_mean,
    leave_one_out and beta. null: off."""
    prior_strength: float = option(1.0, "> 0", read_if="algorithm.name takes it")
    """Pseudo-counts behind the first value of a prompt, > 0."""
    prior_mean: float | None = option(None, "[0, 1]", read_if="algorithm.name takes it")
    """First value of a prompt; null takes the running mean reward of the run."""
    init_rollouts: int | None = option(None, ">= 0", first_values=True, read_if="algorithm.name takes it")
    """Responses to every prompt before training that give it its first value: a pass over all data,
    kept in init_rollouts.jsonl and reused by later starts. null: 8 for spo, else 0 (no pass)."""
    init_strength: float | None = option(
        None, "> 0", read_if="algorithm.name takes it and init_rollouts != 0"
    )
    """Pseudo-counts behind a value from that pass; null is 1 / (1 - eta_min)."""
    init_smoothing: float = option(0.5, ">= 0", read_if="algorithm.name takes it and init_rollouts != 0")
    """c of the first value (s + c) / (n + 2c), s of n correct; 0 takes the plain mean."""


@dataclass
class DiscountConfig:
    """Discount eta of the Beta baseline (arXiv 2512.18215)."""

    eta: float | None = option(None, "[0, 1]")
    """A fixed discount; null adapts it to the change of the policy."""
    eta_min: float = option(0.875, "(0, 1)")
    """Discount while the policy changes by kl_target or more: fast forgetting."""
    eta_max: float = option(0.96, "(0, 1)")
    """Discount while the policy does not change: long memory."""
    kl_target: float = option(0.01, "> 0", read_if="eta_rule != half_life")
    """KL (nats per token) at which eta reaches eta_min."""
    window: int = option(20, "> 0", read_if="kl_source != last_visit")
    """Steps over which the KL is averaged."""
    eta_rule: str | None = option(None, choices="monotone, published_code, half_life")
    """monotone (falls with the KL), published_code (the authors' code: rises up to kl_target, then
    drops), half_life (2^(-D/half_life), SPO). null: half_life for spo, else monotone."""
    kl_source: str | None = option(None, choices="update, reference, last_visit")
    """Which KL, over response tokens: update (before against after the step), reference (policy against
    the frozen base), last_visit (a prompt's previous response, scored again: an eta of its own for every
    prompt). null: last_visit for spo, else update."""
    half_life: float = option(0.06, "> 0", read_if="eta_rule = half_life")
    """Mean change of a log-prob that halves the memory."""


@dataclass
class ShapingConfig:
    """Entropy-shaped advantage, A + min(coef * H, |A| / divisor) for every token; and which tokens learn."""

    enabled: bool | None = option(None)
    """Of entropy. null follows the method: on for mssr, off for the others."""
    coef: float = option(0.4, ">= 0", read_if="enabled = true")
    """Multiplies the entropy (nats)."""
    divisor: float = option(2.0, "> 0", read_if="enabled = true")
    """Bounds the bonus by |A| / divisor; above 1 the sign of an advantage never flips."""
    entropy: str = option("exact", choices="exact, sampled", read_if="enabled = true")
    """exact (over the vocabulary), or sampled (-p log p of the sampled token, as the authors' code)."""
    visual: str = option("none", choices="none, vppo, vepo")
    """Train on the tokens that depend on the image: vppo (and responses count by how much they do), vepo
    (those that are uncertain, too). Prompts without images are left alone."""
    visual_fraction: float | None = option(None, "(0, 1]", read_if="visual != none")
    """Share of a response's tokens that learn; null: 0.4 for vppo, 0.2 for vepo."""
    negative_fraction: float = option(1.0, "(0, 1]")
    """Share of a response's tokens, the least likely ones, that learn where the advantage is negative
    (negative-token filtering, whose authors take 0.1); 1 is all."""


@dataclass
class EntropyControlConfig:
    """EntroPIC: confident tokens are weighed so that the entropy stays near a target."""

    target: float | None = option(None, "> 0")
    """Entropy to keep (nats per token); null for no control."""
    proportional: float = option(1.0, ">= 0", read_if="target != null")
    """Gain of the last step's error."""
    integral: float = option(0.01, ">= 0", read_if="target != null")
    """Gain of the sum of all errors."""
    confident: float = option(0.95, "(0, 1)", read_if="target != null")
    """Probability of a sampled token from which it is weighed."""


@dataclass
class LossConfig:
    """The policy-gradient loss, and what is added to it."""

    name: str | None = option(None)
    """ppo, gspo, cispo, sapo, dis, flash_reinforce, or path/to/file.py:function. null is the method's own:
    flash_reinforce for flash_reinforce, else ppo."""
    clip_low: float | None = option(None, "> 0", read_if="algorithm.loss.name takes it")
    """The policy ratio is clipped below at 1 - clip_low; null is the loss's own (ppo 0.2, dis 0.3)."""
    clip_high: float | None = option(None, "> 0", read_if="algorithm.loss.name takes it")
    """The policy ratio is clipped above at 1 + clip_high; null is the loss's own (ppo 0.3, dis 5)."""
    dual_clip: float | None = option(3.0, read_if="algorithm.loss.name takes it")
    """For negative advantages the ppo loss is at most -dual_clip * A; null for none."""
    tau_positive: float = option(1.0, "> 0", read_if="algorithm.loss.name takes it")
    """Temperature of sapo's gate for positive advantages."""
    tau_negative: float = option(1.05, "> 0", read_if="algorithm.loss.name takes it")
    """Temperature of sapo's gate for negative advantages."""
    max_kl: float = option(0.003, "> 0", read_if="algorithm.loss.name takes it")
    """Mean binary KL between engine and policy over which flash_reinforce drops a response."""
    options: dict[str, Any] = option({})
    """Options of a loss from a file."""
    aggregation: str | None = option(None, choices="token_mean, sequence_mean, constant_length")
    """sequence_mean is the mean over sequences of their token means, constant_length the sum over sequences
    * constant_length. null: constant_length for dr_grpo, sequence_mean for gspo and flash_reinforce, else
    token_mean."""
    constant_length: int | None = option(None, "> 0", read_if="aggregation = constant_length")
    """Tokens of a response in constant_length; null is rollout.max_response_length."""
    entropy_coef: float = option(0.0, ">= 0")
    """Weight of the entropy bonus: the loss loses entropy_coef * H."""
    text_anchor_coef: float = option(0.0, ">= 0")
    """Weight of the k3 towards the policy's own log-probs of the response without the image."""


@dataclass
class KLConfig:
    """Regularisation towards the frozen base model."""

    coef: float = option(0.01, ">= 0")
    """Weight; 0 drops the reference pass."""
    estimator: str = option("k3", choices="k1, k2, k3", read_if="coef != 0")
    """k1 (-d), k2 (d^2/2) or k3 (exp(d) - d - 1), with d = log pi_ref - log pi."""
    placement: str = option("loss", choices="loss, reward")
    """loss, or reward (subtracted from the reward of every token, as in the first REINFORCE++)."""
    target: float | None = option(None, "> 0", read_if="coef != 0")
    """The weight adapts so that the KL stays near this (nats per token); null keeps it fixed."""
    horizon: float = option(10000.0, "> 0", read_if="target != null")
    """Rollouts over which an adaptive weight changes by at most a fifth."""


@dataclass
class CorrectionConfig:
    """Importance weights for the mismatch of engine and actor: ratio = pi_actor / pi_engine."""

    weight: str | None = option(None, choices="none, token, sequence")
    """none, token (min(ratio, max_weight) on every token's policy loss) or sequence (the ratio of the
    whole response). null: token with rollout.lag=1, whose responses are of older weights, else none; and none
    with dis and flash_reinforce, which correct for it themselves."""
    max_weight: float = option(2.0, "> 0", read_if="weight != none")
    """Where the weights are truncated."""
    mask: str = option("none", choices="none, token, sequence, geometric")
    """none, token, sequence or geometric (mean ratio of a response): what leaves [mask_low, mask_high]
    is left out of the policy loss."""
    mask_low: float = option(0.5, "> 0", read_if="mask != none")
    """Smallest ratio that stays."""
    mask_high: float = option(5.0, read_if="mask != none")
    """Largest ratio that stays."""


@dataclass
class AlgorithmConfig:
    """Scores to gradients."""

    name: str = option("mssr")
    """mssr, mvsr, spo, grpo, dr_grpo, rloo, reinforce_pp, reinforce_pp_baseline, lite_ppo, flash_reinforce,
    maxrl, dbb, or path/to/file.py:Class."""
    normalisation: str | None = option(
        None, choices="none, batch_std, reward_std, group_std, whiten, mean, bernoulli_std"
    )
    """What makes the difference of score and baseline an advantage; null is the method's own."""
    baseline: BaselineConfig = section(BaselineConfig)
    discount: DiscountConfig = section(
        DiscountConfig, read_if="algorithm.name takes it and algorithm.discount.eta = null"
    )
    shaping: ShapingConfig = section(ShapingConfig)
    entropy_control: EntropyControlConfig = section(EntropyControlConfig)
    loss: LossConfig = section(LossConfig)
    kl: KLConfig = section(KLConfig)
    correction: CorrectionConfig = section(CorrectionConfig)
    weighting: str | None = option(None, choices="sequence, token", read_if="algorithm.name takes it")
    """Statistics over the batch count each sequence, or each token. null: token for reinforce_pp and
    reinforce_pp_baseline, else sequence."""
    eps: float | None = option(None, "> 0", read_if="algorithm.name takes it")
    """Keeps a division by a standard deviation finite; null takes the method's own. rloo has none."""
    floor: float | None = option(None, "(0, 0.5)", read_if="algorithm.name takes it")
    """Smallest baseline that mean divides by; bernoulli_std keeps it in [floor, 1 - floor]. null: 0.01."""
    options: dict[str, Any] = option({})
    """Options of a method from a file."""


@dataclass
class SamplerConfig:
    """Which prompts a step uses."""

    name: str | None = option(None, choices="epochs, uncertainty")
    """epochs (each prompt once an epoch, shuffled), or uncertainty (drawn with weight
    sqrt(v(1-v)) + uncertainty_eps, v the Beta baseline). null: uncertainty for spo, else epochs."""
    uncertainty_eps: float = option(0.05, ">= 0", read_if="name = uncertainty")
    """Chance that remains for prompts whose outcome is certain."""
    dynamic: bool = option(False)
    """Draw further prompts for groups whose rewards are all equal (DAPO, arXiv 2503.14476)."""
    max_draws: int = option(8, "> 0", read_if="dynamic = true")
    """Draws of a step, the first included, before dynamic sampling gives up with an error."""
