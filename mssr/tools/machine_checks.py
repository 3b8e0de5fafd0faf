"""What the facts about a machine mean for a run: rows of `mssr doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from mssr.cluster.machine import Machine, driver_problem
from mssr.errors import first_line

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


@dataclass(frozen=True, slots=True)
class Run:
    """What a run wants of a machine."""

    weights_bytes: int
    by_object_store: bool
    """Whether weights are sure to travel through Ray's object store."""
    gpus_here: bool
    """Whether a machine without GPUs is an error where torch is built for them."""


def machine_rows(where: str, machine: Machine, run: Run) -> Iterator[Row]:
    """All checks of a machine that need no more than the facts."""
    for check, function in (
        ("machine", _host),
        ("driver", _driver),
        ("GPUs", _gpus),
        ("compiler", _compiler),
        ("shared memory", _shared_memory),
        ("limits", _limits),
        ("RDMA", _rdma),
    ):
        yield from guarded(where, check, partial(function, machine, run))


def guarded(where: str, check: str, function: Callable[[], Iterable[Finding | Row]]) -> Iterator[Row]:
    """The rows of a check; one that fails is a row that says so."""
    try:
        for row in function():
            yield row if isinstance(row, Row) else Row(where, check, *row)
    except Exception as error:
        yield Row(where, check, WARNING, f"could not be checked: {first_line(error)}")


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB"


def _host(machine: Machine, run: Run) -> Iterator[Finding]:
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in machine.versions.items())
    yield OK, f"{machine.host}: {machine.cores} cores, {gib(machine.memory_bytes)}; {versions}"


def _driver(machine: Machine, run: Run) -> Iterator[Finding]:
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
        yield (ERROR if run.gpus_here else OK), found, "docker run --gpus all; or install NVIDIA's driver"


def _gpus(machine: Machine, run: Run) -> Iterator[Finding]:
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
    kinds = Counter(f"{gpu.name} ({gib(gpu.total_bytes)})" for gpu in machine.gpus)
    found = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"
    if len(kinds) > 1:
        yield WARNING, found, "use GPUs of one kind: the slowest and the smallest decide"
    else:
        yield OK, found


def _compiler(machine: Machine, run: Run) -> Iterator[Finding]:
    python = ".".join(machine.versions["python"].split(".")[:2])
    packages = {"C compiler": "gcc", "Python.h": f"python{python}-dev"}
    there = {"C compiler": bool(machine.compiler), "Python.h": machine.python_headers}
    lacking = [name for name in packages if not there[name]]
    if not lacking:
        yield OK, f"{machine.compiler}, Python.h"
    elif machine.cuda:
        advice = (
            f"apt-get install {' '.join(packages[name] for name in lacking)}: Triton compiles at run time"
        )
        yield ERROR, f"there is no {' and no '.join(lacking)}", advice
    else:
        yield OK, f"there is no {' and no '.join(lacking)}; only GPUs need it"


def _shared_memory(machine: Machine, run: Run) -> Iterator[Finding]:
    """Ray's object store takes 30% of the memory, 95% of /dev/shm at most; what does not fit goes to disk."""
    shm, store = machine.shm_bytes, min(0.3 * machine.memory_bytes, 0.95 * machine.shm_bytes, 200e9)
    found = f"/dev/shm has {gib(shm)}, so Ray's object store {gib(store)}"
    advice = "docker run --ipc=host; Kubernetes: an emptyDir of medium Memory at /dev/shm"
    if shm < GIB:
        yield (ERROR if machine.gpus else WARNING), f"{found}; NCCL and vLLM need some, too", advice
    elif machine.shm_free_bytes < shm / 2:
        yield (
            WARNING,
            f"{found}, but {gib(machine.shm_free_bytes)} are free",
            "remove old files from /dev/shm",
        )
    elif store < run.weights_bytes:
        found = f"{found}; the weights have {gib(run.weights_bytes)}"
        slow = "cluster.weight_transfer=object_store goes through the disk"
        yield (
            (ERROR if run.by_object_store else WARNING),
            f"{found}: {slow}",
            f"use ipc or broadcast, or {advice}",
        )
    else:
        yield OK, found


def _limits(machine: Machine, run: Run) -> Iterator[Finding]:
    for flag, limit, least in (("-n", machine.open_files, 8192), ("-u", machine.processes, 4096)):
        low = 0 <= limit < least
        yield (WARNING if low else OK), f"ulimit {flag} is {limit}", f"ulimit {flag} 65536" if low else ""


def _rdma(machine: Machine, run: Run) -> Iterator[Finding]:
    """NCCL falls back to TCP without a word where it cannot use the adapters."""
    if not machine.rdma:
        yield OK, "no InfiniBand or RoCE adapters: NCCL goes through TCP between machines"
    elif not machine.verbs:
        advice = "apt-get install libibverbs1 ibverbs-providers"
        yield WARNING, "there are adapters and no libibverbs: NCCL goes through TCP", advice
    elif machine.locked_memory_bytes >= 0:
        advice = "ulimit -l unlimited; docker run --ulimit memlock=-1"
        yield WARNING, f"ulimit -l is {machine.locked_memory_bytes}: NCCL cannot register memory", advice
    else:
        yield OK, "adapters, libibverbs, and no limit on locked memory"
