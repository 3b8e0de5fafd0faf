"""What only a process can tell that loads torch and vLLM, or talks NCCL; for `mssr doctor`.

Each check is a command of this module: one that crashes, or hangs, is an answer as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from importlib import import_module
from typing import Any

from mssr.errors import UserError

TIMEOUT_S = 150.0
"""Longest that a check may take; importing torch and vLLM from shared storage takes most of it."""
_BYTES = {"nccl": 2**28, "gloo": 2**22}
"""Of the tensor that is sent; NCCL reaches its full bandwidth at about that."""
_REPEATS = 10


def libraries() -> dict[str, Any]:
    """Load torch, vLLM's kernels and, with CUDA, Triton's driver, which compiles C.

    Returns:
        device (vLLM's: cpu, cuda), gpus (number that torch sees), nccl ("2.28.9", "" without).

    Raises:
        UserError: one of them does not load, in its own words.
    """
    return _outcome("libraries")


def bandwidth(first: int, count: int, world: int, address: str, backend: str = "nccl") -> dict[str, float]:
    """All-reduce and broadcast among ``world`` processes, of which this machine has ``count``, one a GPU.

    Args:
        first: rank of the first one here.
        address: host:port on the machine of rank 0, where the ranks meet.
        backend: nccl, or gloo without GPUs.

    Returns:
        all_reduce and broadcast in GB/s: bus bandwidth as nccl-tests has it, which compares with a link's.
        Of a broadcast that is bytes / seconds, of an all-reduce 2 (world - 1) / world times that.

    Raises:
        UserError: the ranks do not meet, or their sum is wrong.
    """
    return _outcome("collectives", str(first), str(count), str(world), address, backend)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def _outcome(*command: str) -> dict[str, Any]:
    """What a command of this module finds, all of whose processes are gone when this returns."""
    child = subprocess.Popen(
        [sys.executable, "-m", "mssr.tools.gpu_checks", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UserError(f"no answer within {TIMEOUT_S:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    if child.returncode:
        raise UserError((err or out).strip().rpartition("\n")[2].strip() or f"exit code {child.returncode}")
    # NCCL_DEBUG=INFO and vLLM write to stdout, too.
    found: dict[str, Any] = json.loads(next(x for x in reversed(out.splitlines()) if x.startswith("{")))
    return found


def _libraries() -> dict[str, Any]:
    import torch
    from vllm.platforms import current_platform

    cuda = current_platform.device_type == "cuda"
    # vLLM itself only warns where its kernels cannot be loaded, as with those built for another torch.
    import_module("vllm._C_stable_libtorch" if cuda else "vllm._C")
    if cuda:
        torch.zeros(1, device="cuda")
        assert import_module("triton.runtime").driver.active.utils
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else ""
    return {"device": current_platform.device_type, "gpus": torch.cuda.device_count(), "nccl": nccl}


def _collectives(gpu: int, first: int, world: int, address: str, backend: str) -> None:
    """One rank; the first one here prints what `bandwidth` returns."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", gpu) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    limit, size = timedelta(seconds=TIMEOUT_S / 2), _BYTES[backend]
    dist.init_process_group(backend, f"tcp://{address}", timeout=limit, world_size=world, rank=first + gpu)
    data = torch.full((size // 4,), first + gpu + 1.0, device=device)
    dist.all_reduce(data)
    if not bool((data == world * (world + 1) / 2).all()):
        raise RuntimeError(f"the sum over {world} ranks is wrong")
    data.zero_()
    seconds = torch.zeros(2, dtype=torch.float64, device=device)
    for k, call in enumerate((dist.all_reduce, lambda tensor: dist.broadcast(tensor, src=0))):
        for repeats in (2, _REPEATS):  # the first two open the connections
            begin = time.perf_counter()
            for _ in range(repeats):
                call(data)
            if backend == "nccl":
                torch.cuda.synchronize()
            seconds[k] = (time.perf_counter() - begin) / repeats
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    all_reduce, broadcast = (size / s / 1e9 for s in seconds.tolist())
    if gpu == 0:
        print(json.dumps({"all_reduce": 2 * (world - 1) / world * all_reduce, "broadcast": broadcast}))
    dist.destroy_process_group()


def _main(check: str, *arguments: str) -> None:
    if check == "libraries":
        print(json.dumps(_libraries()))
        return
    from torch.multiprocessing.spawn import start_processes

    first, count, world, address, backend = arguments
    ranks = int(first), int(world), address, backend
    # Forked, they need not all import torch, which has not touched a GPU yet.
    start_processes(_collectives, ranks, nprocs=int(count), start_method="fork")


if __name__ == "__main__":
    _main(*sys.argv[1:])
