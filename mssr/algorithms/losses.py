"""Token-level losses over flat response tokens, and their aggregation.

N is the number of response tokens of a micro-batch, ragged and without padding, so there is no mask;
S whole sequences of `lengths` (S,) are laid end to end. All tensors are (N,) float32 (float64 works
too) on one device.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from mssr.algorithms.checks import check_choice, check_number
from mssr.algorithms.policy_losses import AGGREGATIONS, bind_loss
from mssr.algorithms.sequences import check_lengths, check_same_shape, clamped_log_ratio, to_tokens


def policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    name: str = "ppo",
    **options: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy-gradient loss called ``name``, registered or ``path/to/file.py:function``, with its options.

    Arguments are those of `mssr.algorithms.policy_losses`. Returns the (N,) loss of every token, with
    gradient, and a dict of (N,) tensors without.
    """
    per_token, info = bind_loss(name, options)(log_probs, old_log_probs, advantages, lengths)
    # A loss from a file may have reduced its result.
    check_same_shape(log_probs=log_probs, loss=per_token, **info)
    return per_token, info


def kl_penalty(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, kind: Literal["k1", "k2", "k3"] = "k3"
) -> torch.Tensor:
    """KL(pi || pi_ref) at each of (N,) tokens sampled from pi, in nats; d = log pi_ref - log pi in +-20.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1 (http://joschu.net/blog/kl-approx.html). k1 and k3 are
    unbiased estimates; k2 and k3 are never negative. As a loss, k1 is useless: the mean of its gradient is
    zero. Gradient goes into ``log_probs`` only.
    """
    check_same_shape(log_probs=log_probs, ref_log_probs=ref_log_probs)
    d = clamped_log_ratio(ref_log_probs.detach(), log_probs)
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
    gradients over W ranks needs the result times W.) `aggregation_weights` and
    `aggregation_denominator` give both numbers for the other means.

    Args:
        per_token: (N,); N may be 0 (a rank without tokens), which gives 0 that still has a graph.
        denominator: > 0, the same on all ranks.
        weights: (N,) factors, without gradient, or None for 1.
    """
    check_number("the denominator of the loss", denominator)
    if weights is not None:
        check_same_shape(per_token=per_token, weights=weights)
        per_token = per_token * weights.detach().to(per_token.dtype)
    return per_token.sum() / denominator


def aggregation_weights(
    lengths: torch.Tensor, mode: str, device: torch.device | None = None
) -> torch.Tensor | None:
    """The (N,) float64 weights of `aggregate` for one micro-batch, without gradient; None for 1.

    - ``token_mean``: w = 1; every token of the mini-batch counts the same.
    - ``sequence_mean``: w = 1/length of the token's sequence; every sequence that is not empty counts
      the same, however long.
    - ``constant_length``: w = 1 over a denominator that does not depend on the lengths, so that a long
      response does not weaken the gradient of each of its tokens (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: (S,) int64, of whole sequences: one that is split over micro-batches has no 1/length.
        mode: One of `AGGREGATIONS`.
        device: Of the weights; that of the lengths if None.
    """
    check_choice("aggregation", mode, AGGREGATIONS)
    if mode != "sequence_mean":
        return None
    tokens = int(lengths.sum())
    check_lengths(lengths, tokens)
    inverse = 1 / lengths.clamp(min=1).double()  # an empty sequence has no token to weigh
    return to_tokens(inverse, lengths, like=inverse.new_empty(tokens, device=device))


def aggregation_denominator(lengths: ArrayLike, mode: str, constant_length: int | None = None) -> float:
    """The denominator of `aggregate` for a whole mini-batch: all its micro-batches, on all ranks.

    It depends on the (S,) lengths in tokens alone, so every rank knows it before its first forward pass:
    the number of tokens for ``token_mean``, of sequences that are not empty for ``sequence_mean``, and of
    all sequences times ``constant_length``, a number of tokens, for that. Where the mini-batch has no token
    it is 1: there is then nothing to divide.
    """
    check_choice("aggregation", mode, AGGREGATIONS)
    if constant_length is not None and not constant_length > 0:
        raise ValueError(f"constant_length must be > 0, not {constant_length}")
    if mode == "constant_length" and constant_length is None:
        raise ValueError("aggregation constant_length needs the length, a number of tokens")
    tokens = np.asarray(lengths, np.int64)
    if (tokens < 0).any():
        raise ValueError(f"lengths must be >= 0, not {tokens.min()}")
    if not tokens.any():
        return 1.0
    if mode == "token_mean":
        return float(tokens.sum())
    if mode == "sequence_mean":
        return float(np.count_nonzero(tokens))
    assert constant_length is not None
    return float(len(tokens) * constant_length)
