"""Who computes what: a step's rollouts -> updates -> ranks -> micro-batches.

Every rank makes the same plan from the same batch, so nothing about it is communicated, and the ranks
run the same number of forward passes with the same collectives. They wait for each other in every pass,
so what counts is the cost of the dearest rank, pass by pass. The responses of a prompt are kept together
where that costs less than it upsets the balance, because a pass encodes its images once. A prompt goes to the
same rank in every epoch where that does not upset the balance, because that rank has prepared its images.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mssr.errors import UserError
from mssr.models.cost import SequenceWork

HOME_COST = 1.01
"""How much longer than balanced as well as can be a step may take for prompts to be on their ranks."""
LEVELS = (1.0, 0.95, 0.9, 0.8, 0.6)
"""Up to which share of the mean cost of a bin prompts fill those of their own rank; tried in turn."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences that one rank runs in one forward pass."""

    sequences: tuple[int, ...]
    """Indices into the step's batch."""
    weight: float
    """1, or 0 where a rank runs along only because the others have more to do."""
    any_rank_has_images: bool
    """Whether some rank runs the vision tower in this pass."""


Passes = tuple[MicroBatch, ...]
"""Of one rank, in order."""


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """One optimizer step."""

    sequences: tuple[int, ...]
    """All sequences of the update, over all ranks."""
    ranks: tuple[Passes, ...]
    """The passes of each rank; all ranks have the same number."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All updates of a step, and the passes that measure how far they move the policy."""

    updates: tuple[UpdatePlan, ...]
    probe: tuple[Passes, ...]
    """The passes of each rank over the rollouts that are probed; all ranks have the same number."""


Bins = list[list[int]]
"""A bin holds the sequences of one pass of one rank. It is filled with units: responses of a prompt that stay
together."""


class Planner:
    """Plans a batch's passes.

    Args:
        ranks: how many share the work.
        token_budget: most tokens of a forward pass; a longer sequence gets a pass of its own.
    """

    def __init__(self, work: SequenceWork, *, ranks: int, token_budget: int) -> None:
        self._work = work
        self._lengths = work.lengths.tolist()
        self._text_cost = work.text_cost.tolist()
        self._image_cost = work.image_cost.tolist()
        self._prompts = work.prompts.tolist()
        self._homes = (work.homes % ranks).tolist()
        self._ranks = ranks
        self._budget = token_budget

    def step(
        self, updates: int, seed: Sequence[int], *, probe_fraction: float = 0.25, hold_out: bool = False
    ) -> StepPlan:
        """Split the batch at random into ``updates`` parts of equal size, and each over the ranks.

        The prompts are shuffled, and the responses of a prompt stay side by side, so that all but
        those at the borders are in the same update. What is probed depends, like the parts, neither on the
        ranks nor on the token budget.

        Args:
            probe_fraction: share of the rollouts that are probed, in (0, 1].
            hold_out: take whole prompts out of the batch for it, at least one; else a share of every update,
                each sequence on the rank that trains it.
        """
        prompts = self._work.prompts
        place = np.argsort(np.random.default_rng(list(seed)).permutation(int(prompts.max()) + 1))[prompts]
        order = np.argsort(place, kind="stable")
        held_prompts = math.ceil(probe_fraction * (int(prompts.max()) + 1)) if hold_out else 0
        held = int((place < held_prompts).sum())
        if held == len(order):
            raise UserError("actor.kl_probe=held_out: the step has a single prompt; set it to trained")
        parts = [part.tolist() for part in np.array_split(order[held:], updates)]
        plans = tuple(UpdatePlan(tuple(part), self._passes(self._share_out(part))) for part in parts)
        if hold_out:
            return StepPlan(plans, self._passes(self._share_out(order[:held].tolist())))
        return StepPlan(plans, self._passes(self._probed(plans, probe_fraction)))

    def everything(self) -> tuple[Passes, ...]:
        """Passes over the whole batch, once."""
        return self._passes(self._share_out(list(range(len(self._lengths)))))

    def cost(self, sequences: Iterable[int]) -> int:
        """Of a pass over these sequences, in the unit of the work given: images count once a prompt."""
        sequences = list(sequences)
        images = {self._prompts[s]: self._image_cost[s] for s in sequences}
        return sum(self._text_cost[s] for s in sequences) + sum(images.values())

    def _tokens(self, sequences: list[int]) -> int:
        return sum(self._lengths[s] for s in sequences)

    def _share_out(self, sequences: list[int]) -> list[Bins]:
        """The bins of each rank: as many on every rank, alike in cost those of the same number."""
        units, bins = self._fewest_bins(sequences, self._ranks)
        balanced = self._deal(bins)
        mean = sum(map(self.cost, bins)) / len(bins)
        for level in LEVELS if self._ranks > 1 else ():
            at_home = self._fill(units, len(bins), level * mean)
            if at_home is not None:
                shares = [at_home[rank :: self._ranks] for rank in range(self._ranks)]
                pairs = zip(self._times(shares), self._times(balanced), strict=True)
                if all(ours <= HOME_COST * theirs for ours, theirs in pairs):
                    return shares
        return balanced

    def _probed(self, plans: Sequence[UpdatePlan], fraction: float) -> list[Bins]:
        """The bins of each rank over a random share of every update."""
        chosen = {s for plan in plans for s in plan.sequences[: math.ceil(fraction * len(plan.sequences))]}
        shares = []
        for rank in range(self._ranks):
            passes = [micro for plan in plans for micro in plan.ranks[rank] if micro.weight]
            shares.append(sorted(chosen.intersection(s for micro in passes for s in micro.sequences)))
        count = 0
        while True:
            packed = [self._fewest_bins(share, 1, at_least=count)[1] for share in shares]
            if {len(bins) for bins in packed} == {count}:
                return packed
            count = max(map(len, packed))

    def _times(self, shares: list[Bins]) -> tuple[int, int]:
        """The cost of the dearest rank, pass by pass and over all."""
        costs = [sorted(map(self.cost, bins), reverse=True) for bins in shares]
        return sum(map(max, zip(*costs, strict=True))), max(map(sum, costs))

    def _deal(self, bins: Bins) -> list[Bins]:
        """Bins to the ranks, those of like cost to different ones."""
        bins = sorted(bins, key=self.cost, reverse=True)
        shares: list[Bins] = [[] for _ in range(self._ranks)]
        totals = [0] * self._ranks
        for k in range(0, len(bins), self._ranks):
            lightest_first = sorted(range(self._ranks), key=totals.__getitem__)
            for rank, bin_ in zip(lightest_first, bins[k : k + self._ranks], strict=True):
                shares[rank].append(bin_)
                totals[rank] += self.cost(bin_)
        return shares

    def _fewest_bins(self, sequences: list[int], multiple: int, at_least: int = 0) -> tuple[Bins, Bins]:
        """Sequences in units and in a multiple of ``multiple`` bins within the budget, some perhaps empty.

        Tried with the responses of a prompt whole and cut ever smaller; taken is what costs least time.
        """
        size = max(Counter(self._prompts[s] for s in sequences).values(), default=1)
        fewest = max(at_least, multiple * math.ceil(self._tokens(sequences) / (self._budget * multiple)))
        found: list[tuple[int, int, Bins, Bins]] = []
        while True:
            units, count = self._units(sequences, size), fewest
            while (bins := self._fill(units, count)) is None:
                count += multiple
            costs = sorted(map(self.cost, bins), reverse=True)
            found.append((sum(costs[::multiple]), len(bins), units, bins))
            if size == 1:
                _, _, units, bins = min(found, key=lambda x: x[:2])
                return units, bins
            size = (size + 1) // 2

    def _units(self, sequences: list[int], size: int) -> Bins:
        """Responses of the same prompt, in pieces of at most ``size`` and within the budget."""
        by_prompt: dict[int, list[int]] = {}
        for s in sorted(sequences, key=lambda s: (-self._text_cost[s], s)):
            by_prompt.setdefault(self._prompts[s], []).append(s)
        units = []
        for members in by_prompt.values():
            for count in range(math.ceil(len(members) / size), len(members) + 1):
                pieces = [members[k::count] for k in range(count)]
                if all(self._tokens(piece) <= self._budget for piece in pieces):
                    break
            units += pieces  # of a sequence each, where none fits
        return units

    def _fill(self, units: Bins, count: int, at_home: float = 0.0) -> Bins | None:
        """The dearest unit first, each into the cheapest bin that has room; None if one finds no room.

        Args:
            at_home: the cost up to which units fill the bins of their own rank first. Bin k is of rank k
                modulo the ranks.
        """
        bins: Bins = [[] for _ in range(count)]
        cost, room = np.zeros(count, dtype=np.int64), np.full(count, self._budget)
        for unit_cost, unit in sorted(((self.cost(u), u) for u in units), key=lambda x: (-x[0], x[1])):
            tokens = self._tokens(unit)
            # What is longer than the budget has a bin to itself.
            fits = np.flatnonzero((room >= tokens) | (cost == 0))
            if not len(fits):
                return None
            chosen = int(fits[cost[fits].argmin()])
            if at_home and len(own := fits[fits % self._ranks == self._homes[unit[0]]]):
                cheapest = int(own[cost[own].argmin()])
                if cost[cheapest] + unit_cost <= at_home:
                    chosen = cheapest
            bins[chosen] += unit
            cost[chosen] += unit_cost
            room[chosen] -= tokens
        return bins

    def _passes(self, shares: list[Bins]) -> tuple[Passes, ...]:
        """The passes of each rank, from its bins; all ranks have as many."""
        # A rank with nothing left runs some sequence with weight 0, to take part in the collectives.
        spare = min((s for bins in shares for bin_ in bins for s in bin_), key=lambda s: (self.cost([s]), s))
        passes = list(zip(*(sorted(bins, key=self.cost, reverse=True) for bins in shares), strict=True))
        run = [[bin_ or [spare] for bin_ in bins] for bins in passes]
        images = [any(self._image_cost[s] > 0 for bin_ in bins for s in bin_) for bins in run]
        # The last pass of an update sums gradients over the ranks, those of the vision tower too.
        images[-1] = any(images)
        return tuple(
            tuple(
                MicroBatch(tuple(run[k][rank]), 1.0 if bins[rank] else 0.0, images[k])
                for k, bins in enumerate(passes)
            )
            for rank in range(self._ranks)
        )
