"""Visual credit of an update: which response tokens depend on the image, over its micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from mssr.actor.distributed import all_reduce
from mssr.actor.planning import MicroBatch
from mssr.algorithms.credit import vepo_factors, visual_kl, vppo_factors
from mssr.algorithms.objective import TokenBatch
from mssr.algorithms.sequences import sequence_means
from mssr.config.algorithm import ShapingConfig

Seen = tuple[MicroBatch, TokenBatch, torch.Tensor, torch.Tensor]
"""A micro-batch, its tokens with old and anchor log-probs, and (N,) entropies with and without the images."""


def visual_factors(shaping: ShapingConfig, seen: list[Seen]) -> Iterator[tuple[MicroBatch, torch.Tensor]]:
    """Of each micro-batch of an update its (N,) factors; 1 for prompts without images. A collective."""
    kls = [visual_kl(t.old_log_probs, t.anchor_log_probs) for _, t, _, _ in seen]  # type: ignore[arg-type]
    least, mean = _least_and_mean(seen, kls)
    for (micro, tokens, entropy, blind), kl in zip(seen, kls, strict=True):
        if shaping.visual == "vppo":
            factors = vppo_factors(kl, tokens.lengths, least, mean, shaping.visual_fraction or 0.4)
        else:
            factors = vepo_factors(kl, entropy, blind, tokens.lengths, shaping.visual_fraction or 0.2)
        assert tokens.has_image is not None
        yield micro, torch.where(tokens.has_image, factors, 1.0)


def _least_and_mean(seen: list[Seen], kls: list[torch.Tensor]) -> tuple[float, float]:
    """Of the mean KL of each response with images that has tokens, on all ranks; 0 where there is none."""
    means = []
    for (micro, tokens, _, _), kl in zip(seen, kls, strict=True):
        assert tokens.has_image is not None
        sees = sequence_means(tokens.has_image, tokens.lengths) > 0
        # Where the rank only runs along (weight 0) they are counted elsewhere.
        means.append(sequence_means(kl, tokens.lengths)[sees & bool(micro.weight)])
    s = torch.cat(means)
    totals = all_reduce({"sum": s.sum(), "count": s.new_full((), len(s))})
    lowest = torch.cat([s, s.new_full((1,), math.inf)]).min()
    least = -all_reduce({"least": -lowest}, dist.ReduceOp.MAX)["least"]
    return (least, totals["sum"] / totals["count"]) if totals["count"] else (0.0, 0.0)
