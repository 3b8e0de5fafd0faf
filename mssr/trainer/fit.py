"""Whether a run is likely to fit on this machine, by the arithmetic of `mssr plan`, before it starts."""

from __future__ import annotations

from mssr.cluster.machine import Machine, free_disk
from mssr.config import Config
from mssr.errors import UserError
from mssr.models.host_memory import CACHES, disk_bytes, host_memory
from mssr.models.memory import GIB, gpu_tables, problems
from mssr.models.shapes import ModelShape, read_shape

ROUGHLY = 1.2
"""What libraries and an unknown mixture of images take is assumed: only more than this tells something."""


def shortages(config: Config, device: str, machine: Machine) -> list[str]:
    """What is likely to run out, a line each; none where it fits, or where that cannot be told from here.

    Args:
        device: "cpu" or "cuda".
        machine: the driver's. Of others nothing is known.
    """
    try:
        shape = read_shape(config.model)
    except UserError:
        return []  # loading the model will say more
    found = _on_gpus(config, shape, machine) if device == "cuda" else []
    if config.cluster.address is None:
        of_host = host_memory(config, shape, device, colocated=config.cluster.placement == "colocated")
        needed = sum(size for part, size in of_host.items() if part != CACHES)
        if needed > ROUGHLY * machine.memory_bytes:
            there = f"{machine.memory_bytes / GIB:.0f} GiB"
            found.append(f"the processes of {machine.host} take {needed / GIB:.0f} GiB of memory of {there}")
    needed, free = disk_bytes(config, shape), free_disk(config.run_dir)
    if needed > free:
        found.append(
            f"checkpoints take {needed / GIB:.0f} GiB and {free / GIB:.0f} are free where "
            f"trainer.run_dir={config.run_dir} lies; lower trainer.keep_checkpoints"
        )
    return found


def _on_gpus(config: Config, shape: ModelShape, machine: Machine) -> list[str]:
    from mssr.cluster.placement import decide

    sizes = [gpu.total_bytes for gpu in machine.gpus if gpu.total_bytes]
    if not sizes:
        return []
    colocated = decide(config, "cuda", min(sizes)).colocated
    tables, engine = gpu_tables(config, shape, min(sizes), colocated)
    return problems(config, tables, engine, min(sizes))
