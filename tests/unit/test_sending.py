"""The actor's end of a transfer of weights, and what is special about it on GPUs, by recorded calls."""

from __future__ import annotations

import datetime
import inspect
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from mssr.actor import sending
from mssr.actor.sending import WeightSender
from mssr.actor.worker import PolicyWorker
from mssr.errors import TransferInterruptedError
from mssr.models.lora import full_weights, is_adapter
from mssr.rollout import transports, weights
from mssr.rollout.checksums import checksums
from mssr.rollout.transports import Door, Ipc, IpcSender, StoreSender
from mssr.rollout.weights import Layout, pack, unpack
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 3)
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("rank", [0, 2])
def test_weights_are_gathered_in_the_dtype_of_the_forward_pass(
    rank: int, workspace: Workspace, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the bytes of float32 masters, and the same numbers; adapters are merged in float32 before."""
    overrides = [f"actor.lora.rank={rank}", "actor.num_ranks=1", "model.dtype=bfloat16"]
    worker = PolicyWorker(load_config(workspace.config, overrides), 0, f"file://{tmp_path}/rendezvous")
    try:
        if rank:
            with torch.no_grad():
                for name, parameter in worker.policy.named_parameters():
                    if ".lora_B." in name:
                        parameter.to_local().normal_()  # type: ignore[attr-defined]
        gathered: dict[str, torch.dtype] = {}
        gather = sending.full_tensors

        def recorded(named: Any) -> Any:
            def seen() -> Iterator[tuple[str, Any]]:
                for name, value in named:
                    gathered[name] = value.dtype
                    yield name, value

            return gather(seen())

        monkeypatch.setattr(sending, "full_tensors", recorded)
        sent = dict(worker.sender.weights())
        expected = dict(full_weights(worker.policy.model, gather))
    finally:
        worker.close()
    assert sent.keys() == expected.keys() and "lm_head.weight" in sent
    for name, tensor in expected.items():
        assert torch.equal(sent[name], tensor.bfloat16()), name
    kinds = {(is_adapter(name), dtype) for name, dtype in gathered.items()}
    assert kinds == {(False, torch.bfloat16)} | ({(True, torch.float32)} if rank else set())


class Recorder:
    """A sender that loses its receiver after so many buckets."""

    def __init__(self, most: int = 10**6) -> None:
        self.received: Tensors = {}
        self.most, self.finished, self.closed = most, False, False

    def send(self, bucket: torch.Tensor, used: int, layout: Layout) -> None:
        if not self.most:
            raise TransferInterruptedError("gone")
        self.most -= 1
        self.received |= {name: tensor.clone() for name, tensor in unpack(bucket[:used], layout)}

    def finish(self) -> None:
        self.finished = True

    def close(self) -> None:
        self.closed = True


class Gathered(WeightSender):
    """Counts the weights that were gathered, which all ranks do together."""

    count = 0

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in super().weights():
            self.count += 1
            yield name, tensor


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(weights, "BUCKET_BYTES", 2**10)
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(10, 10) for _ in range(6)))


@pytest.mark.parametrize("most", [10**6, 2, 0, None])
def test_a_rank_gathers_to_the_end_whatever_becomes_of_its_receiver(
    most: int | None, model: nn.Module
) -> None:
    sender = None if most is None else Recorder(most)
    ours = Gathered(model, torch.float32, CPU)
    found = ours.send(sender, check=True)
    assert ours.count == 12
    if sender is not None:
        assert sender.closed and sender.finished is (most == 10**6)
    if sender is not None and sender.finished:
        state = model.state_dict()
        assert all(torch.equal(sender.received[k], v) for k, v in state.items())
        assert found == checksums(state)
    assert ours.send(Recorder(), check=False) == {}


class OnDevice:
    """Memory that says it is a GPU's."""

    is_cuda, device = True, CUDA

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory

    def __getitem__(self, part: slice) -> torch.Tensor:
        return self.memory[part]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    found = MagicMock()
    monkeypatch.setattr(torch.cuda, "current_stream", found)
    return found


def test_on_a_gpu_an_engine_copies_out_of_the_ranks_memory(
    stream: MagicMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handed out once a transfer, and changed by the rank only when the engine has its copy."""
    torch.manual_seed(0)
    state = {f"layer.{k}": torch.randn(40, 10).bfloat16() for k in range(9)}
    memory = torch.empty(3 * 800, dtype=torch.uint8)
    handed_out: list[Any] = []

    def reduced(bucket: OnDevice) -> tuple[Any, tuple[Any, ...]]:
        handed_out.append(bucket)
        return None, tuple(range(15))

    def rebuilt(*arguments: Any) -> torch.Tensor:
        assert arguments == (*range(6), CUDA.index, *range(7, 15))
        return memory

    monkeypatch.setattr(transports, "reduce_tensor", reduced)
    monkeypatch.setattr(transports, "rebuild_cuda_tensor", rebuilt)
    monkeypatch.setattr(transports, "device_name", lambda device, number: "GPU-1234")
    door = Door("127.0.0.1", 60.0)
    source = Ipc({"GPU-1234": door.address})
    sender = IpcSender(door, 1, lambda: False)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(lambda: dict(source.tensors(CUDA, 0, {})))
        for layout, used in pack(state.items(), memory):
            sender.send(OnDevice(memory), used, layout)  # type: ignore[arg-type]
            memory.fill_(0)
        sender.finish()
        sender.close()
        found = received.result()
    assert len(handed_out) == 1 and all(torch.equal(found[k], v) for k, v in state.items())
    # Of both ends: the copies into the bucket before it is shown, the copy out of it before the answer.
    assert stream.return_value.synchronize.call_count == 2 * 3


def test_torch_still_puts_the_device_where_we_change_it() -> None:
    assert list(inspect.signature(rebuild_cuda_tensor).parameters)[6] == "storage_device"


def test_an_engine_on_another_gpu_than_its_rank_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-5"))
    source = Ipc({"GPU-1234": transports.Address("127.0.0.1", 1, b"")})
    with pytest.raises(RuntimeError, match="no rank is on GPU-5"):
        next(source.tensors(CUDA, 0, {}))


def test_pinned_memory_is_kept(stream: MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def empty_like(bucket: OnDevice, **options: Any) -> torch.Tensor:
        asked.append(options)
        return torch.empty_like(bucket.memory)

    monkeypatch.setattr(transports, "torch", SimpleNamespace(empty_like=empty_like))
    kept: dict[str, Any] = {}
    for transfer in range(2):
        stored: list[Any] = []
        sender = StoreSender(lambda array: stored.append(array.copy()), kept)  # noqa: B023
        for k in range(2):
            sender.send(OnDevice(torch.full((20,), 2 * transfer + k, dtype=torch.uint8)), 10, [])  # type: ignore[arg-type]
        assert [set(array) for array in stored] == [{2 * transfer}, {2 * transfer + 1}]
        assert all(len(array) == 10 for array in stored)
    assert asked == [{"device": "cpu", "pin_memory": True}]


def test_on_gpus_the_group_uses_nccl_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = MagicMock()
    monkeypatch.setattr(dist, "ProcessGroupNCCL", made, raising=False)
    monkeypatch.setattr(dist, "ProcessGroup", MagicMock())
    limit = datetime.timedelta(seconds=450)
    group = transports._join("name", dist.HashStore(), 1, 3, CUDA, limit)
    [(_, rank, size, options)] = [call.args for call in made.call_args_list]
    assert (rank, size) == (1, 3) and options is made.Options.return_value and options._timeout == limit
    kind = dist.ProcessGroup.BackendType.NCCL  # type: ignore[attr-defined]
    group._set_default_backend.assert_called_once_with(kind)  # type: ignore[attr-defined]
    group._register_backend.assert_called_once_with(  # type: ignore[attr-defined]
        torch.device("cuda"), kind, made.return_value
    )
    # What still runs in a group that is left, as a broadcast whose receiver is gone, has to end.
    transports.leave(kept := {"group": group})
    group.abort.assert_called_once_with()  # type: ignore[attr-defined]
    assert not kept
