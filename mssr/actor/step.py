"""What a rank knows of a step's response tokens while it trains on them, and what it measures of them."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from mssr.actor.distributed import all_reduce
from mssr.algorithms.objective import TokenBatch
from mssr.device import to_device
from mssr.types import TrainBatch

Sequences = tuple[int, ...]
"""Indices into the step's batch."""


class StepState:
    """One step on this rank.

    Attributes:
        old: log-probs of the policy before the step. The batch brings them along, or a pass before the
            updates gives them, or, to an update on policy, its own forward pass.
        reference: of the frozen base model.
        anchor: of the policy before the step, given the prompt without its images.
        credit: no log-probs, but the factors of visual credit.
        measured: metrics so far.
    """

    def __init__(self, batch: TrainBatch, device: torch.device, image_token: int) -> None:
        lengths = batch.response_lengths
        self.batch = batch
        self.old = LogProbs(lengths, batch.old_log_probs, device)
        self.reference = LogProbs(lengths, batch.reference_log_probs, device)
        self.anchor = LogProbs(lengths, None, device)
        self.credit = LogProbs(lengths, None, device)
        self.measured = TokenMeans()
        self._device = device
        self._lengths = lengths
        self._offsets = batch.response_offsets
        of_tokens = batch.token_advantages
        self._advantages = np.repeat(batch.advantages, lengths) if of_tokens is None else of_tokens
        has_image = np.logical_or.reduceat(batch.tokens == image_token, batch.offsets[:-1])
        self._has_image = np.repeat(has_image, lengths)

    def tokens(self, sequences: Sequences) -> TokenBatch:
        """What is known of the response tokens of some sequences."""
        anchor = self.anchor.get(sequences)
        return TokenBatch(
            old_log_probs=self.old.get(sequences),
            engine_log_probs=self._of(self.batch.engine_log_probs, sequences),
            advantages=self._of(self._advantages, sequences),
            lengths=torch.from_numpy(self._lengths[list(sequences)]),
            reference_log_probs=self.reference.get(sequences),
            anchor_log_probs=anchor,
            has_image=None if anchor is None else self._of(self._has_image, sequences),
            credit=self.credit.get(sequences),
        )

    def _of(self, values: np.ndarray, sequences: Sequences) -> torch.Tensor:
        """The parts of an array over all response tokens that belong to some sequences."""
        parts = [values[self._offsets[s] : self._offsets[s + 1]] for s in sequences]
        return to_device(torch.from_numpy(np.concatenate(parts)), self._device)


class LogProbs:
    """Log-probs of response tokens under one model, of the sequences that this rank knows them of.

    Args:
        lengths: (B,) response tokens of each sequence.
        given: those of all sequences, if they are known on every rank from the beginning.

    Attributes:
        complete: whether they were.
    """

    def __init__(self, lengths: np.ndarray, given: np.ndarray | None, device: torch.device) -> None:
        self.complete = given is not None
        self._lengths = lengths
        self._known: dict[int, torch.Tensor] = {}
        if given is not None:
            self.put(tuple(range(len(lengths))), to_device(torch.from_numpy(given), device))

    def put(self, sequences: Sequences, values: torch.Tensor) -> None:
        """(N,) of some sequences, laid end to end."""
        parts = torch.split(values, self._lengths[list(sequences)].tolist())
        self._known.update(zip(sequences, parts, strict=True))

    def get(self, sequences: Sequences) -> torch.Tensor | None:
        """(N,) of some sequences; None unless all are known."""
        if not all(s in self._known for s in sequences):
            return None
        return torch.cat([self._known[s] for s in sequences])


class TokenMeans:
    """Means and maxima over tokens, and totals, of many passes and all ranks.

    Everything stays on the device until `reduce`, so that no pass waits. What is not finite is left out of
    sums and counts: it is of an update that is skipped, and the method that learns from the KL takes no NaN.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}
        self._totals: dict[str, torch.Tensor] = {}

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
        value = value.detach().double()
        self._totals[key] = self._totals[key] + value if key in self._totals else value

    def reduce(self) -> dict[str, float]:
        """Over all ranks, which must have measured the same keys; a mean of nothing is NaN."""
        sums, totals = all_reduce(self._sums), all_reduce(self._totals)
        means = {key: total / count if count else math.nan for key, (total, count) in sums.items()}
        return means | totals | all_reduce(self._maxima, dist.ReduceOp.MAX)
