"""Which tokens of a response learn, and how much: factors of the advantages, known before the forward pass.

Negative-token filtering spares the likely tokens of wrong responses. VPPO and VEPO train on what depends on
the image. All look at whole sequences: N tokens of S sequences laid end to end, with (S,) lengths on the CPU.
Nothing here has a gradient. A token with factor 0 has no policy loss and still counts in the denominator.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mssr.algorithms.checks import check_number
from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.sequences import check_lengths, check_same_shape, sequence_means, to_tokens

VISUAL = ("none", "vppo", "vepo")
_LARGEST_KL = 10.0  # as VPPO's code: one token must not decide for its whole response


def visual_kl(log_probs: torch.Tensor, blind_log_probs: torch.Tensor) -> torch.Tensor:
    """(N,) S_t: k3 of KL(pi with the image || pi without it) at the sampled token, nats, at most 10.

    VPPO (arXiv 2510.09285) defines S_t as the KL over the vocabulary, and its code takes k3 of the sampled
    token, as here: the exact one would need the logits of both passes at once. There the image is blacked
    out in patches, here it is left out of the prompt, as for the text-only anchor.
    """
    return kl_penalty(log_probs.detach(), blind_log_probs, kind="k3").clamp(max=_LARGEST_KL)


def vppo_factors(
    kl: torch.Tensor, lengths: torch.Tensor, least: float, mean: float, fraction: float, floor: float
) -> torch.Tensor:
    """(N,) alpha of the response on the ceil(fraction * T) of its T tokens with the largest S_t, else 0.

    alpha = floor + (1 - floor) * (S - least) / (mean - least), with S the mean of the response's S_t. VPPO,
    arXiv 2510.09285: responses that depend more on the image count more, from ``floor`` upwards and 1 on
    average, and in each only the tokens that do. (Its code scales S by the range to [0, 1] and chooses the
    upper end so that the mean is 1; the range then cancels out.)

    Args:
        kl: (N,) from `visual_kl`.
        least, mean: smallest and mean S of the responses with images of the mini-batch, on all ranks. Where
            they are equal alpha is 1.
        fraction: of the tokens, in (0, 1].
        floor: beta_min, the weight of the response with the smallest S, in [0, 1].
    """
    check_lengths(lengths, len(kl))
    spread = mean - least
    s = sequence_means(kl, lengths)
    above = (s - least) / spread if spread > 1e-6 else torch.ones_like(s)
    alpha = to_tokens(floor + (1 - floor) * above, lengths, like=kl)
    return alpha * _largest(kl, lengths, fraction)


def vepo_factors(
    kl: torch.Tensor,
    entropy: torch.Tensor,
    blind_entropy: torch.Tensor,
    lengths: torch.Tensor,
    fraction: float,
    mix: float,
) -> torch.Tensor:
    """(N,) T / k on the k = ceil(fraction * T) of a response's T tokens with the largest score, else 0.

    score = (1 - (1 - S_t)^mix * (1 - |H_t - H'_t|)^(1 - mix)) * H_t, each of the three scaled to [0, 1] by
    its least and largest value in the response. VEPO, arXiv 2606.03937 (score D of its code): uncertain
    tokens that depend on the image. There S_t is the Jensen-Shannon divergence over the vocabulary; here it
    is `visual_kl`, for the same reason (score H of its code has the KL in this place). T / k makes the mean
    over all tokens the mean over the chosen ones, which VEPO takes.

    Args:
        kl: (N,) from `visual_kl`.
        entropy, blind_entropy: (N,) nats, of the policy with the image and without it.
        mix: alpha, the part of the divergence, in [0, 1].
    """
    check_same_shape(kl=kl, entropy=entropy, blind_entropy=blind_entropy)
    check_lengths(lengths, len(kl))
    s, gap, h = (_scaled(x, lengths) for x in (kl, (entropy - blind_entropy).abs(), entropy))
    score = (1 - (1 - s) ** mix * (1 - gap) ** (1 - mix)) * h
    chosen = _largest(score, lengths, fraction)
    return chosen / to_tokens(sequence_means(chosen, lengths), lengths, like=chosen).clamp(min=1e-9)


def negative_filter(
    advantages: torch.Tensor, log_probs: torch.Tensor, lengths: torch.Tensor, fraction: float
) -> torch.Tensor:
    """(N,) 0 where A_t < 0, except on the ceil(fraction * T) least likely of the response's T tokens; else 1.

    Negative-token filtering, arXiv 2606.17250: a wrong response is mostly made of tokens that right ones
    have, too. Its denominators stay those of all tokens. Least likely under which policy is not stated for
    several updates: here under the engine that sampled, so that the choice stays the same for all of them.

    Args:
        advantages: (N,) before shaping.
        log_probs: (N,) nats, as sampled.
        fraction: of the tokens, in (0, 1]; 1 keeps all.
    """
    check_same_shape(advantages=advantages, log_probs=log_probs)
    check_lengths(lengths, len(log_probs))
    return torch.where(advantages < 0, _largest(-log_probs, lengths, fraction), 1.0)


def _largest(scores: torch.Tensor, lengths: torch.Tensor, fraction: float) -> torch.Tensor:
    """(N,) 1 for the ceil(fraction * T) largest scores of each sequence, the earlier of equals; else 0."""
    check_number("the fraction of the tokens", fraction)
    if fraction > 1:
        raise ValueError(f"the fraction of the tokens must be at most 1, not {fraction}")

    def mask(part: torch.Tensor) -> torch.Tensor:
        count = math.ceil(fraction * len(part) - 1e-9)  # .07 * 100 is just above 7
        order = part.argsort(descending=True, stable=True)
        return torch.zeros_like(part).index_fill(0, order[:count], 1.0)

    return _by_sequence(mask, scores, lengths)


def _scaled(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(N,) scaled to [0, 1] within each sequence; 0 where all its values are equal."""

    def scale(part: torch.Tensor) -> torch.Tensor:
        if not len(part):
            return part
        low, high = part.aminmax()
        return (part - low) / (high - low).clamp(min=1e-8)

    return _by_sequence(scale, values, lengths)


def _by_sequence(
    of: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    return torch.cat([of(part) for part in torch.split(values.detach(), lengths.tolist())])
