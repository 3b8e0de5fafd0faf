"""Log-probs of responses that have ended, while the ranks would be idle and others are still generated.

The parts are fixed by the order of the requests and not by who ended when, so that the passes, and with
them the last bits of the results, do not depend on time.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mssr.cluster.base import Cluster
from mssr.trainer.batch import make_batch
from mssr.types import Rollout, TokenLogProbs

PARTS = 8
"""Parts of a step that are scored one after the other."""


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Log-probs (nats) of the T tokens of one response."""

    policy: np.ndarray
    """(T,) float32 under the policy before the step."""
    reference: np.ndarray | None
    """(T,) float32 under the frozen base model, where it is held."""


class EarlyScores:
    """The scoring of one step's rollouts in parts, each as soon as all of it has ended.

    Leave the ``with`` to end its thread.

    Args:
        order: indices of the rollouts in the order in which engines begin them.
        reference: whether the frozen base model scores them too.
    """

    def __init__(self, cluster: Cluster, order: Sequence[int], reference: bool) -> None:
        self._cluster = cluster
        self._reference = reference
        self._parts = [part.tolist() for part in np.array_split(np.asarray(order), min(PARTS, len(order)))]
        self._part_of = {i: k for k, part in enumerate(self._parts) for i in part}
        self._missing = [len(part) for part in self._parts]
        self._rollouts: dict[int, Rollout] = {}
        self._thread = ThreadPoolExecutor(1, "early-scores")
        self._results: dict[int, Future[TokenLogProbs]] = {}

    def add(self, index: int, rollout: Rollout) -> None:
        """A rollout has ended."""
        self._rollouts[index] = rollout
        part = self._part_of[index]
        self._missing[part] -= 1
        if not self._missing[part]:
            self._results[part] = self._thread.submit(self._score, self._parts[part])

    def result(self) -> list[ScoredTokens]:
        """Of all rollouts by their index, when all are there.

        Raises:
            WorkersLostError: a rank died or hung.
        """
        found: dict[int, ScoredTokens] = {}
        for k, part in enumerate(self._parts):
            scored = self._results[k].result()
            rollouts = [self._rollouts[i] for i in part]
            found.update(zip(part, split_scores(scored, rollouts), strict=True))
        return [found[i] for i in range(len(found))]

    def __enter__(self) -> EarlyScores:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=kind is not KeyboardInterrupt, cancel_futures=True)

    def _score(self, part: Sequence[int]) -> TokenLogProbs:
        batch = make_batch([self._rollouts[i] for i in part], np.zeros(len(part), np.float32))
        return self._cluster.log_probs(batch, reference=self._reference)


def split_scores(scored: TokenLogProbs, rollouts: Sequence[Rollout]) -> list[ScoredTokens]:
    """What was scored in one batch, by rollout."""
    ends = np.cumsum([len(r.response_token_ids) for r in rollouts])[:-1]
    policy = np.split(scored.policy, ends)
    if scored.reference is None:
        return [ScoredTokens(p, None) for p in policy]
    return [ScoredTokens(p, r) for p, r in zip(policy, np.split(scored.reference, ends), strict=True)]
