"""The scoring of batches, which survives whatever single responses do to a reward function."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mssr.config.options import check_read, check_values
from mssr.errors import TrainingError, UserError
from mssr.rewards import functions
from mssr.rewards.base import Failure, Outcome, RewardInput, RewardResult
from mssr.rewards.pool import RewardPool
from mssr.rewards.rows import NO_ROWS, RowAccess
from mssr.rewards.worker import Job

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig

_log = logging.getLogger(__name__)
MAX_WORKERS = 8
"""Processes if the config does not say how many."""
MIN_BATCH = 8
"""Smaller batches never stop a run, whatever failed."""


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The scores of B responses."""

    scores: npt.NDArray[np.float32]
    """(B,) finite; 0 where the function failed."""
    parts: dict[str, npt.NDArray[np.float32]]
    """(B,) for every part that any response had; 0 where a response lacks it."""
    errors: int
    """Responses on which the function raised, gave no usable score, died or took too long."""
    timeouts: int = 0
    """Those of the errors that the time limit ended."""


class Scorer(AbstractContextManager["Scorer"]):
    """Scores batches with the reward of a config, in processes that it owns until `close`.

    They start in the background: what the caller does next costs no waiting.

    Args:
        max_response_length: longest response in tokens, which the penalties on length refer to.
        clip: let penalties take a score no lower than 0, for methods whose rewards are in [0, 1].
        rows: Where the rows are; without, a function that asks for images is refused, and prompts are empty.
        on_restart: Called with one sentence, how it died, each time the process that owns the workers has
            to be started again, from another thread. If it raises, `score` raises the same.
        on_failure: Called with one sentence when responses of a batch failed, the first time and whenever
            the share of them is four times what was told.

    Raises:
        UserError: The function cannot be had, or an option has no meaning; see `check`.
    """

    def __init__(
        self,
        config: RewardConfig,
        max_response_length: int,
        *,
        clip: bool = False,
        rows: RowAccess = NO_ROWS,
        on_restart: Callable[[str], None] | None = None,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        reward = check(config, rows)
        if config.overlong_buffer > max_response_length:
            raise UserError(
                f"reward.overlong_buffer={config.overlong_buffer} exceeds "
                f"rollout.max_response_length={max_response_length}"
            )
        self.name = config.name
        self.takes_cells = not config.rule
        """Whether answers are to be the data's cells as they are; else they are text."""
        self._on_failure = on_failure
        self._told = 0.0  # share of failures
        job = Job(
            config,
            max_response_length,
            clip,
            workers=config.workers or min(MAX_WORKERS, len(os.sched_getaffinity(0))),
            together=reward.batch or reward.is_async,
            rows=reward.access,
            sized=reward.sized,
        )
        self.pool = RewardPool(job, on_restart)

    def score(self, inputs: Sequence[RewardInput]) -> ScoredBatch:
        """Score B responses.

        A response on which the function raises, dies, hangs, or gives NaN, an infinity or something
        that is no score, gets 0 and is counted; the first traceback of this scorer is logged. With
        penalties, the score before them is the part ``score_raw`` (and ``accuracy``, if the function
        has no such part).

        Raises:
            TrainingError: All of at least `MIN_BATCH` responses failed, or the processes cannot be kept
                running. (A parser that trips over most of an untrained model's responses is still a reward.)
            ValueError: the scorer is closed.
        """
        with ScoringStream(self) as stream:
            for index, item in enumerate(inputs):
                stream.add(index, item)
            return stream.result()

    def close(self) -> None:
        """End the processes; may be called again."""
        self.pool.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self, inputs: Sequence[RewardInput], failures: dict[int, Failure]) -> None:
        """Say which responses of a batch failed, by their place in it; TrainingError where all did."""
        i, first = next(iter(failures.items()))
        if not self._told:
            _log.warning(
                "reward %r failed on response %d (score 0; further failures are only counted): %.200r\n%s",
                self.name,
                i,
                inputs[i].response,
                first.traceback or first.reason,
            )
        told = f"the reward {self.name!r} failed on {len(failures)} of {len(inputs)} responses"
        if len(failures) == len(inputs) >= MIN_BATCH:
            raise TrainingError(f"{told} ({first.reason})")
        share = len(failures) / len(inputs)
        if share >= 4 * self._told:
            self._told = share
            if self._on_failure is not None:
                self._on_failure(f"{told}, which score 0 ({first.reason}); the log has the first traceback")


class ScoringStream(AbstractContextManager["ScoringStream"]):
    """A batch whose responses come one by one and are scored meanwhile.

    Leaving the ``with`` by an exception gives up what is still being scored.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._scored: dict[int, tuple[RewardInput, Future[Outcome]]] = {}

    def add(self, index: int, item: RewardInput) -> None:
        """A response has come; ``index`` is its place in the batch."""
        self._scored[index] = item, self._scorer.pool.submit(item)

    def result(self) -> ScoredBatch:
        """The scores of all, when all have come and are scored; raises as `Scorer.score`."""
        scored = [self._scored[i] for i in range(len(self._scored))]
        outcomes = [future.result() for _, future in scored]
        failures = {i: o for i, o in enumerate(outcomes) if isinstance(o, Failure)}
        if failures:
            self._scorer.tell([item for item, _ in scored], failures)
        results = [RewardResult(0.0) if isinstance(o, Failure) else o for o in outcomes]
        keys = sorted({key for result in results for key in result.parts})
        return ScoredBatch(
            scores=np.array([result.score for result in results], np.float32),
            parts={key: np.array([r.parts.get(key, 0.0) for r in results], np.float32) for key in keys},
            errors=len(failures),
            timeouts=sum(f.timeout for f in failures.values()),
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._scorer.pool.reset()


def check(config: RewardConfig, rows: RowAccess | None = None) -> functions.LoadedReward:
    """The function of a section; refuses what cannot mean what it says.

    Args:
        rows: None while the data is not open: then a function may name any column.

    Raises:
        UserError: One line. A value is out of its range; the function cannot be had, or does not take
            the options; an option was set that nothing reads.
    """
    check_values(config, "reward.")
    check_read(config, "reward.")
    return functions.load(config, rows)


def advice(config: RewardConfig, bounded: bool) -> list[str]:
    """What is allowed and good to know, one line each.

    Args:
        bounded: whether the method takes rewards in [0, 1] only, as the Beta baseline does.
    """
    lines = []
    if note := functions.load(config, access=None).note:
        lines.append(f"reward.name={config.name}: {note}")
    if bounded and config.format == "weighted" and config.format_weight > 0:
        lines.append(
            f"reward.format=weighted: a wrong answer in the right format scores {config.format_weight:g}, so "
            "rewards are not 0 or 1 and the Beta baseline estimates a mean score, not an accuracy"
        )
    penalties = ("overlong_buffer", "length_penalty", "repetition_penalty")
    if bounded and (on := [f"reward.{key}" for key in penalties if getattr(config, key)]):
        lines.append(
            f"{', '.join(on)}: the method takes rewards in [0, 1], so no penalty goes below 0 and "
            "wrong answers are not penalised"
        )
    return lines
