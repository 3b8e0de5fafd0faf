"""What the driver asks of the machines, whoever runs them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from mssr.config import Config
from mssr.types import Rollout, RolloutRequest, SamplingParams, TokenLogProbs, TrainBatch


class Cluster(Protocol):
    """Rollout workers and actor ranks, behind the verbs of a training step."""

    def generate(self, requests: Sequence[RolloutRequest], params: SamplingParams) -> list[Rollout]:
        """One rollout a request, in their order, from all engines together."""
        ...

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """One policy update on all ranks; returns its metrics."""
        ...

    def log_probs(self, batch: TrainBatch, reference: bool = False) -> TokenLogProbs:
        """Score the responses of a batch under the policy as it is, and under the reference."""
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


def join_log_probs(shares: Iterable[dict[int, tuple[np.ndarray, ...]]], reference: bool) -> TokenLogProbs:
    """What the ranks scored (see `PolicyUpdater.log_probs`), in the order of the batch."""
    found: dict[int, tuple[np.ndarray, ...]] = {}
    for share in shares:
        found |= share
    models = [np.concatenate(x) for x in zip(*(found[s] for s in range(len(found))), strict=True)]
    return TokenLogProbs(policy=models[0], reference=models[1] if reference else None)
