"""What a rank knows of a step's sequences while it trains on them, and what it measures of their tokens."""

from __future__ import annotations

import math

import torch

from mssr.actor.distributed import all_max, all_sum
from mssr.types import TrainBatch

Sequences = tuple[int, ...]
"""Indices into the step's batch."""


class LogProbs:
    """Log-probs of response tokens by sequence, as far as they are known on this rank."""

    def __init__(self) -> None:
        self._known: dict[int, torch.Tensor] = {}

    def put(self, sequences: Sequences, values: torch.Tensor, lengths: list[int]) -> None:
        """(N,) of some sequences, laid end to end; (T,) ``lengths`` of their responses."""
        self._known.update(zip(sequences, torch.split(values, lengths), strict=True))

    def get(self, sequences: Sequences) -> torch.Tensor | None:
        """(N,) of some sequences; None unless all are known."""
        if not all(s in self._known for s in sequences):
            return None
        return torch.cat([self._known[s] for s in sequences])


class StepState:
    """One step on this rank. What the batch brings along of log-probs is known from the beginning."""

    def __init__(self, batch: TrainBatch, device: torch.device) -> None:
        self.batch = batch
        self.old, self.reference, self.anchor = LogProbs(), LogProbs(), LogProbs()
        """Of the policy before the step, of the reference, and of the policy before the step given the prompt
        without its images."""
        self.measured = TokenMeans()
        self._response_offsets = batch.response_offsets
        everything = tuple(range(len(batch)))
        for known, values in (
            (self.old, batch.old_log_probs),
            (self.reference, batch.reference_log_probs),
        ):
            if values is not None:
                tensor = torch.from_numpy(values).to(device)
                known.put(everything, tensor, batch.response_lengths.tolist())

    def response_slices(self, sequences: Sequences) -> list[slice]:
        """Where the tokens of each response are in an array over all response tokens."""
        offsets = self._response_offsets
        return [slice(offsets[s], offsets[s + 1]) for s in sequences]


class TokenMeans:
    """Means and maxima over tokens, and totals, of many passes and all ranks.

    Everything stays on the device until `reduce`, so that no pass waits. What is not finite is left out of
    sums and counts: it is of an update that is skipped, and the method that learns from the KL takes no NaN.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}
        self._totals: dict[str, torch.Tensor] = {}

    def copy(self) -> TokenMeans:
        """What was measured so far."""
        other = TokenMeans()
        other._sums, other._maxima = dict(self._sums), dict(self._maxima)
        other._totals = dict(self._totals)
        return other

    def add(self, key: str, values: torch.Tensor, weight: float = 1.0) -> None:
        """(N,) values of a pass; with weight 0 the rank only runs along, and they do not count."""
        values = values.detach()
        finite = torch.isfinite(values)
        total = weight * torch.stack([torch.where(finite, values, 0).double().sum(), finite.double().sum()])
        self._sums[key] = self._sums[key] + total if key in self._sums else total

    def max(self, key: str, values: torch.Tensor) -> None:
        """(N,) values that are not negative, N perhaps 0."""
        values = values.detach()
        finite = torch.where(torch.isfinite(values), values, 0)
        largest = torch.cat([values.new_zeros(1), finite]).max()  # a pass may have no response token
        self._maxima[key] = torch.maximum(self._maxima[key], largest) if key in self._maxima else largest

    def total(self, key: str, value: torch.Tensor) -> None:
        """() value of which the sum is wanted, finite or not."""
        value = value.detach().double()[None]
        self._totals[key] = self._totals[key] + value if key in self._totals else value

    def reduce(self) -> dict[str, float]:
        """Over all ranks, which must have measured the same keys; a mean of nothing is NaN."""
        means = {k: total / count if count else math.nan for k, (total, count) in all_sum(self._sums).items()}
        return means | {k: total for k, [total] in all_sum(self._totals).items()} | all_max(self._maxima)
