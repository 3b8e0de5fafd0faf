"""Token-level losses over flat response tokens, and their aggregation.

N is the number of response tokens of a micro-batch, ragged and without padding, so there is no mask.
All tensors are (N,) float32 (float64 works too) on one device.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

_MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20: exp(20) = 5e8 keeps one absurd token from making the loss infinite.
The gradient is zero beyond it."""


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float | None = 3.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_t = -min(rho*A, clip(rho, 1 - clip_low, 1 + clip_high)*A), rho = exp(log pi - log pi_old).

    PPO, arXiv 1707.06347; unequal bounds from DAPO, arXiv 2503.14476. Dual clip, arXiv 1912.09729:
    where A < 0 the loss is at most -dual_clip * A, because -rho*A has no upper bound there.

    Args:
        log_probs: (N,) nats, of the sampled tokens under the policy in training.
        old_log_probs: (N,) nats, under the policy before the step. No gradient goes into it. For a
            single on-policy update pass ``log_probs.detach()``: rho is then 1 and the gradient is
            that of -A * log pi.
        advantages: (N,) A_t, shaped or not. No gradient goes into it.
        clip_low: In [0, 1].
        clip_high: >= 0.
        dual_clip: > 1, or None for no dual clip.

    Returns:
        The loss of every token, (N,), with gradient, and a dict of (N,) tensors without: ``ratio``
        (rho), ``clipped`` (1 where the clip replaced rho*A, so the token has no gradient) and
        ``dual_clipped`` (1 where the dual clip did).

    Raises:
        ValueError: The shapes differ, or a number is out of its range.
    """
    _check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], not {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be >= 0, not {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, not {dual_clip}")
    a = advantages.detach()
    ratio = torch.exp(torch.clamp(log_probs - old_log_probs.detach(), -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    unclipped = -ratio * a
    clipped = -torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * a
    loss = torch.maximum(unclipped, clipped)
    dual = torch.zeros_like(a, dtype=torch.bool)
    if dual_clip is not None:
        dual = (a < 0) & (loss > -dual_clip * a)
        loss = torch.where(dual, -dual_clip * a, loss)
    info = {
        "ratio": ratio.detach(),
        "clipped": (clipped > unclipped).to(a.dtype),
        "dual_clipped": dual.to(a.dtype),
    }
    return loss, info


def kl_penalty(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, kind: Literal["k1", "k2", "k3"] = "k3"
) -> torch.Tensor:
    """Estimate of KL(pi || pi_ref) at each sampled token, with d = log pi_ref - log pi in +-20.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (http://joschu.net/blog/kl-approx.html). k1 and k3 are
    unbiased; k2 and k3 are never negative. As a loss, k1 is useless: the mean of its gradient is zero.

    Args:
        log_probs: (N,) nats, of tokens sampled from the policy, with gradient.
        ref_log_probs: (N,) nats, of the same tokens under the reference. No gradient goes into it.
        kind: Which estimator.

    Returns:
        (N,) nats.

    Raises:
        ValueError: Unknown kind, or the shapes differ.
    """
    _check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    d = torch.clamp(ref_log_probs.detach() - log_probs, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    if kind == "k1":
        return -d
    if kind == "k2":
        return d**2 / 2
    if kind == "k3":
        # expm1, because exp(d) - 1 loses the digits that matter when the policies are close.
        return torch.expm1(d) - d
    raise ValueError(f"unknown KL estimator {kind!r}: choose k1, k2 or k3")


def aggregate(
    per_token: torch.Tensor, denominator: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """sum_t w_t * x_t / denominator.

    With w = 1 and the number of response tokens of the whole mini-batch, over all micro-batches and
    ranks, as denominator, the sum over micro-batches and ranks is the global token mean: its gradient
    depends neither on the micro-batch budget nor on the world size. (A framework that averages
    gradients over W ranks needs the result times W.) A sequence mean is w_t = 1/length over the
    number of sequences.

    Args:
        per_token: (N,); N may be 0 (a rank without tokens), which gives 0 that still has a graph.
        denominator: > 0, the same on all ranks.
        weights: (N,) factors, without gradient, or None for 1.

    Returns:
        () scalar.

    Raises:
        ValueError: The denominator is not a finite number > 0, or the shapes differ.
    """
    if not (math.isfinite(denominator) and denominator > 0):
        raise ValueError(f"the denominator of the loss must be a finite number > 0, not {denominator}")
    if weights is not None:
        _check_same_shape(per_token=per_token, weights=weights)
        per_token = per_token * weights.detach()
    return per_token.sum() / denominator


def _check_same_shape(**tensors: torch.Tensor) -> None:
    """Broadcasting (N,) with (N, 1) would silently give an (N, N) loss."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("one shape is needed, not " + ", ".join(f"{k} {v}" for k, v in shapes.items()))
