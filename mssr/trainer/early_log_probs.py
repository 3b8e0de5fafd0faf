"""Log-probs of responses that have ended, while the ranks would be idle and others are still generated.

The parts are fixed by the order of the requests and not by who ended when, so that the passes, and with
them the last bits of the results, do not depend on time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mssr.cluster.base import Cluster
from mssr.types import Rollout, TokenLogProbs, TrainBatch

PARTS = 8
"""Parts of a step that go through the model one after the other."""


class EarlyLogProbs:
    """The log-probs of one step's rollouts in parts, each as soon as all of it has ended.

    Leave the ``with`` to end its thread.

    Args:
        order: indices of the rollouts in the order in which engines begin them.
        reference: whether those of the frozen base model are wanted too.
    """

    def __init__(self, cluster: Cluster, order: Sequence[int], reference: bool) -> None:
        self._cluster = cluster
        self._reference = reference
        self._parts = [part.tolist() for part in np.array_split(np.asarray(order), min(PARTS, len(order)))]
        self._part_of = {i: k for k, part in enumerate(self._parts) for i in part}
        self._ended: list[dict[int, Rollout]] = [{} for _ in self._parts]
        self._thread = ThreadPoolExecutor(1, "early-log-probs")
        self._results: dict[int, Future[list[TokenLogProbs]]] = {}

    def add(self, index: int, rollout: Rollout) -> None:
        """A rollout has ended."""
        k = self._part_of[index]
        self._ended[k][index] = rollout
        if len(self._ended[k]) == len(self._parts[k]):
            self._results[k] = self._thread.submit(self._of, [self._ended[k][i] for i in self._parts[k]])

    def result(self) -> list[TokenLogProbs]:
        """Of all rollouts by their index, when all are there.

        Raises:
            WorkersLostError: a rank died or hung.
        """
        found: dict[int, TokenLogProbs] = {}
        for k, part in enumerate(self._parts):
            found.update(zip(part, self._results[k].result(), strict=True))
        return [found[i] for i in range(len(found))]

    def __enter__(self) -> EarlyLogProbs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=kind is not KeyboardInterrupt, cancel_futures=True)

    def _of(self, rollouts: Sequence[Rollout]) -> list[TokenLogProbs]:
        found = self._cluster.log_probs(TrainBatch.of(rollouts), reference=self._reference)
        return found.split(rollouts)
