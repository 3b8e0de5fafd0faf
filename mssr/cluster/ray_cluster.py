"""The workers of a run on a Ray cluster: placement, calls, weight transfer, shutdown."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mssr.cluster.base import join_log_probs
from mssr.cluster.memory import rss_gib
from mssr.cluster.ray_workers import RayPolicyWorker, RayRolloutWorker
from mssr.config import Config
from mssr.errors import TrainingError, UserError
from mssr.types import Rollout, RolloutRequest, SamplingParams, TokenLogProbs, TrainBatch

PLACEMENT_TIMEOUT_S = 60


class RayCluster:
    """Actor ranks and engines, each a Ray actor with a bundle of one placement group.

    Prompts travel as ids and responses as tokens. Weights go from the actor's object store to the
    engines without passing through the driver. See `mssr.cluster.base.Cluster`.

    Raises:
        UserError: the cluster has not the resources that the config asks for.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ranks, self._engines = config.actor.num_ranks, config.rollout.workers
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            _init_ray(config, processes=self._ranks + self._engines)
        try:
            self._launch(config)
        except BaseException:
            self.shutdown()
            raise

    def _launch(self, config: Config) -> None:
        device = config.cluster.device
        if device == "auto":
            device = "cuda" if ray.cluster_resources().get("GPU", 0) else "cpu"
        count = self._ranks + self._engines
        bundle = {"CPU": 1.0} | ({"GPU": 1.0} if device == "cuda" else {})
        self._group = placement_group([bundle] * count, strategy="PACK")
        if not self._group.wait(PLACEMENT_TIMEOUT_S):
            raise UserError(
                f"the Ray cluster has no room for actor.num_ranks={self._ranks} and "
                f"rollout.workers={self._engines}: needs {count} x {bundle}, has {ray.cluster_resources()}"
            )
        logs = os.path.abspath(config.run_dir / "logs")
        cluster = config.cluster
        self._actors = [
            self._remote(RayPolicyWorker, k, bundle, f"{logs}/actor-{k}.log", cluster.threads_per_actor)
            for k in range(self._ranks)
        ]
        self._rollouts = [
            self._remote(
                RayRolloutWorker,
                self._ranks + k,
                bundle,
                f"{logs}/rollout-{k}.log",
                cluster.threads_per_rollout,
            )
            for k in range(self._engines)
        ]
        engines_up = [r.start.remote(config, device, cluster.threads_per_rollout) for r in self._rollouts]
        address = self._get(self._actors[0].rendezvous.remote())
        ranks_up = [a.start.remote(config, k, address, device) for k, a in enumerate(self._actors)]
        self._get(engines_up + ranks_up)

    def _remote(self, cls: type, index: int, bundle: dict[str, float], log_file: str, threads: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0.0)}
        actor = ray.remote(cls).options(scheduling_strategy=strategy, **options)  # type: ignore[call-overload]
        return actor.remote(log_file, threads)

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Rollout]:
        # Dealt out like cards, so that neighbours in the order, alike in length, are spread.
        shares = [requests[k :: self._engines] for k in range(self._engines)]
        results = self._get(
            [
                worker.generate.remote(share, params)
                for worker, share in zip(self._rollouts, shares, strict=True)
            ]
        )
        rollouts: list[Rollout | None] = [None] * len(requests)
        for k, result in enumerate(results):
            rollouts[k :: self._engines] = result
        return [r for r in rollouts if r is not None]

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        shared = ray.put(batch)
        return self._get([a.update.remote(shared, step) for a in self._actors])[0]

    def log_probs(self, batch: TrainBatch, reference: bool = False) -> TokenLogProbs:
        shared = ray.put(batch)
        shares = self._get([a.log_probs.remote(shared, reference) for a in self._actors])
        return join_log_probs(shares, reference)

    def sync_weights(self, version: int) -> None:
        exports = [a.export_weights.remote() for a in self._actors]
        self._get([r.load_weights.remote(exports[0], version) for r in self._rollouts] + exports[1:])

    def save(self, directory: str) -> None:
        self._get([a.save.remote(directory) for a in self._actors])

    def load(self, directory: str) -> None:
        self._get([a.load.remote(directory) for a in self._actors])

    def memory(self) -> dict[str, float]:
        actors = self._get([a.rss_gib.remote() for a in self._actors])
        rollouts = self._get([r.rss_gib.remote() for r in self._rollouts])
        driver = rss_gib(os.getpid())
        return {
            "memory/driver_rss_gib": driver,
            "memory/actor_rss_gib": max(actors),
            "memory/rollout_rss_gib": max(rollouts),
            "memory/total_rss_gib": driver + sum(actors) + sum(rollouts),
        }

    def shutdown(self) -> None:
        for worker in getattr(self, "_actors", []) + getattr(self, "_rollouts", []):
            ray.kill(worker)
        if hasattr(self, "_group"):
            remove_placement_group(self._group)
        if self._started_ray:
            ray.shutdown()

    def _get(self, refs: Any) -> Any:
        try:
            return ray.get(refs)
        except ray.exceptions.RayTaskError as error:
            # The worker's own exception, without Ray's copy of its traceback in the message; the
            # traceback stays in the chain for the log.
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            logs = self._config.run_dir / "logs"
            raise TrainingError(f"a worker died ({_first_line(error)}); see {logs}") from error


def _init_ray(config: Config, processes: int) -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.cluster.address is None:
        # Bundles are one CPU each; on a small machine the phases of a step take turns on the cores.
        options |= {
            "address": "local",
            "num_cpus": max(processes, os.cpu_count() or 1),
            "include_dashboard": False,
        }
    else:
        options["address"] = config.cluster.address
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise UserError(f"cluster.address={config.cluster.address}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
