"""Which tokens of a response learn, and how much: factors of the advantages, known before the forward pass.

Negative-token filtering spares the likely tokens of wrong responses; VPPO and VEPO train on what depends on
the image. All look at whole sequences: N tokens of S sequences laid end to end, with (S,) lengths on the CPU,
and a ``fraction`` of their tokens in (0, 1]. Nothing has a gradient. Entropies and log-probs are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.sequences import check_lengths, check_same_shape, sequence_means, to_tokens


def negative_filter(
    advantages: torch.Tensor, log_probs: torch.Tensor, lengths: torch.Tensor, fraction: float
) -> torch.Tensor:
    """(N,) 0 where A_t < 0, except on the ceil(fraction * T) least likely of the response's T tokens; else 1.

    Negative-token filtering, arXiv 2606.17250: most tokens of a wrong response are those of right ones, too.
    Its denominator stays that of all. Under which policy they are least likely is not stated for several
    updates: here it is the engine that sampled, so that the choice is the same in all.
    """
    check_same_shape(advantages=advantages, log_probs=log_probs)
    return torch.where(advantages < 0, _largest(-log_probs, lengths, fraction), 1.0)


def visual_kl(log_probs: torch.Tensor, blind_log_probs: torch.Tensor) -> torch.Tensor:
    """(N,) S_t: k3 of KL(pi with the image || pi without it) at the sampled token, at most 10.

    VPPO (arXiv 2510.09285) defines S_t as the KL over the vocabulary, and its code takes this estimate and
    bound: the exact one needs the logits of both passes at once. Its image is blacked out in patches; here it
    is left out of the prompt, as for the text-only anchor.
    """
    return kl_penalty(log_probs.detach(), blind_log_probs, kind="k3").clamp(max=10)


def vppo_factors(
    kl: torch.Tensor, lengths: torch.Tensor, least: float, mean: float, fraction: float, floor: float = 0.9
) -> torch.Tensor:
    """(N,) alpha of the response on the ceil(fraction * T) of its T tokens with the largest S_t, else 0.

    alpha = floor + (1 - floor) * (S - least) / (mean - least), with S the mean of the response's S_t, and
    least and mean those of S in the mini-batch, over the responses with images of all ranks; 1 where they
    are equal. VPPO, arXiv 2510.09285; floor is its beta_min. (Its code scales S by the range and chooses the
    upper end so that the mean is 1: the range cancels out.)
    """
    s, spread = sequence_means(kl, lengths), mean - least
    above = (s - least) / spread if spread > 1e-6 else torch.ones_like(s)
    alpha = to_tokens(floor + (1 - floor) * above, lengths, like=kl)
    return alpha * _largest(kl, lengths, fraction)


def vepo_factors(
    kl: torch.Tensor,
    entropy: torch.Tensor,
    blind_entropy: torch.Tensor,
    lengths: torch.Tensor,
    fraction: float,
    mix: float = 0.7,
) -> torch.Tensor:
    """(N,) T / k on the k = ceil(fraction * T) of a response's T tokens with the largest score, else 0.

    score = (1 - (1 - S_t)^mix * (1 - |H_t - H'_t|)^(1 - mix)) * H_t, with H' the entropy without the image
    and each of the three scaled to [0, 1] within the response. VEPO, arXiv 2606.03937 (score D of its code):
    there S_t is the Jensen-Shannon divergence over the vocabulary (the KL in score H), here `visual_kl`.
    T / k makes the mean over all tokens that over the chosen ones, which VEPO takes.
    """
    check_same_shape(kl=kl, entropy=entropy, blind_entropy=blind_entropy)
    s, gap, h = (_by_sequence(_scaled, x, lengths) for x in (kl, (entropy - blind_entropy).abs(), entropy))
    chosen = _largest((1 - (1 - s) ** mix * (1 - gap) ** (1 - mix)) * h, lengths, fraction)
    return chosen / to_tokens(sequence_means(chosen, lengths), lengths, like=chosen)


def _largest(scores: torch.Tensor, lengths: torch.Tensor, fraction: float) -> torch.Tensor:
    """(N,) 1 for the ceil(fraction * T) largest scores of each sequence, the earlier of equals; else 0."""
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of the tokens must lie in (0, 1], not {fraction}")

    def mask(part: torch.Tensor) -> torch.Tensor:
        count = math.ceil(fraction * len(part) - 1e-9)  # .07 * 100 is just above 7
        order = part.argsort(descending=True, stable=True)
        return torch.zeros_like(part).index_fill(0, order[:count], 1.0)

    return _by_sequence(mask, scores, lengths)


def _scaled(part: torch.Tensor) -> torch.Tensor:
    """To [0, 1]; 0 where all are equal."""
    if not len(part):
        return part
    low, high = part.aminmax()
    return (part - low) / (high - low).clamp(min=1e-8)


def _by_sequence(
    of: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    check_lengths(lengths, len(values))
    return torch.cat([of(part) for part in torch.split(values.detach(), lengths.tolist())])
