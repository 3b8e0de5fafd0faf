"""Rollout correction: importance weights and masks for what the engine and the actor disagree about.

The engine that samples and the actor that trains give a token different log-probs: other kernels,
another precision, or older weights. Training on the samples as if they were the actor's is then
biased. Truncated importance weights: https://fengyao.notion.site/off-policy-rl; masks: IcePop
(arXiv 2510.18855), and for whole sequences https://richardli.xyz/rl-collapse.

The factor is for the policy-gradient term only; the KL and entropy terms, which look at every token alike,
go without. The denominators stay those of all tokens, masked ones too: they are then known before any
forward pass and equal on all ranks, and a batch with much disagreement takes a smaller step, where a mean
over the tokens that are left would weigh those few all the more. (verl takes rejected tokens out of its
response mask, and so out of the denominator.)
"""

from __future__ import annotations

from typing import Literal

import torch

from mssr.algorithms.checks import check_choice, check_number
from mssr.algorithms.sequences import (
    MAX_LOG_RATIO,
    check_lengths,
    check_same_shape,
    clamped_log_ratio,
    sequence_means,
    sequence_sums,
    to_tokens,
)

WEIGHTS = ("none", "token", "sequence")
MASKS = ("none", "token", "sequence", "geometric")


def rollout_correction(
    old_log_probs: torch.Tensor,
    engine_log_probs: torch.Tensor,
    lengths: torch.Tensor,
    *,
    weight: Literal["none", "token", "sequence"] = "none",
    max_weight: float = 2.0,
    mask: Literal["none", "token", "sequence", "geometric"] = "none",
    mask_low: float = 0.5,
    mask_high: float = 5.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A factor for the policy loss of every token, from rho = pi_actor / pi_engine.

    - Weight: min(rho, max_weight) with the token's own rho (``token``), or with the product of those
      of its sequence (``sequence``: unbiased but for the truncation, and far more spread).
    - Mask: 0 where rho is outside [mask_low, mask_high], with the token's own rho (``token``), or, for
      all tokens of a sequence at once, with their product (``sequence``) or their geometric mean
      (``geometric``). IcePop keeps rho itself inside the range: with its mask, weight="token" and a
      max_weight of mask_high.

    Args:
        old_log_probs: (N,) nats, of the sampled tokens under the actor before the step.
        engine_log_probs: (N,) nats, under the engine, when it sampled them.
        lengths: (S,) int64 tokens of each whole sequence, adding up to N.
        max_weight: Where weights are truncated, > 0.
        mask_low: Smallest rho that a mask keeps, in [0, 1].
        mask_high: Largest rho that it keeps, >= 1. (Without disagreement rho is 1, which always stays.)

    Returns:
        The factor, (N,), and a dict of (N,) tensors: ``weight`` (before the mask) and ``masked`` (1
        where the mask made the factor 0). Nothing has a gradient. Log-ratios are clamped to +-20, of a
        token and of a product.
    """
    check_same_shape(old_log_probs=old_log_probs, engine_log_probs=engine_log_probs)
    check_lengths(lengths, len(old_log_probs))
    check_choice("weight", weight, WEIGHTS)
    check_choice("mask", mask, MASKS)
    check_number("max_weight", max_weight)
    if not 0 <= mask_low <= 1 <= mask_high:
        raise ValueError(f"needed: 0 <= mask_low={mask_low} <= 1 <= mask_high={mask_high}")
    log_ratio = clamped_log_ratio(old_log_probs, engine_log_probs).detach()

    def ratio(level: str) -> torch.Tensor:
        if level == "none":
            return torch.ones_like(log_ratio)
        if level == "token":
            return torch.exp(log_ratio)
        reduce = sequence_sums if level == "sequence" else sequence_means
        total = reduce(log_ratio, lengths).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return to_tokens(torch.exp(total), lengths, like=log_ratio)

    weights = ratio(weight)
    if weight != "none":
        weights = weights.clamp(max=max_weight)
    rho = ratio(mask)  # 1 without a mask, which every mask keeps
    keep = (rho >= mask_low) & (rho <= mask_high)
    info = {"weight": weights, "masked": (~keep).to(log_ratio.dtype)}
    return torch.where(keep, weights, torch.zeros_like(weights)), info
