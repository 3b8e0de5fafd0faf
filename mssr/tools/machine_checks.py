"""What the facts about a machine mean for a run: rows of `mssr doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mssr.cluster.machine import Machine, driver_problem
from mssr.errors import UserError, first_line

OK, WARNING, ERROR = "ok", "warning", "error"
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. Example: ``Row("this machine", "driver", "ok", "580.95.05, for CUDA 13.0")``"""

    where: str  # this machine, config, cluster, or a node
    check: str
    status: str  # ok, warning, error
    found: str
    advice: str = ""


Finding = tuple[str, ...]
"""What a check says: status, what it found, and advice if there is any."""


def guarded(where: str, check: str, findings: Iterable[Finding | Row], advice: str = "") -> Iterator[Row]:
    """The rows of a check, which is a generator. What it raises is a row as well, with the advice."""
    try:
        for finding in findings:
            yield finding if isinstance(finding, Row) else Row(where, check, *finding)
    except UserError as error:
        yield Row(where, check, ERROR, " ".join(str(error).split()), advice)
    except Exception as error:
        yield Row(where, check, WARNING, f"could not be checked: {first_line(error)}")


def machine_rows(where: str, machine: Machine, weights: float, needs_gpus: bool) -> Iterator[Row]:
    """All checks of a machine that need no more than the facts.

    Args:
        weights: bytes of the model, in bfloat16.
        needs_gpus: whether a machine without GPUs is an error where torch is built for them.
    """
    yield from guarded(where, "machine", _host(machine))
    yield from guarded(where, "driver", _driver(machine, needs_gpus))
    yield from guarded(where, "GPUs", _gpus(machine))
    yield from guarded(where, "compiler", _compiler(machine))
    yield from guarded(where, "shared memory", _shared_memory(machine, weights))
    yield from guarded(where, "limits", _limits(machine))


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB"


def _host(machine: Machine) -> Iterator[Finding]:
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine.versions.items())
    yield OK, f"{machine.host}: {machine.cores} cores, {gib(machine.memory_bytes)}; {versions}"


def _driver(machine: Machine, needs_gpus: bool) -> Iterator[Finding]:
    torch = f"torch {machine.versions['torch']}"
    if not machine.cuda and machine.gpus:
        yield ERROR, f"there are GPUs, and {torch} is a CPU build", "scripts/setup.sh --gpu"
    elif not machine.cuda:
        yield OK, f"none needed: {torch} is a CPU build"
    elif machine.driver:
        found, _, advice = driver_problem(machine).partition(": ")
        yield (ERROR, found, advice) if found else (OK, f"{machine.driver}, for CUDA {machine.cuda}")
    else:
        found = f"{torch} is built for CUDA {machine.cuda}, but: {machine.gpu_problem}"
        yield (ERROR if needs_gpus else OK), found, "docker run --gpus all; or install NVIDIA's driver"


def _gpus(machine: Machine) -> Iterator[Finding]:
    kinds = Counter(f"{gpu.name} ({gib(gpu.total_bytes)})" for gpu in machine.gpus)
    yield OK, ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"
    for gpu in machine.gpus:
        name = f"GPU {gpu.index}, {gpu.name},"
        if gpu.mig:
            yield ERROR, f"{name} is split into parts (MIG)", "turn it off, as root: nvidia-smi -mig 0"
        elif float(gpu.compute_capability) < 8:
            advice = "use Ampere or newer: older ones have neither bfloat16 nor flash attention"
            yield ERROR, f"{name} has compute capability {gpu.compute_capability}", advice
        elif gpu.free_bytes < 0.95 * gpu.total_bytes:
            taken = f"{gib(gpu.total_bytes - gpu.free_bytes)} of {gib(gpu.total_bytes)}"
            advice = "end what nvidia-smi lists, or leave this GPU out by CUDA_VISIBLE_DEVICES"
            yield WARNING, f"{name} lacks {taken}, which others have taken", advice


def _compiler(machine: Machine) -> Iterator[Finding]:
    python = ".".join(machine.versions["python"].split(".")[:2])
    packages = {} if machine.compiler else {"C compiler": "gcc"}
    packages |= {} if machine.python_headers else {"Python.h": f"python{python}-dev"}
    if not packages:
        yield OK, f"{machine.compiler}, Python.h"
    elif machine.cuda:
        advice = f"apt-get install {' '.join(packages.values())}: Triton compiles at run time"
        yield ERROR, f"there is no {' and no '.join(packages)}", advice
    else:
        yield OK, f"there is no {' and no '.join(packages)}; only GPUs need it"


def _shared_memory(machine: Machine, weights: float) -> Iterator[Finding]:
    """Ray's object store takes 30% of the memory, 95% of /dev/shm at most; what does not fit goes to disk."""
    store = min(0.3 * machine.memory_bytes, 0.95 * machine.shm_bytes, 200e9)
    found = f"/dev/shm has {gib(machine.shm_bytes)} free, for Ray's object store {gib(store)}"
    advice = "remove old files there; docker run --ipc=host; Kubernetes: an emptyDir of medium Memory"
    if machine.shm_bytes < GIB:
        yield (ERROR if machine.gpus else WARNING), f"{found}; NCCL and vLLM need some, too", advice
    elif machine.gpus and store < weights:
        slow = f"the weights have {gib(weights)}, cluster.weight_transfer=object_store goes through the disk"
        yield WARNING, f"{found}: {slow}", f"use ipc or broadcast; or {advice}"
    else:
        yield OK, found


def _limits(machine: Machine) -> Iterator[Finding]:
    for flag, limit, least in (("-n", machine.open_files, 8192), ("-u", machine.processes, 4096)):
        low = 0 <= limit < least
        yield (WARNING if low else OK), f"ulimit {flag} is {limit}", f"ulimit {flag} 65536" if low else ""
