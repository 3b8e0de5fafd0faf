"""Who computes what: a step's rollouts -> updates -> ranks -> micro-batches.

Every rank makes the same plan from the same batch, so nothing about it is communicated, and the ranks
run the same number of forward passes with the same collectives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences that one rank runs in one forward pass.

    Example: ``MicroBatch((4, 7), weight=1.0, any_rank_has_images=True)``
    """

    sequences: tuple[int, ...]
    """Indices into the step's batch."""
    weight: float
    """1, or 0 where a rank runs along only because the others have more to do."""
    any_rank_has_images: bool
    """Whether some rank runs the vision tower in this pass."""


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """One optimizer step."""

    sequences: tuple[int, ...]
    """All sequences of the update, over all ranks."""
    response_tokens: int
    """Their response tokens, over all ranks."""
    ranks: tuple[tuple[MicroBatch, ...], ...]
    """The passes of each rank; all ranks have the same number."""


class Planner:
    """Plans a batch's passes.

    Args:
        lengths: (B,) tokens of prompt and response.
        response_lengths: (B,) tokens of the response.
        has_images: (B,) whether the prompt has an image.
        ranks: how many share the work.
        token_budget: most tokens of a forward pass; a longer sequence gets a pass of its own.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int64],
        response_lengths: npt.NDArray[np.int64],
        has_images: npt.NDArray[np.bool_],
        *,
        ranks: int,
        token_budget: int,
    ) -> None:
        self._lengths = lengths
        self._response_lengths = response_lengths
        self._has_images = has_images
        self._ranks = ranks
        self._budget = token_budget

    def updates(self, count: int, seed: Sequence[int]) -> list[UpdatePlan]:
        """Split the batch at random into ``count`` parts of equal size, and each over the ranks."""
        order = np.random.default_rng(list(seed)).permutation(len(self._lengths))
        return [
            UpdatePlan(
                sequences=tuple(part.tolist()),
                response_tokens=int(self._response_lengths[part].sum()),
                ranks=self._passes(_balance(part.tolist(), self._lengths, self._ranks)),
            )
            for part in np.array_split(order, count)
        ]

    def everything(self) -> tuple[tuple[MicroBatch, ...], ...]:
        """Passes over the whole batch, once."""
        everything = list(range(len(self._lengths)))
        return self._passes(_balance(everything, self._lengths, self._ranks))

    def probe(self, plans: Sequence[UpdatePlan], fraction: float) -> tuple[tuple[MicroBatch, ...], ...]:
        """Passes over a random share of every update; each sequence stays on the rank that trained it.

        Which sequences are taken depends neither on the ranks nor on the token budget.
        """
        chosen = {s for plan in plans for s in plan.sequences[: math.ceil(fraction * len(plan.sequences))]}
        shares = []
        for rank in range(self._ranks):
            trained = [
                s for plan in plans for micro in plan.ranks[rank] for s in micro.sequences if micro.weight
            ]
            shares.append(sorted(chosen.intersection(trained), key=lambda s: (-int(self._lengths[s]), s)))
        return self._passes(shares)

    def _passes(self, shares: list[list[int]]) -> tuple[tuple[MicroBatch, ...], ...]:
        """Pack each rank's share into the same number of passes on every rank."""
        filled = [_fill(share, self._lengths, self._budget) for share in shares]
        count = max(len(f) for f in filled)
        passes = list(zip(*(_stretch(f, count) for f in filled), strict=True))
        # A rank with nothing left runs some sequence with weight 0, to take part in the collectives.
        spare = next(s for share in shares for s in share)
        run = [[bin_ or [spare] for bin_ in bins] for bins in passes]
        images = [any(bool(self._has_images[s]) for bin_ in bins for s in bin_) for bins in run]
        # The last pass of an update sums gradients over the ranks, those of the vision tower too.
        images[-1] = any(images)
        return tuple(
            tuple(
                MicroBatch(tuple(run[k][rank]), 1.0 if passes[k][rank] else 0.0, images[k])
                for k in range(count)
            )
            for rank in range(self._ranks)
        )


def _balance(sequences: list[int], lengths: npt.NDArray[np.int64], parts: int) -> list[list[int]]:
    """Longest first, each to the part with the fewest tokens so far."""
    totals = [0] * parts
    result: list[list[int]] = [[] for _ in range(parts)]
    for s in sorted(sequences, key=lambda s: (-int(lengths[s]), s)):
        lightest = totals.index(min(totals))
        result[lightest].append(s)
        totals[lightest] += int(lengths[s])
    return result


def _fill(sequences: list[int], lengths: npt.NDArray[np.int64], budget: int) -> list[list[int]]:
    """First fit, longest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for s in sequences:
        length = int(lengths[s])
        for b, free in enumerate(room):
            if length <= free:
                bins[b].append(s)
                room[b] -= length
                break
        else:
            bins.append([s])
            room.append(budget - length)
    return bins


def _stretch(bins: list[list[int]], count: int) -> list[list[int]]:
    """Split the fullest bins until there are ``count``; empty ones make up what cannot be split."""
    bins = [list(b) for b in bins]
    while len(bins) < count:
        fullest = max(bins, key=len, default=[])
        if len(fullest) < 2:
            bins.append([])
            continue
        half = len(fullest) // 2
        bins.append(fullest[half:])
        del fullest[half:]
    return bins
