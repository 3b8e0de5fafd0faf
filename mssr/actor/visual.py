"""Visual credit of an update: which response tokens depend on the image, over its micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from mssr.actor.distributed import all_reduce
from mssr.actor.planning import MicroBatch
from mssr.actor.step import Sequences
from mssr.algorithms.credit import vepo_factors, visual_kl, vppo_factors
from mssr.algorithms.objective import TokenBatch
from mssr.algorithms.sequences import sequence_means
from mssr.config.algorithm import ShapingConfig


class VisualCredit:
    """For each update: `measure` of all its micro-batches, then `factors`, which is a collective."""

    def __init__(self, shaping: ShapingConfig, fraction: float) -> None:
        self.shaping = shaping
        self.fraction = fraction
        self._measured: list[tuple[MicroBatch, TokenBatch, torch.Tensor, torch.Tensor]] = []

    def measure(
        self, micro: MicroBatch, tokens: TokenBatch, entropy: torch.Tensor, blind_entropy: torch.Tensor
    ) -> None:
        """(N,) entropies with and without the images, of tokens whose log-probs are known both ways."""
        self._measured.append((micro, tokens, entropy, blind_entropy))

    def factors(self) -> Iterator[tuple[Sequences, torch.Tensor]]:
        """Of each micro-batch its sequences and their (N,) factors; 1 for prompts without images."""
        shaping, measured, self._measured = self.shaping, self._measured, []
        kls = [_kl(tokens) for _, tokens, _, _ in measured]
        # Where the rank only runs along (weight 0) the responses are counted elsewhere.
        counted = [(t, kl) for (micro, t, _, _), kl in zip(measured, kls, strict=True) if micro.weight]
        least, mean = _least_and_mean(counted) if shaping.visual == "vppo" else (0.0, 0.0)
        for (micro, tokens, entropy, blind), kl in zip(measured, kls, strict=True):
            if shaping.visual == "vppo":
                of = vppo_factors(kl, tokens.lengths, least, mean, self.fraction, shaping.visual_floor)
            else:
                of = vepo_factors(kl, entropy, blind, tokens.lengths, self.fraction, shaping.visual_mix)
            assert tokens.has_image is not None
            yield micro.sequences, torch.where(tokens.has_image, of, 1.0)


def _kl(tokens: TokenBatch) -> torch.Tensor:
    assert tokens.old_log_probs is not None and tokens.anchor_log_probs is not None
    return visual_kl(tokens.old_log_probs, tokens.anchor_log_probs)


def _least_and_mean(counted: list[tuple[TokenBatch, torch.Tensor]]) -> tuple[float, float]:
    """Of the mean KL of each response with images that has tokens, on all ranks; 0 where there is none."""
    means = [torch.zeros(0, dtype=torch.float64)]
    for tokens, kl in counted:
        assert tokens.has_image is not None
        sees = sequence_means(tokens.has_image, tokens.lengths) > 0
        means.append(sequence_means(kl, tokens.lengths)[sees])
    device = means[-1].device
    values = torch.cat([part.to(device) for part in means])
    count = torch.full((), float(len(values)), dtype=torch.float64, device=device)
    totals = all_reduce({"sum": values.sum(), "count": count})
    lowest = torch.cat([values.new_full((1,), math.inf), values]).min()
    least = -all_reduce({"least": -lowest}, dist.ReduceOp.MAX)["least"]
    return (least, totals["sum"] / totals["count"]) if totals["count"] else (0.0, 0.0)
