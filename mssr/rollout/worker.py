"""One engine behind a plain class: Ray wraps it, tests and the local launcher call it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mssr.config import Config
from mssr.models.encoded import EncodedPrompt
from mssr.rollout.engine import make_engine
from mssr.rollout.queue import Finished, RequestQueue
from mssr.rollout.weights import PackedWeights, unpack_weights
from mssr.types import SamplingParams

PIECE = 8
"""Prompts that are prepared in one go; so long may an engine wait that gets requests meanwhile."""


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

    def prepare(self, prompt_ids: Sequence[str]) -> None:
        """Encode prompts that `generate` is likely to get next. May run beside it, in another thread."""
        for start in range(0, len(prompt_ids), PIECE):
            self._engine.prompts.get(prompt_ids[start : start + PIECE])

    def new_prompts(self, prompt_ids: Iterable[str]) -> dict[str, EncodedPrompt]:
        """See `PromptSource.take_new`: for the ranks, which need not encode them again."""
        return self._engine.prompts.take_new(prompt_ids)

    def load_weights(self, weights: PackedWeights, version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        self._engine.load_weights(unpack_weights(weights), version)

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._engine.close()
