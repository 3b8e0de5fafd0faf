"""Scoring that goes on while the responses of a batch are still being generated."""

from __future__ import annotations

import queue
import threading

from mssr.rewards.base import RewardInput
from mssr.rewards.batch import Outcome
from mssr.rewards.scoring import ScoredBatch, Scorer

GATHER_S = 0.25
"""How long what comes is gathered before it is scored: every few responses cost a round to the processes."""


class ScoringStream:
    """A batch whose responses come one by one, scored in a thread of its own.

    What has come while others were scored, and shortly after, is scored next, together. Leave the ``with``
    to end the thread.

    Args:
        scorer: nobody else may use it meanwhile.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._arrived: queue.SimpleQueue[tuple[int, RewardInput] | None] = queue.SimpleQueue()
        self._inputs: dict[int, RewardInput] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._error: BaseException | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._score, name="scoring", daemon=True)
        self._thread.start()

    def add(self, index: int, item: RewardInput) -> None:
        """A response has come; ``index`` is its place in the batch."""
        self._inputs[index] = item
        self._arrived.put((index, item))

    def result(self) -> ScoredBatch:
        """The scores of all, when all have come and are scored.

        Raises:
            TrainingError: as `Scorer.score`, and whatever else came up in the thread.
        """
        self._end()
        if self._error is not None:
            raise self._error
        order = range(len(self._inputs))
        return self._scorer.combine([self._inputs[i] for i in order], [self._outcomes[i] for i in order])

    def __enter__(self) -> ScoringStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._error = self._error or _Abandoned()  # what has come and is not scored is dropped
        if kind is not KeyboardInterrupt:  # a response that hangs would keep the user waiting
            self._end()

    def _end(self) -> None:
        self._ending.set()
        self._arrived.put(None)
        self._thread.join()

    def _score(self) -> None:
        more = True
        while more:
            arrived = [self._arrived.get()]
            self._ending.wait(GATHER_S)
            while not self._arrived.empty():
                arrived.append(self._arrived.get())
            more = None not in arrived
            part = [x for x in arrived if x is not None]
            if self._error is not None or not part:
                continue
            try:
                outcomes = self._scorer.outcomes([item for _, item in part])
                self._outcomes.update(zip([i for i, _ in part], outcomes, strict=True))
            except BaseException as error:  # handed to the thread that asks for the result
                self._error = error


class _Abandoned(Exception):
    """The batch is not wanted any more."""
