"""What the driver asks of the machines, whoever runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mssr.config import Config
from mssr.types import Rollout, RolloutRequest, SamplingParams, TrainBatch


class Cluster(Protocol):
    """Rollout workers and actor ranks, behind the verbs of a training step."""

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Rollout]:
        """One rollout a request, in their order, from all engines together."""
        ...

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """One policy update on all ranks; returns its metrics."""
        ...

    def sync_weights(self, version: int) -> None:
        """Give the actor's weights to every engine; later rollouts carry ``version``."""
        ...

    def save(self, directory: str) -> None:
        """Write parameters and optimizer into a directory."""
        ...

    def load(self, directory: str) -> None:
        """Read what `save` wrote."""
        ...

    def memory(self) -> dict[str, float]:
        """Resident memory by role, the largest process of each, and the total, GiB."""
        ...

    def shutdown(self) -> None:
        """End all workers."""
        ...


def launch(config: Config) -> Cluster:
    """Start the workers with the launcher that ``cluster.launcher`` names."""
    if config.cluster.launcher == "ray":
        from mssr.cluster.ray_cluster import RayCluster

        return RayCluster(config)
    from mssr.cluster.local import LocalCluster

    return LocalCluster(config)
