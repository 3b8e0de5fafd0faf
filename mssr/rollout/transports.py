"""Weights sent from a rank to the processes of engines that ask for them: both ends of two transports.

Each receiver connects to the rank's `Door` and is told, bucket after bucket, what is in it. How the bucket
itself gets there is the transport: by `Ipc` the receiver copies it out of the rank's own memory on the
device that both use (on CPU it comes through the connection), by `Broadcast` NCCL or gloo sends it to all. A
receiver answers when it has the bucket, and loads it while the rank fills the next. Who dies closes its
connection, which the other end notices at once.
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from mssr.errors import TransferInterruptedError, first_line
from mssr.rollout.heartbeat import beat
from mssr.rollout.weights import Layout, unpack

_LOOK_S = 0.2


class Address(NamedTuple):
    """Of a `Door`."""

    host: str
    port: int
    key: bytes

    def enter(self) -> Any:
        """A connection to who is behind it."""
        return Client((self.host, self.port), "AF_INET", authkey=self.key)


class Door:
    """Where receivers come to this process, for one transfer.

    Args:
        host: address of this machine, as they see it.
        limit_s: how long a receiver may take for an answer.
    """

    def __init__(self, host: str, limit_s: float) -> None:
        self._socket = socket.create_server((host, 0))
        self._socket.settimeout(_LOOK_S)
        self.limit_s = limit_s
        self.address = Address(host, self._socket.getsockname()[1], secrets.token_bytes(32))

    def admit(self, count: int, ended: Callable[[], bool]) -> list[Connection]:
        """Wait for so many receivers.

        Args:
            ended: asked now and then whether one of them will not come.

        Raises:
            TransferInterruptedError: one will not.
        """
        found: list[Connection] = []
        while len(found) < count:
            beat()
            try:
                accepted, _ = self._socket.accept()
            except TimeoutError:
                if ended():
                    raise TransferInterruptedError("an engine ended before it took weights") from None
                continue
            if (connection := self._introduced(accepted)) is not None:
                found.append(connection)
        return found

    def _introduced(self, accepted: socket.socket) -> Connection | None:
        """A connection to who knows the key; others are sent away."""
        limit = struct.pack("ll", max(1, int(self.limit_s)), 0)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        connection: Connection = Connection(accepted.detach())
        try:
            deliver_challenge(connection, self.address.key)
            answer_challenge(connection, self.address.key)
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return None
        return connection

    def close(self) -> None:
        """Who has not come in is sent away."""
        self._socket.close()


@contextlib.contextmanager
def _interrupted_by(*errors: type[Exception]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        what = first_line(error) if str(error) else "the other end is gone"
        raise TransferInterruptedError(f"the transfer of weights broke off: {what}") from error


_GONE = EOFError, OSError, AuthenticationError


class Sender:
    """The sending end of a transport."""

    def send(self, bucket: torch.Tensor, used: int, layout: Layout) -> None:
        """Give away the first bytes of a bucket; they may change when this returns.

        Raises:
            TransferInterruptedError: a receiver is lost; no more can be sent.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """There is no more. When this returns nobody uses the bucket any longer. Raises as `send`."""

    def close(self) -> None:
        """Who still waits for more is told that it will not come."""


class StoreSender(Sender):
    """Puts buckets where `mssr.rollout.weights.Stored` finds them.

    Args:
        put: `ray.put`.
        kept: what this process keeps for the next time.
    """

    def __init__(self, put: Callable[[Any], Any], kept: dict[str, Any]) -> None:
        self._put, self._kept = put, kept
        self.buckets: list[tuple[Any, Layout]] = []

    def send(self, bucket: torch.Tensor, used: int, layout: Layout) -> None:
        if bucket.is_cuda:
            if "pinned" not in self._kept:  # into other memory the device copies at a fraction of the speed
                self._kept["pinned"] = torch.empty_like(bucket, device="cpu", pin_memory=True)
            bucket = self._kept["pinned"][:used].copy_(bucket[:used])
        self.buckets.append((self._put(bucket[:used].numpy()), layout))


class _Connected(Sender):
    """Sends to receivers that come to a door.

    Args:
        receivers: how many there are.
        ended: asked now and then whether one of them will not come.
    """

    def __init__(self, door: Door, receivers: int, ended: Callable[[], bool]) -> None:
        self._door, self._count, self._ended = door, receivers, ended
        self._receivers: list[Connection] = []

    def send(self, bucket: torch.Tensor, used: int, layout: Layout) -> None:
        with _interrupted_by(*_GONE):
            if not self._receivers:
                self._receivers = self._door.admit(self._count, self._ended)
                self._begin(bucket.device)
            if bucket.is_cuda:
                torch.cuda.current_stream(bucket.device).synchronize()
            self._send(bucket, used, layout)

    def finish(self) -> None:
        with _interrupted_by(*_GONE):
            self._tell(None)
            self._answers()

    def close(self) -> None:
        self._door.close()
        for receiver in self._receivers:
            receiver.close()

    def _begin(self, device: torch.device) -> None:
        """Before the first bucket."""

    def _send(self, bucket: torch.Tensor, used: int, layout: Layout) -> None:
        raise NotImplementedError

    def _tell(self, message: Any) -> None:
        for receiver in self._receivers:
            receiver.send(message)

    def _answers(self) -> None:
        """Wait for one of every receiver."""
        waiting: list[Any] = list(self._receivers)
        deadline = time.monotonic() + self._door.limit_s
        while waiting:
            beat()
            for receiver in wait(waiting, timeout=1.0):
                receiver.recv()  # type: ignore[union-attr, call-arg]
                waiting.remove(receiver)
            if waiting and time.monotonic() > deadline:
                raise TimeoutError("an engine takes too long")


class IpcSender(_Connected):
    """To the process of an engine that is on the same device."""

    _handed_out = False

    def _send(self, bucket: torch.Tensor, used: int, layout: Layout) -> None:
        # Once: torch counts who has the memory, and frees it when they have let go as often.
        memory = reduce_tensor(bucket)[1] if bucket.is_cuda and not self._handed_out else None
        self._handed_out = True
        self._tell((layout, used, memory))
        if not bucket.is_cuda:
            for receiver in self._receivers:
                receiver.send_bytes(bucket[:used].numpy().data)
        self._answers()


@dataclass(frozen=True)
class Ipc:
    """From the rank on the same device.

    Args:
        doors: by `device_name` of their ranks; of all devices of an engine.
    """

    doors: Mapping[str, Address]

    def tensors(
        self, device: torch.device, process: int, kept: dict[str, Any]
    ) -> Generator[tuple[str, torch.Tensor]]:
        name = device_name(device, process)
        if name not in self.doors:
            raise RuntimeError(f"no rank is on {name}, the device of an engine that is to share it")
        memory: torch.Tensor | None = None
        with _interrupted_by(*_GONE), self.doors[name].enter() as sender:
            while (message := sender.recv()) is not None:
                layout, used, handed_out = message
                if device.type == "cuda":
                    memory = memory if handed_out is None else _mapped(handed_out, device)
                    assert memory is not None
                    bucket = memory[:used].clone()
                    torch.cuda.current_stream(device).synchronize()
                else:
                    bucket = torch.empty(used, dtype=torch.uint8)
                    sender.recv_bytes_into(bucket.numpy().data)
                sender.send(None)
                yield from unpack(bucket, layout)
            memory = None
            sender.send(None)


def device_name(device: torch.device, number: int) -> str:
    """What a rank and the process of an engine call the device that they share: a GPU's UUID; on CPU the
    process's number."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else f"cpu:{number}"


def _mapped(handed_out: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """Memory of another process on this device, which may have another number there."""
    arguments = list(handed_out)
    arguments[6] = device.index
    return rebuild_cuda_tensor(*arguments)


class Group(NamedTuple):
    """A process group of a sender, rank 0, and its receivers, beside any that torch knows of."""

    name: str
    members: dist.ProcessGroup
    store: dist.Store
    uses_nccl: bool


class BroadcastSender(_Connected):
    """To processes on other devices, all at once.

    Args:
        kept: what this process keeps for the next time.
    """

    def __init__(self, door: Door, receivers: int, ended: Callable[[], bool], kept: dict[str, Any]) -> None:
        super().__init__(door, receivers, ended)
        self._kept = kept
        self._finished = False

    def _begin(self, device: torch.device) -> None:
        """Be in one group with the receivers: the one of last time, if all were in it."""
        theirs = {receiver.recv() for receiver in self._receivers}
        group: Group | None = self._kept.get("group")
        size = self._count + 1
        if group is not None and theirs == {group.name} and group.members.size() == size:
            self._tell(None)
            return
        leave(self._kept)
        limit = datetime.timedelta(seconds=self._door.limit_s)
        host, name = self._door.address.host, secrets.token_hex(8)
        store = dist.TCPStore(host, 0, is_master=True, timeout=limit, wait_for_workers=False)
        for rank, receiver in enumerate(self._receivers, start=1):
            receiver.send((name, store.port, rank, size, self._door.limit_s))
        with _interrupted_by(RuntimeError):
            self._kept["group"] = _join(name, store, 0, size, device, limit)

    def _send(self, bucket: torch.Tensor, used: int, layout: Layout) -> None:
        self._tell((layout, used))
        with _interrupted_by(RuntimeError):  # which NCCL and gloo raise where somebody is gone
            work = self._kept["group"].members.broadcast(bucket[:used], 0)
            self._answers()
            work.wait()

    def finish(self) -> None:
        super().finish()
        self._finished = True

    def close(self) -> None:
        super().close()
        if not self._finished:
            leave(self._kept)


@dataclass(frozen=True)
class Broadcast:
    """From rank 0 to all processes of all engines."""

    door: Address

    def tensors(
        self, device: torch.device, process: int, kept: dict[str, Any]
    ) -> Generator[tuple[str, torch.Tensor]]:
        finished = False
        try:
            with _interrupted_by(*_GONE), self.door.enter() as sender:
                self._meet(sender, device, kept)
                while (message := sender.recv()) is not None:
                    layout, used = message
                    bucket = torch.empty(used, dtype=torch.uint8, device=device)
                    with _interrupted_by(RuntimeError):
                        work = kept["group"].members.broadcast(bucket, 0)
                        while not work.is_completed():
                            if sender.poll(0.001):  # it says nothing now, unless it is gone
                                raise EOFError
                        work.wait()
                    sender.send(None)
                    yield from unpack(bucket, layout)
                sender.send(None)
            finished = True
        finally:
            if not finished:
                leave(kept)

    def _meet(self, sender: Any, device: torch.device, kept: dict[str, Any]) -> None:
        """Be in the group that the sender is in."""
        group: Group | None = kept.get("group")
        sender.send(group.name if group else "")
        if (other := sender.recv()) is None:
            return
        leave(kept)
        name, port, rank, size, limit_s = other
        limit = datetime.timedelta(seconds=limit_s)
        with _interrupted_by(RuntimeError):
            store = dist.TCPStore(self.door.host, port, is_master=False, timeout=limit)
            kept["group"] = _join(name, store, rank, size, device, limit)


def _join(
    name: str, store: dist.Store, rank: int, size: int, device: torch.device, limit: datetime.timedelta
) -> Group:
    """Made by hand: `init_process_group` makes a process's only one, and both processes have theirs."""
    prefixed = dist.PrefixStore(name, store)
    members = dist.ProcessGroup(prefixed, rank, size)
    backend: Any
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        kind, backend = (
            dist.ProcessGroup.BackendType.NCCL,
            dist.ProcessGroupNCCL(prefixed, rank, size, options),
        )
    else:
        kind, backend = dist.ProcessGroup.BackendType.GLOO, dist.ProcessGroupGloo(prefixed, rank, size, limit)
    members._set_default_backend(kind)
    backend._set_sequence_number_for_group()
    members._register_backend(torch.device(device.type), kind, backend)
    return Group(name, members, store, device.type == "cuda")


def leave(kept: dict[str, Any]) -> None:
    """Drop the group that is kept, if there is one, and with NCCL end what still runs in it."""
    group: Group | None = kept.pop("group", None)
    if group is not None and group.uses_nccl:
        group.members.abort()
