"""Which batch of rollouts a step trains on: its own, or with ``rollout.lag=1`` one collected a step ahead.

With lag 1 the batch of step k+1 is collected with the weights as they are at the beginning of step k, in a
thread, while step k trains. At the end of a step nothing is under way any more: weights, validation and
checkpoints find the engines idle, and a checkpoint holds the batch that waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from mssr.config import Config
from mssr.errors import StopRequestedError, check_version
from mssr.trainer.collect import Collected, RolloutCollector
from mssr.trainer.timing import PhaseTimer

_STATE_VERSION = 2


class RolloutPipeline:
    """Hands out one batch a step.

    Each step: `take`, `begin_next`, the training, `finish_next`. Leave the ``with`` to end its thread.
    """

    def __init__(self, config: Config, collector: RolloutCollector, timer: PhaseTimer) -> None:
        self.config = config
        self.collector = collector
        self.timer = timer
        self._thread = ThreadPoolExecutor(1, "collector")
        self._next: Future[Collected] | None = None
        self._waiting: Collected | None = None

    def take(self, step: int) -> Collected:
        """The batch of this step (0 the first), collected now unless it waits.

        Raises:
            StopRequestedError: the user wants the run to end; it is as if nothing had been drawn.
        """
        if self._waiting is not None:
            collected, self._waiting = self._waiting, None
            return collected
        sampler = self.collector.sampler
        before = sampler.state_dict()
        try:
            collected = self.collector.collect(step, self.collector.draw())
        except StopRequestedError:
            sampler.load_state_dict(before)
            raise
        self.timer.add(self.collector.timer.take())
        return collected

    def begin_next(self, step: int) -> None:
        """Begin to collect the batch of this step in the background, where the lag asks for it; else have
        the engines, which are idle, prepare its prompts.

        With a lag its prompts are drawn at once, so that they do not depend on how far the training is.
        Without, what is learned until they are may change some, where the sampler goes by that.
        """
        if step >= self.config.trainer.steps:
            return
        self._before_draw = self.collector.sampler.state_dict()
        prompts = self.collector.draw()
        if self.config.rollout.lag:
            self._next = self._thread.submit(self.collector.collect, step, prompts, stoppable=False)
        else:
            self.collector.sampler.load_state_dict(self._before_draw)
            self.collector.cluster.prepare(prompts)

    def finish_next(self) -> None:
        """Wait for what `begin_next` began.

        Raises:
            TrainingError: as `RolloutCollector.collect`.
        """
        if self._next is None:
            return
        try:
            with self.timer("rollout"):
                self._waiting = self._next.result()
        except StopRequestedError:
            # Engines were lost as the run was to end: as if nothing had been drawn. The next start collects
            # its first batch with the weights that it has.
            self.collector.sampler.load_state_dict(self._before_draw)
        self._next = None
        seconds = self.collector.timer.take()
        # They passed beside those of the training, and are no part of the step's sum.
        self.timer.add({key.replace("timing/", "timing/ahead_"): value for key, value in seconds.items()})

    def __enter__(self) -> RolloutPipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until nothing is under way, but not for who is in a hurry."""
        self._thread.shutdown(wait=kind is not KeyboardInterrupt, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """The batch that waits, and what the collector knows. Nothing may be under way."""
        assert self._next is None
        return {
            "version": _STATE_VERSION,
            "lengths": self.collector.lengths.state_dict(),
            "waiting": None if self._waiting is None else self._waiting.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ValueError: the state is of another version.
        """
        check_version(state, _STATE_VERSION, "pipeline")
        self.collector.lengths.load_state_dict(state["lengths"])
        self._waiting = None if state["waiting"] is None else Collected.from_state(state["waiting"])
