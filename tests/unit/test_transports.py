"""Both ends of every transport of weights, in threads; and what an end does when the other is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from mssr.errors import TransferInterruptedError
from mssr.rollout import weights as weights_module
from mssr.rollout.transports import (
    Broadcast,
    BroadcastSender,
    Door,
    Ipc,
    IpcSender,
    Sender,
    StoreSender,
    device_name,
)
from mssr.rollout.weights import Stored, WeightSource, bucket_bytes, pack

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
LIMIT_S = 60.0


def some_weights(seed: int) -> Tensors:
    """Of several sizes and kinds; one is larger than a bucket."""
    torch.manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(7, 3), (100, 41), (), (5,), (300, 50), (2, 2, 2), (64, 3)]
    kinds = (torch.float32, torch.bfloat16)
    return {f"layer.{k}.weight": torch.randn(s, dtype=kinds[k % 2]) for k, s in enumerate(shapes)}


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "BUCKET_BYTES", 2**12)


def send(weights: Tensors, sender: Sender) -> int:
    """Returns how many buckets it took."""
    bucket = torch.empty(bucket_bytes(t.nbytes for t in weights.values()), dtype=torch.uint8)
    count = 0
    try:
        for layout, used in pack(weights.items(), bucket):
            sender.send(bucket, used, layout)
            count += 1
            bucket.fill_(255)  # as the next one does
        sender.finish()
    finally:
        sender.close()
    return count


def receive(source: WeightSource, process: int, kept: dict[str, Any], most: int = 10**6) -> Tensors:
    """All weights, held until the end as vLLM holds them; or the first ones, and then this end is gone."""
    found: Tensors = {}
    tensors = source.tensors(CPU, process, kept)
    for name, tensor in tensors:
        found[name] = tensor
        if len(found) == most:
            tensors.close()  # type: ignore[attr-defined]
    return found


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture
def threads() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(8) as pool:
        yield pool.submit


def never() -> bool:
    return False


def test_through_a_store() -> None:
    weights = some_weights(0)
    store: dict[int, Any] = {}

    def put(array: Any) -> int:
        store[len(store)] = array.copy()
        store[len(store) - 1].flags.writeable = False  # as Ray's
        return len(store) - 1

    sender = StoreSender(put, {})
    assert send(weights, sender) >= 3
    assert_equal(receive(Stored(sender.buckets, store.__getitem__), 0, {}), weights)


def test_from_the_rank_on_the_same_device(threads: Callable[..., Future[Any]]) -> None:
    """Every process of an engine finds its own rank, and several transfers follow one another."""
    for transfer in range(2):
        weights = some_weights(transfer)
        doors = [Door("127.0.0.1", LIMIT_S) for _ in range(2)]
        source = Ipc({device_name(CPU, k): door.address for k, door in enumerate(doors)})
        received = [threads(receive, source, process, {}) for process in (1, 0)]
        sent = [threads(send, weights, IpcSender(door, 1, never)) for door in doors]
        assert all(s.result() >= 3 for s in sent)
        for found in received:
            assert_equal(found.result(), weights)


class Engines:
    """What processes of engines keep, and one broadcast to some of them."""

    def __init__(self, threads: Callable[..., Future[Any]]) -> None:
        self.threads = threads
        self.rank: dict[str, Any] = {}
        self.kept: list[dict[str, Any]] = [{} for _ in range(3)]

    def broadcast(self, weights: Tensors, to: list[int], most: dict[int, int] | None = None) -> list[Any]:
        """The outcomes: of the sender, then of every receiver; an exception is one."""
        door = Door("127.0.0.1", LIMIT_S)
        source = Broadcast(door.address)
        sender = BroadcastSender(door, len(to), never, self.rank)
        calls = [self.threads(send, weights, sender)]
        calls += [self.threads(receive, source, 0, self.kept[k], (most or {}).get(k, 10**6)) for k in to]
        return [call.exception() or call.result() for call in calls]

    def group(self, k: int) -> tuple[str, int]:
        group = self.kept[k]["group"]
        return group.group_name, group.rank()


def test_to_all_at_once_in_a_group_that_is_kept(threads: Callable[..., Future[Any]]) -> None:
    engines = Engines(threads)
    groups = []
    for transfer in range(2):
        weights = some_weights(transfer)
        buckets, *received = engines.broadcast(weights, [0, 1, 2])
        assert buckets >= 3
        for found in received:
            assert_equal(found, weights)
        groups.append([engines.group(k) for k in range(3)])
    assert groups[0] == groups[1]
    assert sorted(rank for _, rank in groups[0]) == [1, 2, 3]
    # An engine that takes another's place has no group, whether it is sent the weights alone or with others.
    for first in ([1], []):
        engines.kept[1] = {}
        weights = some_weights(2)
        if first:
            _, found = engines.broadcast(weights, first)
            assert_equal(found, weights)
        _, *received = engines.broadcast(weights, [0, 1, 2])
        for found in received:
            assert_equal(found, weights)
        assert len({engines.group(k)[0] for k in range(3)}) == 1


def test_when_one_engine_is_gone_nobody_waits(threads: Callable[..., Future[Any]]) -> None:
    """The others are told, and are sent the weights again."""
    engines = Engines(threads)
    weights = some_weights(0)
    sender, first, gone, third = engines.broadcast(weights, [0, 1, 2], most={1: 2})
    assert isinstance(sender, TransferInterruptedError) and len(gone) == 2
    assert isinstance(first, TransferInterruptedError) and isinstance(third, TransferInterruptedError)
    _, *received = engines.broadcast(weights, [0, 2])
    for found in received:
        assert_equal(found, weights)


@pytest.mark.parametrize("kind", [Ipc, Broadcast])
def test_when_the_rank_is_gone_the_engine_is_told(kind: Any, threads: Callable[..., Future[Any]]) -> None:
    door = Door("127.0.0.1", LIMIT_S)
    source = Ipc({"cpu:0": door.address}) if kind is Ipc else Broadcast(door.address)
    sender: Any = IpcSender(door, 1, never) if kind is Ipc else BroadcastSender(door, 1, never, {})
    received = threads(receive, source, 0, {})
    weights = some_weights(0)
    bucket = torch.empty(bucket_bytes(t.nbytes for t in weights.values()), dtype=torch.uint8)
    layout, used = next(pack(weights.items(), bucket))
    sender.send(bucket, used, layout)
    sender.close()
    with pytest.raises(TransferInterruptedError):
        received.result()


def test_an_engine_that_ended_before_it_came_is_not_waited_for() -> None:
    looks = iter([False, True])
    with pytest.raises(TransferInterruptedError, match="an engine ended before"):
        send(some_weights(0), IpcSender(Door("127.0.0.1", LIMIT_S), 1, looks.__next__))


def test_who_does_not_know_the_key_gets_nothing(threads: Callable[..., Future[Any]]) -> None:
    weights = some_weights(0)
    door = Door("127.0.0.1", LIMIT_S)
    sent = threads(send, weights, IpcSender(door, 1, never))
    stranger = Ipc({"cpu:0": door.address._replace(key=b"guessed")})
    with pytest.raises(TransferInterruptedError):
        receive(stranger, 0, {})
    assert_equal(receive(Ipc({"cpu:0": door.address}), 0, {}), weights)
    sent.result()


def test_one_tensor_may_fill_a_bucket() -> None:
    """7B's embedding has 1,089,994,752 bytes, more than any bucket would have without it."""
    weights = {"small": torch.ones(3), "large": torch.ones(5000), "last": torch.ones(1)}
    size = bucket_bytes(t.nbytes for t in weights.values())
    assert size == 20000
    bucket = torch.empty(size, dtype=torch.uint8)
    assert [len(layout) for layout, _ in pack(weights.items(), bucket)] == [1, 1, 1]
    assert bucket_bytes([3, 5]) == 32  # no larger than what it is for
