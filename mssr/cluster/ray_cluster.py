"""The workers of a run on a Ray cluster: placement, calls, weight transfer, recovery, shutdown."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mssr.cluster.base import Cluster, OnFinished, Report, SaveHandle, join_log_probs, rss_gib
from mssr.cluster.ray_calls import HEALTH, Calls, Failure, Worker, WorkerDiedError, WorkerHungError, stacks
from mssr.cluster.ray_generation import FEEDING, Generation
from mssr.cluster.ray_workers import RayPolicyWorker, RayRolloutWorker
from mssr.cluster.shared_prompts import PromptShelf
from mssr.config import Config
from mssr.errors import EngineError, UserError, WorkersLostError, first_line
from mssr.models.cost import home
from mssr.rollout.heartbeat import CALL, SAVE
from mssr.types import Rollout, RolloutRequest, SamplingParams, TokenLogProbs, TrainBatch

PLACEMENT_TIMEOUT_S = 60
START_TIMEOUT_S = 1800.0
"""Longest silence of a worker that is to start and load its model; long, for a node may have to come back."""
PREPARING = "preparing"
"""Concurrency group of the method that encodes prompts beside whatever else an engine does."""
SAVING = "saving"
"""Concurrency group of the method that waits for a checkpoint."""


class RayCluster(Cluster):
    """Actor ranks and engines, each a Ray actor with a bundle of one placement group.

    Prompts travel as ids and responses as tokens. Weights go from the actor's object store to the
    engines without passing through the driver.

    Raises:
        UserError: the cluster has not the resources that the config asks for.
    """

    def __init__(self, config: Config, report: Report, stop: Callable[[], bool]) -> None:
        self._config, self._report, self._stop = config, report, stop
        self._calls = Calls(config.cluster.hang_timeout_s)
        self._version = 0
        # As much of an engine's prompts as it keeps itself.
        self._shelf = PromptShelf(config.data.image_cache_bytes * config.rollout.workers)
        self._weights: list[Any] | None = None
        """Those of the last transfer, where they are kept."""
        self._group: Any = None
        self._ranks: list[Worker] = []
        self._engines: list[Worker] = []
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            _init_ray(config, processes=config.actor.num_ranks + config.rollout.workers)
        try:
            self._launch()
        except BaseException:
            self.shutdown()
            raise

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        on_finished: OnFinished | None = None,
        stoppable: bool = True,
    ) -> list[Rollout]:
        slots = self._slots
        stop = self._stop if stoppable else None
        generation = Generation(self._calls, requests, params, slots, on_finished, stop, self._shelf.add)
        while not generation.done:
            for failure in generation.run(self._engines):
                self._replace_engine(failure)
        return generation.result()

    def prepare(self, prompt_ids: Sequence[str]) -> None:
        of_engine: list[list[str]] = [[] for _ in self._engines]
        for prompt_id in prompt_ids:
            of_engine[home(prompt_id) % len(self._engines)].append(prompt_id)
        for engine, own in zip(self._engines, of_engine, strict=True):
            engine.handle.prepare.options(concurrency_group=PREPARING).remote(own)

    @property
    def ranks_idle_in_rollout(self) -> bool:
        return self._device == "cuda"

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        metrics: dict[str, float] = self._call_ranks("update", self._work(batch), step)[0]
        self._shelf.drop(batch.prompt_ids)
        return metrics

    def log_probs(self, batch: TrainBatch, reference: bool = False) -> TokenLogProbs:
        return join_log_probs(self._call_ranks("log_probs", self._work(batch), reference), batch)

    def _work(self, batch: TrainBatch) -> Any:
        """A batch, and what gets those of its prompts that are encoded; stored once for all ranks."""
        return ray.put((batch, self._shelf.fetcher(batch.prompt_ids)))

    def sync_weights(self, version: int) -> None:
        weights = self._call_ranks("export_weights")[0]
        self._version = version
        # Where engines generate while the ranks train, one that is replaced needs what the others have.
        self._weights = weights if self._config.rollout.lag else None
        # An engine that fails here is replaced by one that has the weights.
        self._call_engines("load_weights", weights, version)

    def begin_save(self, directory: str) -> SaveHandle:
        self._call_ranks("begin_save", directory)
        refs = [r.handle.finish_save.options(concurrency_group=SAVING).remote() for r in self._ranks]
        return SaveHandle(
            done=lambda: not ray.wait(refs, num_returns=len(refs), timeout=0)[1],
            result=lambda: {k: v for sums in self._of_ranks(refs, SAVE) for k, v in sums.items()},
        )

    def load(self, directory: str) -> None:
        self._call_ranks("load", directory)

    def restart(self) -> None:
        _kill(self._ranks)
        self._ranks = []
        self._start([], range(self._config.actor.num_ranks))

    def write_timeline(self, path: str) -> None:
        ray.timeline(path)

    def memory(self) -> dict[str, float]:
        actors = self._call_ranks("rss_gib")
        rollouts = [x for x in self._call_engines("rss_gib") if x]
        driver = rss_gib()
        return {
            "memory/driver_rss_gib": driver,
            "memory/actor_rss_gib": max(actors),
            "memory/rollout_rss_gib": max(rollouts, default=0.0),
            "memory/total_rss_gib": driver + sum(actors) + sum(rollouts),
        }

    def shutdown(self) -> None:
        _kill(self._ranks + self._engines)
        if self._group is not None:
            remove_placement_group(self._group)
        if self._started_ray:
            ray.shutdown()

    def _launch(self) -> None:
        ranks, engines = self._config.actor.num_ranks, self._config.rollout.workers
        self._device = self._config.cluster.device
        if self._device == "auto":
            self._device = "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
        self._bundle = {"CPU": 1.0} | ({"GPU": 1.0} if self._device == "cuda" else {})
        self._group = placement_group([self._bundle] * (ranks + engines), strategy="PACK")
        if not self._group.wait(PLACEMENT_TIMEOUT_S):
            raise UserError(
                f"the Ray cluster has no room for actor.num_ranks={ranks} and rollout.workers={engines}: "
                f"needs {ranks + engines} x {self._bundle}, has {ray.cluster_resources()}"
            )
        self._start(range(engines), range(ranks))

    def _start(self, engines: Sequence[int], ranks: Sequence[int]) -> None:
        """Make workers, and wait until they have loaded the base model."""
        starting = []
        for k in engines:
            index = self._config.actor.num_ranks + k
            engine = self._remote(RayRolloutWorker, f"engine {k}", index, f"rollout-{k}")
            self._engines[k : k + 1] = [engine]
            starting.append((engine, engine.handle.start.remote(self._device)))
        if ranks:
            self._ranks = [self._remote(RayPolicyWorker, f"actor rank {k}", k, f"actor-{k}") for k in ranks]
            first = self._ranks[0]
            [address] = self._started([(first, first.handle.rendezvous.remote())])
            for k, rank in enumerate(self._ranks):
                starting.append((rank, rank.handle.start.remote(k, address, self._device)))
        outcomes = self._started(starting)
        if engines:
            self._slots = outcomes[0]

    def _started(self, refs: list[tuple[Worker, Any]]) -> list[Any]:
        outcomes = self._calls.gather(refs, together=True, stop=self._stop, hang_timeout_s=START_TIMEOUT_S)
        failures = [x for x in outcomes if isinstance(x, Failure)]
        for failure in failures:
            if not _is_lost(failure):
                raise failure.error
        if failures:
            self._report("start_failed", str(failures[0]))
            raise WorkersLostError(f"{failures[0]}; see {self._config.run_dir / 'logs'}")
        return outcomes

    def _remote(self, cls: type, name: str, index: int, log: str) -> Worker:
        log_file = os.path.abspath(self._config.run_dir / "logs" / f"{log}.log")
        groups = dict.fromkeys((HEALTH, SAVING, FEEDING, PREPARING), 1)
        actor = ray.remote(concurrency_groups=groups)(cls).options(
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, index),
            num_cpus=self._bundle["CPU"],
            num_gpus=self._bundle.get("GPU", 0.0),
        )
        return Worker(name, actor.remote(self._config, log_file))

    def _call_engines(self, method: str, *args: Any, only: Sequence[int] | None = None) -> list[Any]:
        """The results of a call of all engines, or of some. One that fails is replaced, and has None."""
        engines = self._engines if only is None else [self._engines[k] for k in only]
        results = self._calls.gather([(e, getattr(e.handle, method).remote(*args)) for e in engines])
        for position, result in enumerate(results):
            if isinstance(result, Failure):
                self._replace_engine(result)
                results[position] = None
        return results

    def _replace_engine(self, failure: Failure) -> None:
        """A new engine, with the weights that the others have, if that helps; else raises the error."""
        if not (_is_lost(failure) or isinstance(failure.error, EngineError)):
            raise failure.error
        hung = isinstance(failure.error, WorkerHungError)
        where = self._write_stacks([failure.worker]) if hung else ""
        _kill([failure.worker])
        self._report("engine_hung" if hung else "engine_died", f"{failure}{where}; it is replaced")
        k = self._engines.index(failure.worker)
        self._start([k], [])
        if self._version:
            weights = self._weights or self._call_ranks("export_weights")[0]
            self._call_engines("load_weights", weights, self._version, only=[k])

    def _call_ranks(self, method: str, *args: Any) -> list[Any]:
        return self._of_ranks([getattr(r.handle, method).remote(*args) for r in self._ranks])

    def _of_ranks(self, refs: list[Any], task: str = CALL) -> list[Any]:
        """The results of a call of all ranks, which work at a task of `mssr.rollout.heartbeat`.

        Raises:
            WorkersLostError: a rank died or hung, or they lost touch with one another.
        """
        results = self._calls.gather(list(zip(self._ranks, refs, strict=True)), together=True, task=task)
        failures = [x for x in results if isinstance(x, Failure)]
        if not failures:
            return results
        lost = [f for f in failures if _is_lost(f)]
        if not lost:
            raise failures[0].error
        # Those that died or hang are the cause of what the others say.
        died = [f for f in lost if isinstance(f.error, WorkerDiedError)]
        hung = [f for f in lost if isinstance(f.error, WorkerHungError)]
        detail = "; ".join(map(str, died or hung or lost)) + ("" if died else self._write_stacks(self._ranks))
        _kill(self._ranks)
        self._report("actor_rank_died" if died else "collective_failed", f"{detail}; all ranks are restarted")
        raise WorkersLostError(f"{detail}; see {self._config.run_dir / 'logs'}")

    def _write_stacks(self, workers: Sequence[Worker]) -> str:
        directory = self._config.run_dir / "stacks"
        directory.mkdir(exist_ok=True)
        path = directory / f"{datetime.now():%Y%m%d-%H%M%S}.txt"
        path.write_text(stacks(workers))
        return f" (stacks in {path})"


def _kill(workers: Sequence[Worker]) -> None:
    """At once; a process that is stopped and does not hear of it, Ray ends after five seconds."""
    for worker in workers:
        ray.kill(worker.handle)


def _is_lost(failure: Failure) -> bool:
    """Whether the worker, or its connection to the others, is to blame and not what it computed."""
    error = failure.error
    if isinstance(error, (WorkerDiedError, WorkerHungError)):
        return True
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"DistError", "RayError"}) or (
        isinstance(error, RuntimeError) and bool(re.search(r"gloo|nccl", str(error), re.IGNORECASE))
    )


def _init_ray(config: Config, processes: int) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.cluster.address is None:
        # Bundles are one CPU each; on a small machine the phases of a step take turns on the cores.
        # Nothing of a run on one machine is to be reached from others.
        options |= {
            "address": "local",
            "num_cpus": max(processes, os.cpu_count() or 1),
            "include_dashboard": False,
            "_node_ip_address": "127.0.0.1",
        }
    else:
        options["address"] = config.cluster.address
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise UserError(f"cluster.address={config.cluster.address}: {first_line(error)}") from error
