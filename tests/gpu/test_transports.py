"""Transports of weights on GPUs, between processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.pool import Pool
from typing import Any

import pytest
import torch

from mssr.rollout import weights as weights_module
from mssr.rollout.checksums import checksums
from mssr.rollout.transports import Broadcast, BroadcastSender, Door, Ipc, IpcSender, device_name, leave
from mssr.rollout.weights import WeightSource, bucket_bytes, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
Tensors = dict[str, torch.Tensor]
_kept: dict[str, Any] = {}


def some_weights(seed: int) -> Tensors:
    """On the GPU, for several buckets, one of them larger than the others."""
    torch.manual_seed(seed)
    shapes = [(3000, 1000), *((500, 1000) for _ in range(9))]
    return {f"layer.{k}": torch.randn(s, device="cuda").bfloat16() for k, s in enumerate(shapes)}


def send(weights: Tensors, sender: Any) -> None:
    bucket = torch.empty(bucket_bytes(t.nbytes for t in weights.values()), dtype=torch.uint8, device="cuda")
    for layout, used in pack(weights.items(), bucket):
        sender.send(bucket, used, layout)
        bucket.fill_(255)  # as the next one does
    sender.finish()
    sender.close()


def receive(source: WeightSource, device: int) -> dict[str, int]:
    """In a process of an engine."""
    torch.cuda.set_device(device)
    return checksums(dict(source.tensors(torch.device("cuda", device), 0, _kept)))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    monkeypatch.setattr(weights_module, "BUCKET_BYTES", 2**20)
    pool = multiprocessing.get_context("spawn").Pool(1)
    yield pool
    pool.terminate()


def test_ipc(engines: Pool) -> None:
    """And the rank's memory is free afterwards, transfer after transfer."""
    used = []
    for transfer in range(3):
        weights = some_weights(transfer)
        door = Door("127.0.0.1", 120.0)
        source = Ipc({device_name(torch.device("cuda", 0), 0): door.address})
        received = engines.apply_async(receive, (source, 0))
        send(weights, IpcSender(door, 1, received.ready))
        assert received.get() == checksums(weights)
        torch.cuda.ipc_collect()
        used.append(torch.cuda.memory_allocated())
    assert len(set(used)) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_broadcast(engines: Pool) -> None:
    kept: dict[str, Any] = {}
    groups = []
    for transfer in range(3):
        weights = some_weights(transfer)
        door = Door("127.0.0.1", 120.0)
        received = engines.apply_async(receive, (Broadcast(door.address), 1))
        send(weights, BroadcastSender(door, 1, received.ready, kept))
        assert received.get() == checksums(weights)
        groups.append(kept["group"].group_name)
    assert len(set(groups)) == 1
    leave(kept)
