"""Ray workers without torch, so that many fit on a small machine: the real Ray actors, with engines and ranks
that sleep. What they return has the size of the real thing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from mssr.cluster import ray_cluster
from mssr.cluster.ray_workers import RayPolicyWorker, RayRolloutWorker, Sent
from mssr.cluster.shared_prompts import PromptFetcher
from mssr.config import Config
from mssr.rollout.queue import Finished, RequestQueue
from mssr.types import RankLogProbs, Rollout, RolloutRequest, SamplingParams, TrainBatch

PROMPT_TOKENS = 500
WORD = "3 + "
"""About as long as a token is in text."""
WEIGHTS_BYTES = 2**20
OPTIONS = "fake"
"""Key of ``rollout.engine_options`` that holds ``generate_s`` and ``update_s``, the seconds of each."""


def use_fake_workers() -> None:
    """Make `RayCluster` start these in place of the real ones."""
    ray_cluster.RayRolloutWorker, ray_cluster.RayPolicyWorker = FakeRolloutWorker, FakePolicyWorker


class FakePrompt:
    """In place of an `EncodedPrompt`, with few pixels: the driver has references to them only."""

    nbytes = 2**20

    def arrays(self) -> Any:
        return np.zeros(PROMPT_TOKENS, np.int64)


class FakePrompts:
    """In place of a `PromptSource`: all prompts are ready and new, as in a first epoch."""

    def get(self, prompt_ids: Iterable[str]) -> None: ...

    def take_new(self, prompt_ids: Iterable[str]) -> dict[str, FakePrompt]:
        return {prompt_id: FakePrompt() for prompt_id in prompt_ids}


class FakeEngine:
    """A `RolloutEngine` whose responses all have the greatest length and end one after the other."""

    prompts: Any = FakePrompts()

    def __init__(self, config: Config) -> None:
        self._seconds = float(config.rollout.engine_options[OPTIONS]["generate_s"])
        self.slots = config.rollout.max_num_seqs or 256
        self._version = 0
        self._length = config.rollout.max_response_length
        rng = np.random.default_rng(0)
        self._prompt = rng.integers(0, 1000, PROMPT_TOKENS).astype(np.int32)
        self._tokens = rng.integers(0, 1000, 2 * self._length).astype(np.int32)
        self._log_probs = -rng.random(2 * self._length).astype(np.float32)

    def generate(self, requests: RequestQueue, params: SamplingParams) -> Iterator[Finished]:
        running: list[tuple[float, int, RolloutRequest]] = []
        while True:
            taken = requests.take(self.slots - len(running), wait=not running)
            if not taken and not running:
                return
            for index, request in taken:
                share = 0.2 + 0.8 * (request.seed % 1000) / 1000
                running.append((time.monotonic() + share * self._seconds, index, request))
            time.sleep(0.2)
            now = time.monotonic()
            yield [(index, self._rollout(request)) for end, index, request in running if end <= now]
            running = [item for item in running if item[0] > now]

    def load_weights(self, source: Any, version: int, check: bool = False) -> Sequence[Any]:
        self._version = version
        return [SimpleNamespace(arrived={}, held=None)]  # a `mssr.rollout.checksums.Loaded`, without torch

    def sleep(self) -> None: ...

    def wake(self, part: str) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None: ...

    def _rollout(self, request: RolloutRequest) -> Rollout:
        part = slice(start := request.seed % self._length, start + self._length)
        return Rollout(
            prompt_id=request.prompt_id,
            sample_index=request.sample_index,
            prompt_token_ids=self._prompt,
            response_token_ids=self._tokens[part],
            log_probs=self._log_probs[part],
            finish_reason="stop",
            policy_version=self._version,
            text=f"{WORD * self._length}\\boxed{{{request.seed % 2}}}",
        )


class FakeRolloutWorker(RayRolloutWorker):
    def start(self, device: str, colocated: bool) -> int:
        self._engine = FakeEngine(self._config)
        return self._engine.slots


class FakePolicyWorker(RayPolicyWorker):
    def start(self, rank: int, init_method: str, device: str, colocated: bool) -> None:
        self._rank, self._ranks = rank, self._config.actor.num_ranks
        self._seconds = float(self._config.rollout.engine_options[OPTIONS]["update_s"])

    def update(self, work: tuple[TrainBatch, PromptFetcher], step: int) -> dict[str, float]:
        time.sleep(self._seconds)
        names = "kl_update kl_ref entropy grad_norm loss clip_fraction skipped_updates".split()
        return {f"policy/{name}": 0.01 * (name != "skipped_updates") for name in names}

    def log_probs(self, work: tuple[TrainBatch, PromptFetcher], reference: bool) -> RankLogProbs:
        batch, _ = work
        lengths = batch.response_lengths
        own = np.arange(self._rank, len(batch), self._ranks)
        values = np.full(lengths[own].sum(), -1.0, np.float32)
        return RankLogProbs(sequences=own, policy=values, reference=values if reference else None)

    def send_weights(self, transport: str, loads: list[Any], check: bool) -> Sent:
        import ray

        return Sent(None if self._rank else ray.put(np.zeros(WEIGHTS_BYTES, np.uint8)))
