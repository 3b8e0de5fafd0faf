"""One engine behind a plain class: Ray wraps it, tests and the local launcher call it."""

from __future__ import annotations

from collections.abc import Sequence

from mssr.config import Config
from mssr.rollout.engine import make_engine
from mssr.rollout.weights import PackedWeights, unpack_weights
from mssr.types import Rollout, RolloutRequest, SamplingParams


class RolloutWorker:
    """Builds the engine that the config names and feeds it.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, config: Config, device: str) -> None:
        self._engine = make_engine(config, device)

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Rollout]:
        """See `RolloutEngine.generate`."""
        return self._engine.generate(requests, params) if requests else []

    def load_weights(self, weights: PackedWeights, version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        self._engine.load_weights(unpack_weights(weights), version)

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._engine.close()
