"""The scoring of batches, which survives whatever single responses do to a reward function."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mssr.config.data import JUDGE, REMOTE
from mssr.config.options import check_read, check_values
from mssr.errors import TrainingError, UserError
from mssr.rewards import functions
from mssr.rewards.base import Failure, Outcome, RewardInput, RewardResult, combined
from mssr.rewards.pool import RewardPool
from mssr.rewards.rows import NO_ROWS, RowAccess
from mssr.rewards.servers import ServerReward, open_server
from mssr.rewards.worker import Job

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig

_log = logging.getLogger(__name__)
MAX_WORKERS = 8
"""Processes if the config does not say how many."""
METRICS = ("accuracy", "score", "score_raw", "errors", "timeouts", "failed")
"""What none of several rewards may be called."""
MIN_BATCH = 8
"""Smaller batches never stop a run, whatever failed."""


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The scores of B responses."""

    scores: npt.NDArray[np.float32]
    """(B,) 0 where the function failed; NaN where there is no score, which is no part of any mean."""
    parts: dict[str, npt.NDArray[np.float32]]
    """(B,) for every part that any response had; 0 where a response lacks it, NaN for those of one of
    several rewards that gave no score."""
    errors: int
    """Responses on which the function raised, gave no usable score, died or took too long."""
    timeouts: int = 0
    """Those of the errors that the time limit ended."""

    @property
    def unscored(self) -> npt.NDArray[np.bool_]:
        """(B,) where there is no score."""
        return np.isnan(self.scores)

    @property
    def accuracies(self) -> npt.NDArray[np.float32]:
        """(B,) the part ``accuracy``, else the score; NaN where there is no score."""
        return np.where(self.unscored, self.scores, self.parts.get("accuracy", self.scores))


class Scorer(AbstractContextManager["Scorer"]):
    """Scores batches with the reward of a config, in processes that it owns until `close`.

    They start in the background: what the caller does next costs no waiting.

    Args:
        max_response_length: longest response in tokens, which the penalties on length refer to.
        clip: let penalties take a score no lower than 0, for methods whose rewards are in [0, 1].
        rows: Where the rows are; without, a function that asks for images is refused, and prompts are empty.
        on_restart: Called with one sentence, how it died, each time the process that owns the workers has
            to be started again, from another thread. If it raises, `score` raises the same.
        on_failure: Called with one sentence when responses of a batch failed, or have no score, the first
            time and whenever the share of them is four times what was told.
        directory: Where the verdicts of a judge are kept; None for nowhere.

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
        directory: Path | None = None,
    ) -> None:
        loaded = check(config, rows)
        if config.overlong_buffer > max_response_length:
            raise UserError(
                f"reward.overlong_buffer={config.overlong_buffer} exceeds "
                f"rollout.max_response_length={max_response_length}"
            )
        self.name = ", ".join(config.names)
        self.takes_cells = config.takes_cells
        """Whether answers are to be the data's cells as they are; else they are text."""
        self.labels = config.labels if isinstance(config.name, list) else []
        """Of several rewards."""
        self._on_failure = on_failure
        self._told = 0.0  # share of failures
        every = zip(self.labels or [""], config.weights or [1.0] * len(loaded), config.each(), strict=True)
        sections = [(*one, reward) for one, reward in zip(every, loaded, strict=True)]
        own = [reward for reward in loaded if reward is not None]
        self.job = Job(
            config,
            tuple((label, weight, one) for label, weight, one, reward in sections if reward is not None),
            max_response_length,
            clip,
            workers=config.workers or min(MAX_WORKERS, len(os.sched_getaffinity(0))),
            together=any(reward.batch or reward.is_async for reward in own),
            rows=next((reward.access for reward in own if reward.access.sources), NO_ROWS),
            sized=any(reward.sized for reward in own),
            partial=len(own) < len(loaded),
        )
        self.sources: list[tuple[str, float, RewardPool | ServerReward]] = [
            (label, weight, ServerReward(one, rows, directory))
            for label, weight, one, reward in sections
            if reward is None
        ]
        """Label, weight and what scores: the processes for all functions together, and each server."""
        self.pool = RewardPool(self.job, on_restart) if own else None
        if self.pool is not None:
            self.sources.append(("", 1.0, self.pool))

    def score(self, inputs: Sequence[RewardInput]) -> ScoredBatch:
        """Score B responses.

        A response on which the function raises, dies, hangs, or gives NaN, an infinity or something
        that is no score, gets 0 and is counted; the first traceback of this scorer is logged. One for
        which a function of TRL gives None, or a server no usable reply, has no score. With
        penalties, the score before them is the part ``score_raw`` (and ``accuracy``, if the function
        has no such part). Of several rewards each is a part, ``accuracy`` is that of the first that gave a
        score, and other parts are ``label/part``.

        Raises:
            TrainingError: All of at least `MIN_BATCH` responses failed (a parser that trips over most of an
                untrained model's responses is still a reward); the processes cannot be kept running; or
                a server may be asked no more.
            ValueError: the scorer is closed.
        """
        with ScoringStream(self) as stream:
            for index, item in enumerate(inputs):
                stream.add(index, item)
            return stream.result()

    def close(self) -> None:
        """End the processes and threads; may be called again."""
        for _, _, source in self.sources:
            source.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, item: RewardInput) -> list[Future[Outcome]]:
        """Have a response scored by every source."""
        return [source.submit(item) for _, _, source in self.sources]

    def outcome(self, item: RewardInput, outcomes: Sequence[Outcome]) -> Outcome:
        """What those of `submit` come to."""
        labels, weights, _ = zip(*self.sources, strict=True)
        outcome = combined(list(zip(labels, weights, outcomes, strict=True)))
        return self.job.final(item, outcome) if self.job.partial else outcome

    def tell(self, inputs: Sequence[RewardInput], failures: dict[int, Failure]) -> None:
        """Say which responses of a batch failed, by their place in it; TrainingError where all did."""
        i, first = next(iter(failures.items()))
        if not self._told:
            _log.warning(
                "reward %r failed on response %d (further failures are only counted): %.200r\n%s",
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
            unscored = sum(failure.unscored for failure in failures.values())
            mixed = f"of which {unscored} have no score and are left out, and the others score 0"
            none = "which have no score and are left out"
            what = {0: "which score 0", len(failures): none}.get(unscored, mixed)
            if self._on_failure is not None:
                self._on_failure(f"{told}, {what} ({first.reason}); the log has the first traceback")


class ScoringStream(AbstractContextManager["ScoringStream"]):
    """A batch whose responses come one by one and are scored meanwhile.

    Leaving the ``with`` by an exception gives up what is still being scored.
    """

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._scored: dict[int, tuple[RewardInput, list[Future[Outcome]]]] = {}

    def add(self, index: int, item: RewardInput) -> None:
        """A response has come; ``index`` is its place in the batch."""
        self._scored[index] = item, self._scorer.submit(item)

    def result(self) -> ScoredBatch:
        """The scores of all, when all have come and are scored; raises as `Scorer.score`."""
        scorer, scored = self._scorer, [self._scored[i] for i in range(len(self._scored))]
        items = [item for item, _ in scored]
        outcomes = [scorer.outcome(item, [f.result() for f in futures]) for item, futures in scored]
        failures = {i: o for i, o in enumerate(outcomes) if isinstance(o, Failure)}
        if failures:
            scorer.tell(items, failures)
        errors = [failure for failure in failures.values() if not failure.unscored]
        results = [
            RewardResult(math.nan if o.unscored else 0.0) if isinstance(o, Failure) else o for o in outcomes
        ]
        keys = sorted({key for result in results for key in result.parts}.union(scorer.labels))

        def part(key: str, of: Mapping[str, float]) -> float:
            label = key.partition("/")[0]
            silent = of and label in scorer.labels and label not in of
            return of.get(key, math.nan if silent else 0.0)

        parts = {key: np.array([part(key, r.parts) for r in results], np.float32) for key in keys}
        if scorer.labels:
            parts["accuracy"] = np.full(len(results), np.nan, np.float32)
            for label in reversed(scorer.labels):
                own = parts.get(f"{label}/accuracy", parts[label])
                parts["accuracy"] = np.where(np.isnan(parts[label]), parts["accuracy"], own)
        return ScoredBatch(
            scores=np.array([result.score for result in results], np.float32),
            parts=parts,
            errors=len(errors),
            timeouts=sum(failure.timeout for failure in errors),
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        for scored in self._scored.values():
            for future in scored[1]:
                future.cancel()
        if self._scorer.pool is not None:
            self._scorer.pool.reset()


def check(config: RewardConfig, rows: RowAccess | None = None) -> list[functions.LoadedReward | None]:
    """The functions of a section, None for those of a server; refuses what cannot mean what it says.

    Args:
        rows: None while the data is not open: then a function may name any column.

    Raises:
        UserError: One line. A value is out of its range; a function or server cannot be had, or does not
            take the options; an option was set that nothing reads; several names cannot be told apart.
    """
    check_values(config, "reward.")
    check_read(config, "reward.")
    if isinstance(config.name, list):
        _check_several(config)
    loaded: list[functions.LoadedReward | None] = []
    for one in config.each():
        if one.name not in (JUDGE, REMOTE):
            loaded.append(functions.load(one, rows))
            continue
        if one.options:
            own = "reward.judge" if one.name == JUDGE else "reward.url"
            raise UserError(f"reward.options: {one.name} takes none; set {own} and reward.server")
        open_server(one)
        loaded.append(None)
    return loaded


def _check_several(config: RewardConfig) -> None:
    labels, weights = config.labels, config.weights
    if not labels:
        raise UserError("reward.name=[] names no reward")
    if taken := {label for label in labels if labels.count(label) > 1 or label in METRICS}:
        raise UserError(f"reward.name: {min(taken)} is the name of two things in metrics; rename a function")
    if weights is not None and len(weights) != len(labels):
        raise UserError(f"reward.weights={weights} must be {len(labels)} numbers, one for each reward.name")
    for key, value in config.options.items():
        if key not in labels or not isinstance(value, dict):
            raise UserError(
                f"reward.options.{key}: of several rewards each has a section of options, under one of "
                f"{', '.join(labels)}: reward.options.{labels[0]}.{key}={value}"
            )


def advice(config: RewardConfig, bounded: bool) -> list[str]:
    """What is allowed and good to know, one line each.

    Args:
        bounded: whether the method takes rewards in [0, 1] only, as the Beta baseline does.
    """
    lines = []
    for one in config.each():
        if one.name not in (JUDGE, REMOTE) and (note := functions.load(one, access=None).note):
            lines.append(f"reward.name={one.name}: {note}")
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
