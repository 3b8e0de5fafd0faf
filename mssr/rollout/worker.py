"""One engine behind a plain class: Ray wraps it, tests and the local launcher call it."""

from __future__ import annotations

from collections.abc import Iterator

from mssr.config import Config
from mssr.rollout.engine import make_engine
from mssr.rollout.queue import Finished, RequestQueue
from mssr.rollout.weights import PackedWeights, unpack_weights
from mssr.types import SamplingParams


class RolloutWorker:
    """Builds the engine that the config names and feeds it.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, config: Config, device: str) -> None:
        self._engine = make_engine(config, device)

    def generate(self, requests: RequestQueue, params: SamplingParams) -> Iterator[Finished]:
        """See `RolloutEngine.generate`."""
        return self._engine.generate(requests, params)

    def load_weights(self, weights: PackedWeights, version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        self._engine.load_weights(unpack_weights(weights), version)

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._engine.close()
