"""How Ray is started or joined, and what environment its workers get."""

from __future__ import annotations

import logging
import os
from typing import Any

import ray

from mssr.config import Config
from mssr.errors import UserError

FORWARDED = ("NCCL_", "GLOO_", "VLLM_", "HF_")
"""How the names of variables begin that all workers get from the driver."""
OF_ONE_MACHINE = ("VLLM_HOST_IP", "VLLM_PORT")
"""Some of these that would be wrong elsewhere."""


def worker_environment(config: Config) -> dict[str, str]:
    """What is in the environment of all workers, wherever they run: of ``cluster.env``, and of this process.

    Raises:
        UserError: a variable that the config takes from here is not set here.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(FORWARDED) and name not in OF_ONE_MACHINE
    }
    for name, value in config.cluster.env.items():
        if value is None and name not in os.environ:
            raise UserError(f"cluster.env.{name}=null takes the value from here, where {name} is not set")
        env[name] = os.environ[name] if value is None else str(value)
    return env


def init_ray(config: Config, processes: int) -> None:
    """Join the cluster of ``cluster.address``, or start one here with a CPU for every process."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if config.cluster.address is None:
        # Units take one CPU a process; on a small machine the phases of a step take turns on the cores.
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
    # A RuntimeError if it is of another version. An address that is given Ray offers its token only if told.
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        if config.cluster.address is None:
            raise
        hint = "" if "RAY_AUTH_MODE" in os.environ else "; if its head wants a token, set RAY_AUTH_MODE=token"
        told = " ".join(str(error).split())
        raise UserError(f"cluster.address={config.cluster.address}: {told}{hint}") from error
