"""What only a process can tell that loads torch and vLLM, or talks NCCL; for `mssr doctor`.

Each check runs in processes of its own: one that crashes, or hangs, is an answer as well.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import import_module
from typing import Any

_LIBRARIES_TIMEOUT_S = 180.0
_COLLECTIVES_TIMEOUT_S = 120.0
_BYTES = {"nccl": 2**28, "gloo": 2**22}
"""Of the tensor that is sent; NCCL reaches its full bandwidth at about that."""
_REPEATS = 10


def libraries() -> dict[str, Any]:
    """Load torch, vLLM's kernels and, with CUDA, Triton's driver, which compiles C.

    Returns:
        device (vLLM's: cpu, cuda), gpus (number that torch sees), nccl ("2.28.9", "" without), no_peer (pairs
        of GPUs that cannot read each other's memory).

    Raises:
        RuntimeError: one of them does not load, in its own words.
    """
    return _outcomes([["libraries"]], _LIBRARIES_TIMEOUT_S)[0]


def bandwidth(ranks: Sequence[int], world: int, address: str, backend: str = "nccl") -> dict[str, float]:
    """All-reduce and broadcast among ``world`` processes, of which this machine has ``ranks``, one a GPU.

    Args:
        address: host:port on the machine of rank 0, where the ranks meet.
        backend: nccl, or gloo without GPUs.

    Returns:
        all_reduce and broadcast in GB/s: bus bandwidth as nccl-tests has it, which compares with a link's.
        Of a broadcast that is bytes / seconds, of an all-reduce 2 (world - 1) / world times that.

    Raises:
        RuntimeError: the ranks do not meet, or their sum is wrong.
    """
    size = _BYTES[backend]
    commands = [
        ["collectives", str(rank), str(world), str(k), address, backend, str(size)]
        for k, rank in enumerate(ranks)
    ]
    outcomes = _outcomes(commands, _COLLECTIVES_TIMEOUT_S)
    all_reduce_s, broadcast_s = (max(o[key] for o in outcomes) for key in ("all_reduce", "broadcast"))
    return {
        "all_reduce": 2 * (world - 1) / world * size / all_reduce_s / 1e9,
        "broadcast": size / broadcast_s / 1e9,
    }


def _outcomes(commands: Sequence[Sequence[str]], timeout_s: float) -> list[dict[str, Any]]:
    """What processes of this module find, all of which are gone when this returns."""
    program = [sys.executable, "-m", "mssr.tools.gpu_checks"]
    with contextlib.ExitStack() as stack:
        # Files, because a process that fills a pipe (NCCL_DEBUG=INFO) waits, and with it all others.
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        children = [
            subprocess.Popen([*program, *command], stdout=file, stderr=subprocess.STDOUT)
            for command, file in zip(commands, files, strict=True)
        ]
        deadline = time.monotonic() + timeout_s
        try:
            while None in (codes := [child.poll() for child in children]) and not any(codes):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no answer within {timeout_s:.0f} s")
                time.sleep(0.05)
        finally:
            for child in children:
                child.kill()
                child.wait()
        outcomes = []
        # The first that failed is the cause of what the others say.
        for code, file in sorted(zip(codes, files, strict=True), key=lambda x: not x[0]):
            file.seek(0)
            lines = [line.strip() for line in file if line.strip()]
            if code:
                raise RuntimeError(lines[-1] if lines else f"exit code {code}")
            outcomes.append(json.loads(next(line for line in reversed(lines) if line.startswith("{"))))
        return outcomes


def _libraries() -> dict[str, Any]:
    import torch
    from vllm.platforms import current_platform

    cuda = current_platform.device_type == "cuda"
    # vLLM itself only warns where its kernels cannot be loaded, as with those built for another torch.
    import_module("vllm._C_stable_libtorch" if cuda else "vllm._C")
    count = torch.cuda.device_count()
    if cuda:
        torch.zeros(1, device="cuda")
        assert import_module("triton.runtime").driver.active.utils
    return {
        "device": current_platform.device_type,
        "gpus": count,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "",
        "no_peer": [
            [i, j]
            for i in range(count)
            for j in range(count)
            if i != j and not torch.cuda.can_device_access_peer(i, j)
        ],
    }


def _collectives(rank: int, world: int, gpu: int, address: str, backend: str, size: int) -> dict[str, float]:
    """Seconds of one all-reduce and one broadcast."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", gpu) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=_COLLECTIVES_TIMEOUT_S / 2)
    dist.init_process_group(backend, f"tcp://{address}", timeout=limit, world_size=world, rank=rank)
    data = torch.full((size // 4,), rank + 1.0, device=device)
    dist.all_reduce(data)
    if not bool((data == world * (world + 1) / 2).all()):
        raise RuntimeError(f"the sum over {world} ranks is wrong")
    data.zero_()

    def seconds(call: Callable[[], Any]) -> float:
        for repeats in (2, _REPEATS):  # the first two open the connections
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            if backend == "nccl":
                torch.cuda.synchronize()
        return (time.perf_counter() - begin) / _REPEATS

    result = {
        "all_reduce": seconds(lambda: dist.all_reduce(data)),
        "broadcast": seconds(lambda: dist.broadcast(data, src=0)),
    }
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    check, *arguments = sys.argv[1:]
    if check == "libraries":
        print(json.dumps(_libraries()))
    else:
        rank, world, gpu, address, backend, size = arguments
        print(json.dumps(_collectives(int(rank), int(world), int(gpu), address, backend, int(size))))
