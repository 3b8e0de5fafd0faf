"""What the driver asks of the machines, whoever runs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import psutil

from mssr.types import RankLogProbs, Rollout, RolloutRequest, SamplingParams, TokenLogProbs, TrainBatch


class Events(Protocol):
    """Where a cluster tells what went wrong; see `mssr.runs.events.EventLog`."""

    def restart(self, event: str, detail: str) -> None:
        """Something that was lost is about to be replaced; raises `TrainingError` if it was too often."""

    def record(self, event: str, detail: str) -> None:
        """Something happened that costs no restart."""


OnFinished = Callable[[int, Rollout], None]
"""Called with a rollout and the index of its request, in the thread that generates."""


@dataclass(frozen=True, slots=True)
class SaveHandle:
    """A checkpoint of the ranks that is being written."""

    done: Callable[[], bool]
    """Whether `result` returns at once."""
    result: Callable[[], dict[str, str]]
    """Waits until it is written; returns the SHA-256 of its files by name. Raises `OSError` if it could not
    be written, `WorkersLostError` if a rank died or hung."""


class Cluster(Protocol):
    """Rollout workers and actor ranks, behind the verbs of a training step.

    An engine that dies or hangs is replaced unnoticed. Where a rank does, the verb raises
    `WorkersLostError`; then `restart`, `load` and `sync_weights` make the cluster usable again.

    With ``actor.num_ranks=0``, as an evaluation has it, there are no ranks, and `generate` is all it does.
    """

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        on_finished: OnFinished | None = None,
        stoppable: bool = True,
    ) -> list[Rollout]:
        """One rollout a request, in their order, from all engines together.

        May run in a thread of its own beside `update` and `log_probs`.

        Args:
            requests: those first that are likely to take longest; engines begin with them.
            on_finished: told of each rollout as it ends.
            stoppable: give up where the user wants the run to end; False finishes first.

        Raises:
            StopRequestedError: the user wants the run to end; what was generated is lost.
        """

    def prepare(self, prompt_ids: Sequence[str]) -> None:
        """Have engines that are idle now encode prompts that they are likely to get next; returns at once.
        Where none is idle, nothing."""
        return

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """One policy update on all ranks; returns its metrics."""

    @property
    def ranks_idle_in_rollout(self) -> bool:
        """Whether the ranks have devices of their own, which do nothing while engines generate."""

    def log_probs(self, batch: TrainBatch, reference: bool = False) -> TokenLogProbs:
        """Log-probs of the responses of a batch under the policy as it is, and under the reference."""

    def sync_weights(self, version: int) -> None:
        """Give the actor's weights to every engine; later rollouts carry ``version``."""

    def begin_save(self, directory: str) -> SaveHandle:
        """Write parameters and optimizer as they are now; training may go on at once."""

    def load(self, directory: str) -> None:
        """Read what `begin_save` wrote."""

    def restart(self) -> None:
        """Ranks anew, with the base model's weights."""

    def write_timeline(self, path: str) -> None:
        """What every worker did when, as a Chrome trace; nothing where there is one process only."""
        return

    def metrics(self) -> dict[str, float]:
        """Resident memory by role, the largest process of each, and the total, GiB; ``perf/gpus`` that are in
        use, if any; and what the engines counted since the last call."""

    def shutdown(self) -> None:
        """End all workers."""


def join_log_probs(shares: Sequence[RankLogProbs], batch: TrainBatch) -> TokenLogProbs:
    """The log-probs of a batch, of which each rank computed its share, in the order of the batch."""
    starts, lengths = batch.response_offsets, batch.response_lengths
    order = np.concatenate([share.sequences for share in shares])
    assert len(order) == len(batch), "the ranks took some rollouts twice or not at all"
    # Where each value belongs: the start of its rollout, and how far it is into it.
    ends = np.cumsum(lengths[order])
    places = np.repeat(starts[order] - ends + lengths[order], lengths[order]) + np.arange(ends[-1])

    def in_order(values: np.ndarray) -> np.ndarray:
        result = np.empty(len(places), np.float32)
        result[places] = values
        return result

    found = TokenLogProbs.join(shares)
    reference = None if found.reference is None else in_order(found.reference)
    return TokenLogProbs(in_order(found.policy), reference)


def rss_gib() -> float:
    """Resident set of this process in GiB, pages that it shares with others included."""
    return float(psutil.Process().memory_info().rss) / 2**30
