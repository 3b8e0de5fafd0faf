"""What is asked of all machines before anything is loaded: versions, drivers, whether they see the files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mssr.cluster import machine
from mssr.cluster.machine import Machine
from mssr.cluster.placement import Node
from mssr.config import Config
from mssr.errors import UserError, first_line

TIMEOUT_S = 120
"""Longest that a node may take to look around; nvidia-smi takes most of it."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a node answered."""

    address: str
    machine: Machine | None
    missing: Sequence[str] = ()
    """Paths of the config that are here and not there."""
    sees_run_dir: bool = True
    failure: str = ""
    """Why it gave no answer."""


def survey(config: Config | None, nodes: Sequence[Node]) -> dict[str, Found]:
    """Look around on every node, and for what a config names; by the node's id."""
    here = ray.get_runtime_context().get_node_id()
    if [node.id for node in nodes] == [here]:
        return {here: Found(nodes[0].address, machine.describe())}
    paths = [os.getcwd(), *machine.shared_paths(config)] if config else []
    if config:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    look = ray.remote(num_cpus=0)(_look)
    with machine.marker(config.run_dir) if config else contextlib.nullcontext() as marked:
        refs = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
                node.address, paths, marked
            ): node
            for node in nodes
        }
        ready, silent = ray.wait(list(refs), num_returns=len(refs), timeout=TIMEOUT_S)
        found = {refs[ref].id: _answer(refs[ref].address, ref) for ref in ready}
    return found | {refs[ref].id: Found(refs[ref].address, None, failure="no answer") for ref in silent}


def gpu_bytes(found: Iterable[Found]) -> int:
    """Memory of the smallest GPU."""
    sizes = (gpu.total_bytes for one in found if one.machine for gpu in one.machine.gpus)
    return min((size for size in sizes if size), default=0)


def check(config: Config, device: str, used: Sequence[Found]) -> None:
    """Refuse nodes on which a run could not work.

    Raises:
        UserError: one line: the node, what is wrong with it, and what to do.
    """
    machines = [machine.describe()]
    for one in used:
        if one.machine is None:
            raise UserError(f"node {one.address} cannot run mssr: {one.failure}; install the same as here")
        if one.missing:
            raise UserError(
                f"node {one.address} does not see {', '.join(one.missing)}: models, data and the working "
                "directory have to be there under the same names"
            )
        if not one.sees_run_dir:
            raise UserError(
                f"trainer.run_dir={config.run_dir}: node {one.address} does not see what is written to it "
                "here; name a directory that all nodes share"
            )
        if device == "cuda":
            if problem := one.machine.gpu_problem:
                problem = f"its GPUs cannot be used ({problem}): nvidia-smi has to work there"
            if problem := problem or machine.driver_problem(one.machine):
                raise UserError(f"node {one.address}: {problem}")
        machines.append(one.machine)
    if lines := machine.differences(machines):
        raise UserError(f"the machines of this run have different versions: {'. '.join(lines)}; install one")


def _look(address: str, paths: list[str], marked: str | None) -> Found:
    missing = [path for path in paths if not os.path.exists(path)]
    return Found(address, machine.describe(), missing, marked is None or os.path.exists(marked))


def _answer(address: str, ref: Any) -> Found:
    try:
        found: Found = ray.get(ref)
    except ray.exceptions.RayTaskError as error:  # mssr cannot be imported there, most likely
        return Found(address, None, failure=first_line(error.cause))
    except ray.exceptions.RayError as error:
        return Found(address, None, failure=type(error).__name__)
    return found
