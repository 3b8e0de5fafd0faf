"""Starts the workers of a run."""

from __future__ import annotations

from collections.abc import Callable

from mssr.cluster.base import Cluster, Report
from mssr.config import Config


def launch(config: Config, report: Report, stop: Callable[[], bool]) -> Cluster:
    """Start the workers with the launcher that ``cluster.launcher`` names.

    Args:
        stop: asked while engines work whether the run is to end.
    """
    if config.cluster.launcher == "ray":
        from mssr.cluster.ray_cluster import RayCluster

        return RayCluster(config, report, stop)
    from mssr.cluster.local import LocalCluster

    return LocalCluster(config, stop)
