"""The scoring of batches, which survives whatever single responses do to a reward function."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mssr.algorithms import plugins
from mssr.config.options import check_read, check_values
from mssr.errors import TrainingError, UserError
from mssr.rewards import functions, penalties
from mssr.rewards.base import Failure, Outcome, RewardInput, RewardResult
from mssr.rewards.pool import RewardPool
from mssr.rewards.rows import NO_ROWS, RowAccess
from mssr.rewards.worker import Job

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig

_log = logging.getLogger(__name__)
MAX_WORKERS = 8
"""Processes if the config does not say how many."""


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The scores of B responses.

    Example: ``ScoredBatch(scores=[1, 0], parts={"format": [1, 1]}, errors=0)``
    """

    scores: npt.NDArray[np.float32]
    """(B,) finite; 0 where the function failed."""
    parts: dict[str, npt.NDArray[np.float32]]
    """(B,) for every part that any response had; 0 where a response lacks it."""
    errors: int
    """Responses on which the function raised, gave no usable score, died or took too long."""
    timeouts: int = 0
    """Those of the errors that the time limit ended."""


class Scorer:
    """Scores batches with the reward of a config, in processes that it owns until `close`.

    They start in the background: what the caller does next costs no waiting.

    Args:
        max_response_length: longest response in tokens, which the penalties on length refer to.
        clip: let penalties take a score no lower than 0, for methods whose rewards are in [0, 1].
        error_limit: The run stops when at least this fraction of a batch failed, in (0, 1]. The
            default stops only if every response failed: a parser that trips over most of an untrained
            model's responses is still a reward.
        min_batch: Smaller batches never stop the run.
        rows: Where the rows are; without, a function that asks for images is refused, and prompts are empty.
        on_restart: Called with one sentence, how it died, each time the process that owns the workers has
            to be started again, from another thread. If it raises, `score` raises the same.
        on_failure: Called with one sentence when responses of a batch failed, the first time and whenever
            the share of them is four times what was told.

    Raises:
        UserError: The function cannot be had, or an option has no meaning; see `check`.
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        config: RewardConfig,
        max_response_length: int,
        *,
        clip: bool = False,
        error_limit: float = 1.0,
        min_batch: int = 8,
        rows: RowAccess = NO_ROWS,
        on_restart: Callable[[str], None] | None = None,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        if not 0 < error_limit <= 1:
            raise ValueError(f"error_limit must be in (0, 1], not {error_limit}")
        if min_batch < 1:
            raise ValueError(f"min_batch must be >= 1, not {min_batch}")
        check(config, rows)
        reward = functions.load(config, rows)
        if config.overlong_buffer > max_response_length:
            raise UserError(
                f"reward.overlong_buffer={config.overlong_buffer} exceeds "
                f"rollout.max_response_length={max_response_length}"
            )
        self.name = config.name
        self.clip = clip
        self.error_limit = error_limit
        self.min_batch = min_batch
        self.takes_cells = plugins.is_spec(config.name)
        """Whether answers are to be the data's cells as they are; else they are text."""
        self._on_failure = on_failure
        self._error_logged = False
        self._told = 0.0
        job = Job(
            config,
            max_response_length,
            workers=config.workers or min(MAX_WORKERS, _cores()),
            together=reward.batch or reward.is_async,
            rows=replace(rows, sized=reward.binding.sized) if reward.binding.rows and rows.sources else None,
        )
        self._pool = RewardPool(job, on_restart)

    def score(self, inputs: Sequence[RewardInput]) -> ScoredBatch:
        """Score B responses.

        A response on which the function raises, dies, hangs, or gives NaN, an infinity or something
        that is no score, gets 0 and is counted; the first traceback of this scorer is logged. With
        penalties, the score before them is the part ``score_raw`` (and ``accuracy``, if the function
        has no such part).

        Raises:
            TrainingError: ``error_limit`` is reached, or the processes cannot be kept running.
            ValueError: the scorer is closed.
        """
        with ScoringStream(self) as stream:
            for index, item in enumerate(inputs):
                stream.add(index, item)
            return stream.result()

    def submit(self, item: RewardInput) -> Future[Outcome]:
        """Begin to score a response; the first half of `score`. The future raises as that does."""
        return self._pool.submit(item)

    def combine(self, inputs: Sequence[RewardInput], outcomes: Sequence[Outcome]) -> ScoredBatch:
        """The outcomes of a whole batch as its scores; the second half of `score`."""
        failures = {i: o for i, o in enumerate(outcomes) if isinstance(o, Failure)}
        for i, failure in failures.items():
            self._log_first(i, inputs[i], failure)
        if failures:
            self._tell(list(failures.values()), len(inputs))
        results = [RewardResult(0.0) if isinstance(o, Failure) else o for o in outcomes]
        keys = sorted({key for result in results for key in result.parts})
        return ScoredBatch(
            scores=np.array([self._final(result) for result in results], np.float32),
            parts={key: np.array([r.parts.get(key, 0.0) for r in results], np.float32) for key in keys},
            errors=len(failures),
            timeouts=sum(f.timeout for f in failures.values()),
        )

    def reset(self) -> None:
        """Give up what is being scored."""
        self._pool.reset()

    def close(self) -> None:
        """End the processes; may be called again."""
        self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _final(self, result: RewardResult) -> float:
        # A score that is out of [0, 1] by itself stays so: the method is to refuse it.
        raw = result.parts.get("score_raw")
        return max(result.score, min(raw, 0.0)) if self.clip and raw is not None else result.score

    def _tell(self, failures: Sequence[Failure], count: int) -> None:
        """Say that responses failed, and raise TrainingError where too many did."""
        told = f"the reward {self.name!r} failed on {len(failures)} of {count} responses"
        if count >= self.min_batch and len(failures) >= self.error_limit * count:
            raise TrainingError(f"{told} ({failures[-1].reason})")
        share = len(failures) / count
        if self._on_failure is not None and share >= 4 * self._told:
            self._told = share
            self._on_failure(f"{told}, which score 0 ({failures[0].reason}); the log has the first traceback")

    def _log_first(self, i: int, item: RewardInput, failure: Failure) -> None:
        if self._error_logged:
            return
        self._error_logged = True
        _log.warning(
            "reward %r failed on response %d (score 0; further failures are only counted): %.200r\n%s",
            self.name,
            i,
            item.response,
            failure.traceback or failure.reason,
        )


class ScoringStream:
    """A batch whose responses come one by one and are scored meanwhile.

    Leaving the ``with`` by an exception gives up what is still being scored.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._inputs: dict[int, RewardInput] = {}
        self._futures: dict[int, Future[Outcome]] = {}

    def add(self, index: int, item: RewardInput) -> None:
        """A response has come; ``index`` is its place in the batch."""
        self._inputs[index] = item
        self._futures[index] = self._scorer.submit(item)

    def result(self) -> ScoredBatch:
        """The scores of all, when all have come and are scored.

        Raises:
            TrainingError: as `Scorer.score`.
        """
        order = range(len(self._inputs))
        outcomes = [self._futures[i].result() for i in order]
        return self._scorer.combine([self._inputs[i] for i in order], outcomes)

    def __enter__(self) -> ScoringStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._scorer.reset()


def names() -> list[str]:
    """Rewards that need no file, sorted."""
    return functions.rule_names()


def check(config: RewardConfig, rows: RowAccess | None = None) -> None:
    """Refuse a section that cannot mean what it says; loads a user's file to see.

    Args:
        rows: None while the data is not open: then a function may name any column.

    Raises:
        UserError: One line. A value is out of its range; the function cannot be had, or does not take
            the options; an option was set that nothing reads.
    """
    check_values(config, "reward.")
    check_read(config, "reward.")
    functions.load(config, rows)


def advice(config: RewardConfig, bounded: bool) -> list[str]:
    """What is allowed and good to know, one line each.

    Args:
        bounded: whether the method takes rewards in [0, 1] only, as the Beta baseline does.
    """
    lines = []
    if note := functions.load(config, access=None).binding.note:
        lines.append(f"reward.name={config.name}: {note}")
    if bounded and config.format == "weighted" and config.format_weight > 0:
        lines.append(
            f"reward.format=weighted: a wrong answer in the right format scores {config.format_weight:g}, so "
            "rewards are not 0 or 1 and the Beta baseline estimates a mean score, not an accuracy"
        )
    if bounded and (keys := penalties.configured(config)):
        lines.append(
            f"{', '.join(keys)}: the method takes rewards in [0, 1], so no penalty goes below 0 and "
            "wrong answers are not penalised"
        )
    return lines


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
