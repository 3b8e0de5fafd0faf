"""Starts the workers of a run."""

from __future__ import annotations

from collections.abc import Callable

from mssr.cluster.base import Cluster, Events
from mssr.config import Config


def launch(
    config: Config, events: Events, stop: Callable[[], bool], note: Callable[[str], None] = lambda line: None
) -> Cluster:
    """Start the workers with the launcher that ``cluster.launcher`` names.

    Args:
        stop: asked while engines work whether the run is to end.
        note: shows a line about how they are placed.
    """
    if config.cluster.launcher == "ray":
        from mssr.cluster.ray_cluster import RayCluster

        return RayCluster(config, events, stop, note)
    from mssr.cluster.local import LocalCluster

    return LocalCluster(config, stop)
