"""Weights from ranks to engines, and whose turn it is where both share devices:
generate, sleep, update, wake "weights", send, wake "kv_cache".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mssr.cluster.ray_calls import Calls, Failure, Worker
from mssr.config import Config
from mssr.errors import TransferInterruptedError, UserError, WorkersLostError

if TYPE_CHECKING:
    from mssr.cluster.ray_workers import Sent


@dataclass(frozen=True)
class Workers:
    """What there is of a cluster's workers, now."""

    ranks: Callable[[], Sequence[Worker]]
    engines: Callable[[], Sequence[Worker]]
    call_ranks: Callable[..., list[Any]]
    """A method of all ranks with some arguments; raises `WorkersLostError`."""
    call_engines: Callable[..., list[Any]]
    """Of some engines, which come first; those that fail are replaced."""
    of_ranks: Callable[[list[Any]], list[Any]]
    """The results of calls of all ranks, which were made already."""
    replace: Callable[[Sequence[Failure]], None]
    """Has new engines in place of some, and shows them to `Turns.welcome`; or raises what is their error."""


class Turns:
    """Gives engines the ranks' weights, and each side the devices when it needs them.

    Engines that have devices of their own never sleep, and what is left is: send.

    Args:
        device: "cpu" or "cuda".
        colocated: engines and ranks share devices.

    Raises:
        UserError: the transport that the config asks for cannot work there.
    """

    def __init__(self, config: Config, workers: Workers, calls: Calls, device: str, colocated: bool) -> None:
        from mssr.rollout.checksums import WeightCheck

        self._config, self._workers, self._calls = config, workers, calls
        self._colocated = colocated
        self._transport = transport(config, device, colocated)
        self._check = WeightCheck(config.rollout.check_weights)
        self._version: int | None = None
        self._asleep = self._syncing = False
        self._kept: Sent | None = None
        """The last weights, where an engine may need them while the ranks train."""

    def of_engines(self) -> None:
        """Engines are to generate."""
        if self._asleep:
            assert self._version is not None, "engines never got weights"
            self.sync(self._version)

    def of_ranks(self) -> None:
        """Ranks are to compute, or to be made."""
        if self._colocated and not self._asleep:
            self._asleep = True
            self._workers.call_engines(self._workers.engines(), "sleep")

    def sync(self, version: int) -> None:
        """Give all engines the ranks' weights, and their devices."""
        self._version, self._syncing, self._kept = version, True, None
        try:
            self.of_ranks()
            self._asleep = False
            if self._colocated:
                self.make_room()
                self._workers.call_engines(self._workers.engines(), "wake", "weights")
            self._send(self._workers.engines())
            if self._colocated:
                self._workers.call_engines(self._workers.engines(), "wake", "kv_cache")
        finally:
            self._syncing = False

    def make_room(self) -> None:
        """Have ranks give back device memory that they do not use, before engines take theirs."""
        if self._colocated:
            self._workers.call_ranks("make_room")

    def welcome(self, engines: Sequence[Worker]) -> None:
        """New engines, awake and with the base model's weights, are to be as the others are.

        Raises:
            WorkersLostError: the weights that the others have are gone.
        """
        if self._asleep:
            self._workers.call_engines(engines, "sleep")
        elif self._kept is not None:
            self._take(engines, self._kept.source, self._kept.checksums)
        elif self._config.rollout.lag and not self._syncing:
            names = ", ".join(engine.name for engine in engines)
            raise WorkersLostError(
                f"{names}: is new and needs the weights that the others have; the ranks, which train "
                "meanwhile (rollout.lag=1), have newer ones"
            )
        elif self._version is not None:
            self._send(engines)

    def _send(self, engines: Sequence[Worker]) -> None:
        while engines:
            check = any(map(self._check.due, engines))
            if self._transport == "object_store":
                sent: Sent = self._workers.call_ranks("send_weights", self._transport, [], check)[0]
                self._kept = sent if self._config.rollout.lag else None
                engines = self._take(engines, sent.source, sent.checksums)
            else:
                engines = self._hand_over(engines, check)

    def _hand_over(self, engines: Sequence[Worker], check: bool) -> Sequence[Worker]:
        """Send while they load; returns as `_finish`."""
        from mssr.rollout.transports import Broadcast, Ipc

        each, broadcast = self._config.rollout.tensor_parallel, self._transport == "broadcast"
        doors = self._workers.call_ranks("open_door", self._transport)
        loads, senders = {}, {}
        for engine in engines:
            first = engine.number * each
            own = senders[engine] = range(1) if broadcast else range(first, first + each)
            source = Broadcast(doors[0][1]) if broadcast else Ipc(dict(doors[k] for k in own))
            loads[engine] = engine.handle.load_weights.remote(source, self._version, check)
        refs = []
        for k, rank in enumerate(self._workers.ranks()):
            to = [load for engine, load in loads.items() if k in senders[engine]]
            refs.append(rank.handle.send_weights.remote(self._transport, to, check and k == 0))
        sent: Sent = self._workers.of_ranks(refs)[0]
        return self._finish(loads, sent.checksums, check)

    def _take(self, engines: Sequence[Worker], source: Any, checksums: dict[str, int]) -> Sequence[Worker]:
        """Have them load what is stored."""
        check = any(map(self._check.due, engines))
        arguments = source, self._version, check
        loads = {engine: engine.handle.load_weights.remote(*arguments) for engine in engines}
        return self._finish(loads, checksums, check)

    def _finish(self, loads: dict[Worker, Any], sent: dict[str, int], check: bool) -> Sequence[Worker]:
        """Wait for engines; returns those that are to be sent the weights again."""
        results = self._calls.gather(list(loads.items()))
        failures = [result for result in results if isinstance(result, Failure)]
        for engine, result in zip(loads, results, strict=True):
            if check and not isinstance(result, Failure):
                self._check(engine, engine.name, sent, result)
        interrupted = [f for f in failures if isinstance(f.error, TransferInterruptedError)]
        broken = [f for f in failures if f not in interrupted]
        if not broken:  # then nobody else is to blame
            broken, interrupted = interrupted, []
        self._workers.replace(broken)
        return [failure.worker for failure in interrupted]


def transport(config: Config, device: str, colocated: bool) -> str:
    """What ``cluster.weight_transfer`` means for engines and ranks in these places.

    Raises:
        UserError: it cannot work there.
    """
    wanted = config.cluster.weight_transfer if config.actor.num_ranks else "auto"
    if wanted == "auto":
        if device == "cuda":
            return "ipc" if colocated else "broadcast"
        return "broadcast" if config.rollout.tensor_parallel > 1 else "object_store"
    if wanted == "ipc" and not colocated:
        raise UserError(
            "cluster.weight_transfer=ipc is between processes on one device, and engines and ranks are "
            "apart; set cluster.placement=colocated, or cluster.weight_transfer=broadcast"
        )
    if wanted == "broadcast" and colocated and device == "cuda":
        raise UserError(
            "cluster.weight_transfer=broadcast is between devices, as NCCL is, and engines and ranks share "
            "theirs; set cluster.placement=apart, or cluster.weight_transfer=ipc"
        )
    return wanted
