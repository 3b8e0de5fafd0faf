"""What a generation engine can do, and how one is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from mssr.config import Config
from mssr.rollout.queue import Finished, RequestQueue
from mssr.types import SamplingParams

if TYPE_CHECKING:
    import torch

    from mssr.data.prompt_source import PromptSource


class RolloutEngine(Protocol):
    """Generates responses; holds its own copy of the policy."""

    prompts: PromptSource

    def generate(self, requests: RequestQueue, params: SamplingParams) -> Iterator[Finished]:
        """One response a request, until the queue is closed and empty.

        Yields after every step of the engine what ended in it, perhaps nothing.

        What is sampled depends on the request's seed and the weights, not on the other requests.

        Raises:
            EngineError: the engine is broken.
        """

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take over all weights, by their Hugging Face names, and forget everything cached.

        Args:
            weights: pairs (name, tensor), tied heads included.
            version: becomes the ``policy_version`` of later rollouts.
        """

    def close(self) -> None:
        """Give back what the engine holds in this process."""


def make_engine(config: Config, device: str) -> RolloutEngine:
    """The engine that ``rollout.engine`` names, with the base model's weights.

    Args:
        device: "cpu" or "cuda".
    """
    if config.rollout.engine == "vllm":
        from mssr.rollout.vllm_engine import VllmEngine

        return VllmEngine(config, device)
    from mssr.rollout.hf_engine import HfEngine

    return HfEngine(config, device)
