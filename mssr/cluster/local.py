"""Everything in this process: for pdb, notebooks and machines without Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

from mssr.actor.worker import PolicyWorker, host_threads
from mssr.cluster.base import Cluster, OnFinished, SaveHandle, join_log_probs, rss_gib
from mssr.config import Config
from mssr.errors import StopRequestedError
from mssr.models.bounded_cache import BoundedCache
from mssr.models.encoded import EncodedPrompt
from mssr.models.loading import resolve_device
from mssr.rollout.checksums import WeightCheck, checksums
from mssr.rollout.engine import make_engine
from mssr.rollout.queue import RequestQueue
from mssr.rollout.weights import InMemory
from mssr.types import Rollout, RolloutRequest, SamplingParams, TokenLogProbs, TrainBatch


class LocalCluster(Cluster):
    """One engine and at most one actor rank, called directly."""

    ranks_idle_in_rollout = False

    def __init__(self, config: Config, stop: Callable[[], bool]) -> None:
        import torch

        self.config, self._stop = config, stop
        device = self._device = resolve_device(config.cluster.device)
        self._scratch = tempfile.TemporaryDirectory(prefix="mssr-")
        # vLLM replaces torch.set_num_threads; the count of the whole process is set before.
        torch.set_num_threads(max(host_threads(config, device, 1), config.cluster.threads_per_rollout))
        rendezvous = f"file://{self._scratch.name}/rendezvous"
        self._has_actor = config.actor.num_ranks > 0
        if self._has_actor:
            self._actor = PolicyWorker(config, 0, rendezvous, device, set_threads=False)
        # Both have the device at all times: the engine leaves the rank its part.
        self._engine = make_engine(config, device, colocated=self._has_actor)
        self._check = WeightCheck(config.rollout.check_weights)
        self._prompts: BoundedCache[str, EncodedPrompt] = BoundedCache(config.data.image_cache_bytes)
        """Those that the engine has encoded and the rank may need."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        on_finished: OnFinished | None = None,
        stoppable: bool = True,
    ) -> list[Rollout]:
        found: dict[int, Rollout] = {}
        for part in self._engine.generate(RequestQueue(enumerate(requests)), params):
            if stoppable and self._stop():
                raise StopRequestedError
            for prompt_id, prompt in self._engine.prompts.take_new(r.prompt_id for _, r in part).items():
                self._prompts.put(prompt_id, prompt, prompt.nbytes)
            for index, rollout in part:
                found[index] = rollout
                if on_finished is not None:
                    on_finished(index, rollout)
        return [found[i] for i in range(len(requests))]

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        metrics = self._actor.update(batch, step, self._prepared)
        for prompt_id in batch.prompt_ids:
            self._prompts.pop(prompt_id)
        return metrics

    def log_probs(self, batch: TrainBatch, reference: bool = False) -> TokenLogProbs:
        return join_log_probs([self._actor.log_probs(batch, reference, self._prepared)], batch)

    def _prepared(self, prompt_ids: Sequence[str]) -> dict[str, EncodedPrompt]:
        """See `mssr.actor.prompts.Prepared`."""
        return {i: prompt for i in prompt_ids if (prompt := self._prompts.get(i)) is not None}

    def sync_weights(self, version: int) -> None:
        weights = self._actor.export_weights()
        assert weights is not None
        check = self._check.due(self)
        loaded = self._engine.load_weights(InMemory(weights), version, check)
        if check:
            self._check(self, "the engine", checksums(weights), loaded)

    def begin_save(self, directory: str) -> SaveHandle:
        saving = self._actor.checkpoint
        saving.begin(directory)
        return SaveHandle(saving.done, saving.result)

    def load(self, directory: str) -> None:
        self._actor.checkpoint.load(directory)

    def restart(self) -> None:
        raise AssertionError("nothing of this process is lost without the process")

    def metrics(self) -> dict[str, float]:
        memory = dict.fromkeys(("memory/driver_rss_gib", "memory/total_rss_gib"), rss_gib())
        return memory | ({"perf/gpus": 1.0} if self._device == "cuda" else {}) | self._engine.metrics()

    def shutdown(self) -> None:
        self._engine.close()
        if self._has_actor:
            self._actor.close()
        self._scratch.cleanup()
