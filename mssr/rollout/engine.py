"""What a generation engine can do, and how one is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from mssr.config import Config
from mssr.models.loading import importing
from mssr.rollout.queue import Finished, RequestQueue
from mssr.types import SamplingParams

if TYPE_CHECKING:
    from mssr.data.prompt_source import PromptSource
    from mssr.rollout.checksums import Loaded
    from mssr.rollout.weights import WeightSource


class RolloutEngine(Protocol):
    """Generates responses; holds its own copy of the policy."""

    prompts: PromptSource
    slots: int
    """Sequences that it runs at a time."""

    def generate(self, requests: RequestQueue, params: SamplingParams) -> Iterator[Finished]:
        """One response a request, until the queue is closed and empty.

        Yields after every step of the engine what ended in it, perhaps nothing.

        What is sampled depends on the request's seed and the weights, not on the other requests.

        Raises:
            EngineError: the engine is broken.
        """

    def load_weights(self, source: WeightSource, version: int, check: bool = False) -> Sequence[Loaded]:
        """Take over all weights, by their Hugging Face names, tied heads included, and forget everything
        cached.

        Args:
            version: becomes the ``policy_version`` of later rollouts.
            check: take checksums.

        Returns:
            What each process of the engine got, and has.

        Raises:
            TransferInterruptedError: not all came; the engine is sound, and its weights are of no use.
            EngineError: the engine is broken.
        """

    def sleep(self) -> None:
        """Give back the device's memory, that of the weights too, for others to use; nothing on CPU."""

    def wake(self, part: str) -> None:
        """Take memory again after `sleep`: "weights" before `load_weights`, "kv_cache" after it."""

    def metrics(self) -> dict[str, float]:
        """What the engine counted since the last call, not while it generates; empty where it counts nothing.

        ``perf/preemptions``: how often a sequence lost its keys and values and began anew;
        ``perf/kv_cache_usage``: the largest share in use after a step; ``memory/rollout_gpu_gib``: the
        most that torch held on a device of the engine, GiB, asleep or not.
        """

    def close(self) -> None:
        """Give back what the engine holds in this process."""


def make_engine(config: Config, device: str, colocated: bool = False) -> RolloutEngine:
    """The engine that ``rollout.engine`` names, with the base model's weights.

    Args:
        device: "cpu" or "cuda".
        colocated: an actor rank is on the same device, so the engine must be able to sleep.
    """
    if config.rollout.engine == "vllm":
        with importing():
            from mssr.rollout.vllm_engine import VllmEngine

        return VllmEngine(config, device, colocated)
    with importing():
        from mssr.rollout.hf_engine import HfEngine

    return HfEngine(config, device)
