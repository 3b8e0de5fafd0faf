"""Where workers sit: engines and ranks apart or on the same devices, on which machines and GPUs.

What belongs together is a unit: an engine, a rank, or an engine with a rank on each of its GPUs. Each has a
placement group of one bundle: it lies on one machine, a machine that is lost costs its units only, and Ray
looks for another place for these by itself. The group reserves the GPUs. Workers ask Ray for none and are
told which are theirs, because Ray has no way to give several whole GPUs to two processes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mssr.config import Config
from mssr.errors import StopRequestedError, UserError
from mssr.models.memory import colocated_fits

POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What ``cluster.placement`` means for a run, and why."""

    colocated: bool
    reason: str

    def __str__(self) -> str:
        return f"placement {'colocated' if self.colocated else 'apart'}: {self.reason}"


def decide(config: Config, device: str, gpu_bytes: int) -> Decision:
    """Whether engines and ranks share devices.

    Args:
        device: "cpu" or "cuda".
        gpu_bytes: memory of the smallest GPU; 0: not known.
    """
    wanted, ranks = config.cluster.placement, config.actor.num_ranks
    if ranks == 0:
        return Decision(False, "there are no ranks")
    if wanted != "auto":
        return Decision(wanted == "colocated", "as cluster.placement says")
    if device == "cpu":
        return Decision(False, "on CPU processes need not take turns")
    if obstacle := _obstacle(config):
        return Decision(False, obstacle)
    if not gpu_bytes:
        return Decision(False, "how much memory the GPUs have is not known")
    return Decision(*colocated_fits(config, gpu_bytes))


def _obstacle(config: Config) -> str:
    """What keeps engines and ranks from sharing devices, whatever the memory; "" for nothing."""
    for key, value in (("rollout.lag", config.rollout.lag), ("actor.score_early", config.actor.score_early)):
        if value in (1, "always"):
            return f"{key}={value} has engines and ranks work at the same time"
    devices, ranks = config.rollout.workers * config.rollout.tensor_parallel, config.actor.num_ranks
    return "" if devices == ranks else f"engines take {devices} GPUs, and actor.num_ranks={ranks}"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the Ray cluster."""

    id: str
    address: str
    total: dict[str, float]
    """Resources by name (GPU, CPU), as the machine has them."""
    free: dict[str, float]
    """And those that nobody has reserved."""


def find_nodes(device: str) -> list[Node]:
    """The nodes that have what workers on this device need, by address."""
    kind = "GPU" if device == "cuda" else "CPU"
    free = ray._private.state.available_resources_per_node()
    found = [
        Node(n["NodeID"], n["NodeManagerAddress"], n["Resources"], free.get(n["NodeID"], {}))
        for n in ray.nodes()
        if n["Alive"] and n["Resources"].get(kind)
    ]
    return sorted(found, key=lambda node: (_by_number(node.address), node.id))


@dataclass(eq=False, slots=True)
class Unit:
    """What is placed together."""

    needs: dict[str, float]
    """GPU, if any, and CPU."""
    group: Any = None
    node: str = ""
    address: str = ""
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; the order is that of an engine's processes."""

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        return PlacementGroupSchedulingStrategy(self.group, 0)

    @property
    def has_place(self) -> bool:
        """As far as Ray knows; it takes it some seconds to miss a machine."""
        return bool(placement_group_table(self.group)["state"] == "CREATED")


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker's part of a unit."""

    unit: Unit
    process: int | None
    """Of the unit's engine, whose GPU it shares; None: all GPUs of the unit are its own or its engine's."""
    cpus: int

    @property
    def gpus(self) -> tuple[str, ...]:
        return self.unit.gpus if self.process is None else self.unit.gpus[self.process : self.process + 1]


class Places:
    """The seats of all workers of a run.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, config: Config, device: str, colocated: bool) -> None:
        each, ranks = config.rollout.tensor_parallel, range(config.actor.num_ranks)
        self._config, self._gpus = config, device == "cuda"
        self._engines = [self._unit(each, each + each * colocated) for _ in range(config.rollout.workers)]
        self._ranks = [] if colocated else [self._unit(1, 1) for _ in ranks]
        self.engines = [Seat(unit, None, each) for unit in self._engines]
        self.ranks = [Seat(unit, None, 1) for unit in self._ranks] or [
            Seat(self._engines[rank // each], rank % each, 1) for rank in ranks
        ]

    def _unit(self, gpus: int, cpus: int) -> Unit:
        return Unit({"GPU": float(gpus), "CPU": float(cpus)} if self._gpus else {"CPU": float(cpus)})

    @property
    def units(self) -> list[Unit]:
        """Ranks first, which are to be near to one another; but larger ones before smaller ones."""
        return sorted(self._ranks + self._engines, key=lambda unit: -unit.needs.get("GPU", 0.0))

    def reserve(self, nodes: Sequence[Node], decision: Decision) -> None:
        """Ask Ray for all places, on as few nodes as possible. Raises as `check_total`."""
        wanted = fit(self.units, [(node.id, node.free) for node in nodes])
        if len(wanted) < len(self.units):  # others are to end first
            wanted = self.check_total(nodes, decision)
        for unit in self.units:
            # Without a wish Ray would spread the groups.
            unit.group = placement_group(
                [unit.needs], strategy="STRICT_PACK", _soft_target_node_id=wanted.get(unit)
            )

    def wait(self, seats: Iterable[Seat], timeout_s: float, stop: Callable[[], bool]) -> list[Seat]:
        """Wait until seats are on a machine and know their GPUs; returns those that are not by then.

        Raises:
            StopRequestedError: ``stop`` said so.
        """
        seats = list(seats)
        waiting = {self._ask(unit): unit for unit in {seat.unit: None for seat in seats}}
        deadline = time.monotonic() + timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            if stop():
                raise StopRequestedError
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=min(POLL_S, left))
            for ref in ready:
                unit = waiting.pop(ref)
                unit.node, unit.address, gpus = ray.get(ref)
                unit.gpus = tuple(sorted(gpus, key=_by_number))
        for ref in waiting:
            ray.cancel(ref)
        return [seat for seat in seats if seat.unit in waiting.values()]

    def _ask(self, unit: Unit) -> Any:
        """A reference to a unit's node, its address and the GPUs that the unit has there."""

        # Not of a module: it runs where mssr may be missing, which `preflight.check` tells.
        def look_around() -> tuple[str, str, list[str]]:
            context = ray.get_runtime_context()
            gpus = context.get_accelerator_ids()["GPU"]
            return context.get_node_id(), ray.util.get_node_ip_address(), gpus

        # Tried again for as long as it takes: a machine may be lost before Ray knows.
        look = ray.remote(num_cpus=0, num_gpus=unit.needs.get("GPU", 0.0), max_retries=-1)(look_around)
        return look.options(scheduling_strategy=unit.strategy).remote()

    def sort(self) -> None:
        """Have neighbouring ranks, and neighbouring engines, on one machine."""
        for units in (self._engines, self._ranks):
            found = sorted(
                ((unit.group, unit.node, unit.address, unit.gpus) for unit in units),
                key=lambda place: (_by_number(place[2]), place[1], [*map(_by_number, place[3])]),
            )
            for unit, place in zip(units, found, strict=True):
                unit.group, unit.node, unit.address, unit.gpus = place

    def check_total(self, nodes: Sequence[Node], decision: Decision) -> dict[Unit, str]:
        """A node for every unit, if the cluster were idle.

        Raises:
            UserError: it has too few even then.
        """
        found = fit(self.units, [(node.id, node.total) for node in nodes])
        if len(found) < len(self.units):
            raise self.no_room(nodes, decision)
        return found

    def no_room(self, nodes: Sequence[Node], decision: Decision) -> UserError:
        """How much is needed, and what there is on every node."""
        config, units = self._config, self.units
        total = fit(units, [(node.id, node.total) for node in nodes])
        free = fit(units, [(node.id, node.free) for node in nodes])
        kinds = ["GPU", "CPU"] if self._gpus else ["CPU"]

        def has(node: Node) -> str:
            return ", ".join(f"{node.free.get(k, 0):.0f} of {node.total.get(k, 0):.0f} {k}" for k in kinds)

        needed = ", ".join(f"{sum(unit.needs[kind] for unit in units):.0f} {kind}" for kind in kinds)
        there = "; ".join(f"{has(node)} on {node.address}" for node in nodes)
        each = config.rollout.tensor_parallel
        parts = f"{len(units)} parts that each need one machine"
        if len(total) == len(units):
            advice = f"room for {len(free)} of {parts}; others hold the rest: wait for them, or ask for less"
        else:
            advice = f"room for {len(total)} of {parts}, if all were free; ask for less, or add machines"
            if config.actor.num_ranks and not decision.colocated:
                advice += ", or let engines and ranks share theirs (cluster.placement=colocated)"
        return UserError(
            f"the Ray cluster has no room for actor.num_ranks={config.actor.num_ranks} and "
            f"rollout.workers={config.rollout.workers}{f' of {each} devices each' if each > 1 else ''} "
            f"({decision}): they need {needed}, and free are {there or 'none'}; {advice}"
        )

    def release(self) -> None:
        for unit in self.units:
            if unit.group is not None:
                remove_placement_group(unit.group)


def fit(units: Sequence[Unit], nodes: Sequence[tuple[str, dict[str, float]]]) -> dict[Unit, str]:
    """A node for every unit, as far as there is room.

    All on the smallest node that is large enough, else on large ones first.

    Args:
        nodes: ids, and resources that may be used.
    """
    by_size = sorted(nodes, key=lambda node: (node[1].get("GPU", 0.0), node[1].get("CPU", 0.0)))
    found: dict[Unit, str] = {}
    for candidates in [*([node] for node in by_size), by_size[::-1]]:
        found, left = {}, [(name, dict(resources)) for name, resources in candidates]
        for unit in units:
            for name, resources in left:
                if all(resources.get(kind, 0.0) >= amount for kind, amount in unit.needs.items()):
                    for kind, amount in unit.needs.items():
                        resources[kind] -= amount
                    found[unit] = name
                    break
        if len(found) == len(units):
            break
    return found


def _by_number(name: str) -> list[tuple[int, str]]:
    """A key to sort names that hold numbers: 10.0.0.9 before 10.0.0.10."""
    return [(int(digits or -1), text) for digits, text in re.findall(r"(\d+)|(\D+)", name)]
