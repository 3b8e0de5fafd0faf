"""The process group of the actor ranks, and the sharding of a model over them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from mssr.models.policy import PolicyModel


def init_process_group(
    rank: int, ranks: int, init_method: str, device: torch.device, timeout_s: float, replicas: int = 1
) -> DeviceMesh:
    """Join the group. gloo for what is on CPU, nccl for what is on GPUs.

    Args:
        init_method: "tcp://host:port" of rank 0, or "file:///path" on one machine.
        timeout_s: how long a collective waits for the other ranks, until `limit_waits` says otherwise.
        replicas: a divisor of ``ranks``; neighbouring ranks share one.

    Returns:
        (ranks,), or where there are several replicas (replicas, ranks of one).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    if replicas == 1:
        return init_device_mesh(device.type, (ranks,))
    names = ("replicate", "shard")
    return init_device_mesh(device.type, (replicas, ranks // replicas), mesh_dim_names=names)


def limit_waits(mesh: DeviceMesh, timeout_s: float) -> None:
    """From now on a collective of all ranks, or of a part of the mesh, waits for the others so long."""
    for group in {dist.group.WORLD, *mesh.get_all_groups()}:  # parts take over no limit from the whole
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def shard(
    model: PolicyModel,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    keep_gathered: bool,
    offload: bool = False,
    fill: Callable[[nn.Module], None] = lambda module: None,
) -> PolicyModel:
    """FSDP2: every decoder layer and vision block is gathered alone, the rest with the root.

    Parameters keep their dtype; forward and backward run in ``compute_dtype``, reductions in float32.
    A frozen vision tower, whose features are kept, stays whole on every rank: a rank that knows the
    features of its images, or has none, then runs no tower and no other rank waits for it.

    Args:
        keep_gathered: whole parameters stay from one pass to the next, until `reshard`.
        offload: parameters and gradients are in host memory but while they are used. Nothing on CPU.
        fill: called with every part before it is sharded, so that whole parameters exist part by part.
    """
    policies: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
    }
    if offload and mesh.device_type == "cuda":
        policies["offload_policy"] = CPUOffloadPolicy()
    tower = model.tower
    blocks = tower.blocks if tower is not None and model.features is None else ()
    for block in (*blocks, *model.layers):
        fill(block)
        fully_shard(block, reshard_after_forward=not keep_gathered, **policies)
    fill(model)
    whole = set() if tower is None or model.features is None else set(tower.parameters())
    # The root holds embedding, head and norms. It stays gathered from forward to backward in any case,
    # because the fused head reads the head's weight directly.
    fully_shard(model, reshard_after_forward=False, ignored_params=whole, **policies)
    return model


def reshard(model: nn.Module) -> None:
    """Drop gathered parameters. Needed after passes without backward: an update would leave them stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def accumulate_locally(model: nn.Module, last: bool) -> None:
    """Before a backward pass: keep whole parameters and gradients, until the last pass of an update."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)


def reduce_between_replicas(model: PolicyModel, last: bool) -> None:
    """Before a backward pass: replicas add up their gradients, from node to node, in the last of an update.

    In the decoder layers, in which every pass has gradients of the same parameters. Elsewhere a pass without
    images has fewer, and FSDP keeps what waits as one tensor, which would be another then.
    """
    for layer in model.layers:
        assert isinstance(layer, FSDPModule)
        layer.set_requires_all_reduce(last, recurse=False)


def all_reduce(values: dict[str, torch.Tensor], op: Any = dist.ReduceOp.SUM) -> dict[str, Any]:
    """Reduce tensors of one shape over the ranks, which all must pass the same keys; numbers come back."""
    keys = sorted(values)
    tensor = torch.stack([values[k].double() for k in keys])
    dist.all_reduce(tensor, op)
    return dict(zip(keys, tensor.tolist(), strict=True))


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most GPU memory that tensors of any rank took since the last call; a collective. None on CPU."""
    if device.type != "cuda":
        return {}
    peak = torch.tensor(torch.cuda.max_memory_allocated(device) / 2**30)
    torch.cuda.reset_peak_memory_stats(device)
    return all_reduce({"memory/actor_gpu_gib": peak}, dist.ReduceOp.MAX)


def full_tensors(
    named: Iterable[tuple[str, Any]], max_bytes: int = 2**28
) -> Iterator[tuple[str, torch.Tensor]]:
    """The whole tensors behind those that are sharded by rows, others as they are; a collective.

    Small ones are gathered together, because a collective of a hundred rows takes as long as one of one.

    Args:
        named: the same on all ranks.
        max_bytes: of the tensors that are gathered together, if they are several.
    """
    part: list[tuple[str, Any]] = []
    for name, value in named:
        size = sum(v.nbytes for _, v in part) + value.nbytes
        if part and (size > max_bytes or part[0][1].dtype != value.dtype):
            yield from _gather_rows(part)
            part = []
        part.append((name, value))
    yield from _gather_rows(part)


def _gather_rows(part: Sequence[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
    sharded = [value for _, value in part if isinstance(value, DTensor)]
    assert all(value.placements[-1] == Shard(0) for value in sharded)
    ranks = sharded[0].device_mesh.size(-1) if sharded else 1
    # The first ranks have as many rows as any, the last perhaps fewer or none; gathered are as many of each.
    sizes = [math.ceil(len(value) / ranks) * math.prod(value.shape[1:]) for value in sharded]
    found: Iterator[torch.Tensor] = iter(())
    if sharded:
        local = [value.to_local() for value in sharded]
        mine = local[0].new_zeros(sum(sizes))
        for into, rows in zip(mine.split(sizes), local, strict=True):
            into[: rows.numel()] = rows.flatten()
        everyones = mine.new_empty(ranks * len(mine))
        dist.all_gather_single(everyones, mine, sharded[0].device_mesh.get_group(-1))
        found = iter(everyones.view(ranks, -1).split(sizes, dim=1))
    for name, value in part:
        if isinstance(value, DTensor):
            value = next(found).flatten()[: value.numel()].view(value.shape)
        yield name, value


def local_tensor(value: Any) -> torch.Tensor:
    """What this rank holds of a sharded tensor."""
    return value.to_local() if hasattr(value, "to_local") else value


def clip_grad_norm(
    parameters: Sequence[torch.nn.Parameter], max_norm: float, flag: torch.Tensor, replicas: int = 1
) -> tuple[float, bool]:
    """Scale the gradients to at most ``max_norm`` in global L2 norm, unless something is not finite.

    In that case they are left as they are, so that what spoilt them can be found.

    Args:
        parameters: each sharded over all ranks, or over those of a replica.
        flag: () float32 on the device, 1 if this rank saw something that is not finite, else 0.
        replicas: whose gradients are equal.

    Returns:
        The norm before, and whether any rank's flag is 1; the same on all ranks.
    """
    gradients = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    # In float32 at least.
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=dtype) for g in gradients])
    sums = torch.stack([norms.square().sum().to(flag.device) / replicas, flag])
    dist.all_reduce(sums)
    # Together, so that the host waits for the device once.
    square, flags = sums.tolist()
    norm, flagged = math.sqrt(square) if square >= 0 else math.nan, flags > 0
    if math.isfinite(norm) and not flagged:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, torch.tensor(norm))
    return norm, flagged
