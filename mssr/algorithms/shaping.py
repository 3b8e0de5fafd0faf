"""Entropy shaping of advantages: uncertain tokens get a bonus that cannot outweigh the reward.

Source: arXiv 2506.14758 (which fixes the constants), used by MSSR, arXiv 2512.18215. And EntroPIC's balance
of advantages, by which `mssr.algorithms.entropy_control` moves the entropy.
"""

from __future__ import annotations

import math

import torch

from mssr.algorithms.checks import check_number
from mssr.algorithms.sequences import check_same_shape

_LEAST_LOG_PROB = -1e4
"""exp of it is 0 in float32 and in float64."""


def entropy_bonus(
    advantages: torch.Tensor, entropy: torch.Tensor, coef: float = 0.4, divisor: float = 2.0
) -> torch.Tensor:
    """psi_t = min(coef * stopgrad(H_t), |A_t| / divisor); the caller trains on A_t + psi_t.

    Applied after the advantages are normalised. With divisor > 1 the bonus is smaller than |A_t|, so
    A_t + psi_t keeps the sign of A_t; where A_t = 0 there is no bonus. The MSSR paper's text, read
    literally, is ``coef=2.0, divisor=0.4``, which can flip a negative advantage.

    Args:
        advantages: (T,) normalised advantage of each token, any float dtype and any shape.
        entropy: Same shape, H_t >= 0 in nats, of the policy's next-token distribution.
        coef: Multiplies the entropy, >= 0. With 0 there is no bonus.
        divisor: Divides |A_t| in the cap, > 0.

    Returns:
        psi, same shape as the inputs, without gradient: shaping changes how strongly a token is
        reinforced and is no entropy loss.
    """
    check_same_shape(advantages=advantages, entropy=entropy)
    check_number("coef", coef, ">= 0")
    if not divisor > 0:
        raise ValueError(f"divisor must be > 0, not {divisor}")
    return torch.minimum(coef * entropy.detach(), advantages.detach().abs() / divisor)


def sampled_entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """-p * log p of the sampled token: the measure that the published code of MSSR calls entropy.

    It is one term of the sum that the exact entropy is, so at most 1/e nats (at p = 1/e), and it falls
    again for rare tokens, which are the surprising ones. For comparison with that code. It has the shape
    and the float dtype of ``log_probs``, which may be any, and no gradient.
    """
    # Rounding may leave a log-prob just above 0; and at minus infinity the product would be NaN.
    log_p = log_probs.detach().clamp(_LEAST_LOG_PROB, 0.0)
    return -log_p * torch.exp(log_p)


def entropy_balance(
    advantages: torch.Tensor, log_probs: torch.Tensor, alpha: float, confident: float
) -> torch.Tensor:
    """A_t + alpha * |A_t| where pi_t > confident, A_t elsewhere; no gradient, the shape of the inputs.

    EntroPIC, arXiv 2511.15248: confident tokens of right answers lower the entropy, those of wrong ones raise
    it, and alpha in [-1, 1] is > 0 where it is to fall. The authors' code adds -alpha * rho * |A_t| to the
    loss, beside its clip; here the clip is of the sum. ``log_probs`` are of the policy in training, in nats.
    """
    check_same_shape(advantages=advantages, log_probs=log_probs)
    takes_part = log_probs.detach() > math.log(confident)
    return advantages + alpha * advantages.abs() * takes_part
