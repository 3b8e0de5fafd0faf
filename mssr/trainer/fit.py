"""Whether a run is likely to fit on this machine, by the arithmetic of `mssr plan`, before it starts."""

from __future__ import annotations

from mssr.cluster.machine import Machine, free_disk
from mssr.config import Config
from mssr.errors import UserError
from mssr.models.host_memory import CACHES, disk_bytes, host_memory
from mssr.models.memory import GpuMemory
from mssr.models.published import read_shape
from mssr.models.rank_memory import GIB

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
        gpu_bytes = min((gpu.total_bytes for gpu in machine.gpus), default=0)
        colocated, transport = _placement(config, device, gpu_bytes)
    except UserError:
        return []  # the start will say more
    of_host = host_memory(config, shape, device, transport)
    found = []
    if device == "cuda" and gpu_bytes:
        found += GpuMemory.of(config, shape, gpu_bytes, colocated).problems
    needed = sum(size for part, size in of_host.items() if part != CACHES)
    if config.cluster.address is None and needed > ROUGHLY * machine.memory_bytes:
        there = f"{machine.memory_bytes / GIB:.0f} GiB"
        found.append(f"the processes of {machine.host} take {needed / GIB:.0f} GiB of memory of {there}")
    needed, free = disk_bytes(config, shape), free_disk(config.run_dir)
    if needed > free:
        found.append(
            f"checkpoints take {needed / GIB:.0f} GiB and {free / GIB:.0f} are free where "
            f"trainer.run_dir={config.run_dir} lies; lower trainer.keep_checkpoints"
        )
    return found


def _placement(config: Config, device: str, gpu_bytes: int) -> tuple[bool, str]:
    """Whether engines and ranks share devices, and by what weights go from one to another."""
    if config.cluster.launcher == "local":
        return True, "none"
    # They need Ray, which is not everywhere.
    from mssr.cluster.placement import decide
    from mssr.cluster.turns import transport

    colocated = decide(config, device, gpu_bytes).colocated
    return colocated, transport(config, device, colocated)
