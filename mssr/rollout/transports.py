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
        limit_s: how long a receiver may take for an answer. Who waits shows no sign of life meanwhile.
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


_GONE = EOFError, OSError, AuthenticationError
"""What is raised where the other end of a connection is gone."""
_GROUP_BROKEN = *_GONE, RuntimeError
"""Where it is in a group, too: by NCCL and gloo."""


@contextlib.contextmanager
def _interrupted_by(errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except TransferInterruptedError:
        raise
    except errors as error:
        what = first_line(error) if str(error) else "the other end is gone"
        raise TransferInterruptedError(f"the transfer of weights broke off: {what}") from error


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

    _lost: tuple[type[Exception], ...] = _GONE
    _finished = False

    def __init__(self, door: Door, receivers: int, ended: Callable[[], bool]) -> None:
        self._door, self._count, self._ended = door, receivers, ended
        self._receivers: list[Connection] = []

    def send(self, bucket: torch.Tensor, used: int, layout: Layout) -> None:
        with _interrupted_by(self._lost):
            if not self._receivers:
                self._receivers = self._door.admit(self._count, self._ended)
                self._begin(bucket)
            if bucket.is_cuda:
                torch.cuda.current_stream(bucket.device).synchronize()
            self._tell((layout, used))
            self._send(bucket, used)

    def finish(self) -> None:
        with _interrupted_by(self._lost):
            self._tell(None)
            self._answers()
        self._finished = True

    def close(self) -> None:
        self._door.close()
        for receiver in self._receivers:
            receiver.close()

    def _begin(self, bucket: torch.Tensor) -> None:
        """Before the first one is sent."""
        raise NotImplementedError

    def _send(self, bucket: torch.Tensor, used: int) -> None:
        """The first bytes of a bucket, of which receivers know the layout."""
        raise NotImplementedError

    def _tell(self, message: Any) -> None:
        for receiver in self._receivers:
            receiver.send(message)

    def _answers(self) -> None:
        """Wait for one of every receiver."""
        waiting: list[Any] = list(self._receivers)
        while waiting:
            beat()
            if not (ready := wait(waiting, timeout=self._door.limit_s)):
                raise TimeoutError("an engine takes too long")
            for receiver in ready:
                receiver.recv()  # type: ignore[union-attr, call-arg]
                waiting.remove(receiver)


class IpcSender(_Connected):
    """To the process of an engine that is on the same device."""

    def _begin(self, bucket: torch.Tensor) -> None:
        # Once: torch counts who has the memory, and frees it when they have let go as often.
        self._tell(reduce_tensor(bucket)[1] if bucket.is_cuda else None)

    def _send(self, bucket: torch.Tensor, used: int) -> None:
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
        with _interrupted_by(_GONE), self.doors[name].enter() as sender:
            handed_out = sender.recv()
            memory = _mapped(handed_out, device) if handed_out else None
            while (message := sender.recv()) is not None:
                layout, used = message
                if memory is not None:
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


class BroadcastSender(_Connected):
    """To processes on other devices, all at once.

    Args:
        kept: what this process keeps for the next time.
    """

    _lost = _GROUP_BROKEN

    def __init__(self, door: Door, receivers: int, ended: Callable[[], bool], kept: dict[str, Any]) -> None:
        super().__init__(door, receivers, ended)
        self._kept = kept

    def _begin(self, bucket: torch.Tensor) -> None:
        """Be in one group with the receivers: the one of last time, if all were in it."""
        theirs = {receiver.recv() for receiver in self._receivers}
        group: dist.ProcessGroup | None = self._kept.get("group")
        size = self._count + 1
        if group is not None and theirs == {group.group_name} and group.size() == size:
            self._tell(None)
            return
        leave(self._kept)
        limit = datetime.timedelta(seconds=self._door.limit_s)
        host, name = self._door.address.host, secrets.token_hex(8)
        store = dist.TCPStore(host, 0, is_master=True, timeout=limit, wait_for_workers=False)
        for rank, receiver in enumerate(self._receivers, start=1):
            receiver.send((name, store.port, rank, size, self._door.limit_s))
        self._kept["group"] = _join(name, store, 0, size, bucket.device, limit)

    def _send(self, bucket: torch.Tensor, used: int) -> None:
        work = self._kept["group"].broadcast(bucket[:used], 0)
        self._answers()
        work.wait()

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
        try:
            with _interrupted_by(_GROUP_BROKEN), self.door.enter() as sender:
                self._meet(sender, device, kept)
                while (message := sender.recv()) is not None:
                    layout, used = message
                    bucket = torch.empty(used, dtype=torch.uint8, device=device)
                    work = kept["group"].broadcast(bucket, 0)
                    while not work.is_completed():
                        if sender.poll(0.001):  # it says nothing now, unless it is gone
                            raise EOFError
                    work.wait()
                    sender.send(None)
                    yield from unpack(bucket, layout)
                sender.send(None)
        except BaseException:  # also of who closes this before its end
            leave(kept)
            raise

    def _meet(self, sender: Any, device: torch.device, kept: dict[str, Any]) -> None:
        """Be in the group that the sender is in."""
        sender.send(kept["group"].group_name if "group" in kept else "")
        if (other := sender.recv()) is None:
            return
        leave(kept)
        name, port, rank, size, limit_s = other
        limit = datetime.timedelta(seconds=limit_s)
        store = dist.TCPStore(self.door.host, port, is_master=False, timeout=limit)
        kept["group"] = _join(name, store, rank, size, device, limit)


def _join(
    name: str, store: dist.Store, rank: int, size: int, device: torch.device, limit: datetime.timedelta
) -> dist.ProcessGroup:
    """A group of a sender, rank 0, and its receivers, beside any that torch knows of: what
    `init_process_group` makes is a process's only one, and both processes have theirs."""
    prefixed = dist.PrefixStore(name, store)
    group = dist.ProcessGroup(prefixed, rank, size)
    kinds = dist.ProcessGroup.BackendType
    backend: Any
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        kind, backend = kinds.NCCL, dist.ProcessGroupNCCL(prefixed, rank, size, options)
    else:
        kind, backend = kinds.GLOO, dist.ProcessGroupGloo(prefixed, rank, size, limit)
    group._set_default_backend(kind)
    backend._set_sequence_number_for_group()
    group._register_backend(torch.device(device.type), kind, backend)
    group._set_group_name(name)
    return group


def leave(kept: dict[str, Any]) -> None:
    """Drop the group that is kept, if there is one, and end what still runs in it."""
    if "group" in kept:
        kept.pop("group").abort()
