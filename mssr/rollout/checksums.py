"""Whether an engine has the weights that the actor has, told by checksums.

A checksum is the sum, modulo 2^64, of a hash of every element's bits. It does not depend on the order of
the elements, and 0 counts as nothing, so that it stands for a tensor however an engine lays it out: fused
with others (the sums add up), split over devices (likewise), padded with zeros. What it cannot see is
elements that change places within a tensor. Weights that vLLM packs for the CPU's instructions are not seen
where they end up; of these, what arrived is compared, and their names.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mssr.errors import TrainingError, TransferInterruptedError
from mssr.rollout.heartbeat import beat

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 2**22
_FACTORS = -0x61C8864680B583EB, -0x40A7B892E31B1A47  # odd: of the golden ratio, and SplitMix64's
_MODULUS = 2**64
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""What vLLM calls the layer that these are parts of."""
_EXPERTS = {
    ".experts.routed_experts.w13_weight": ".experts.gate_up_proj",
    ".experts.routed_experts.w2_weight": ".experts.down_proj",
    ".experts.gate.": ".gate.",  # it has the router in two places
}
"""What transformers calls what vLLM has in a layer of experts."""


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """() int64 on the tensor's device."""
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in bits.split(_PART):
        mixed = part.long() * _FACTORS[0]
        mixed ^= mixed >> 29
        mixed *= _FACTORS[1]
        mixed ^= mixed >> 32
        total += mixed.sum()
    return total


class Checksums:
    """Of named tensors; the device is waited for once, at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def of(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors; each counts when it is taken."""
        for name, tensor in tensors:
            self._sums[name] = checksum(tensor)
            yield name, tensor

    def result(self) -> dict[str, int]:
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return dict(zip(self._sums, values, strict=True))


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """By name."""
    sums = Checksums()
    for _ in sums.of(tensors.items()):
        pass
    return sums.result()


class Arriving:
    """Weights of a `WeightSource` on their way into an engine; they end where the transfer is interrupted.

    So vLLM finishes what it began: after an error in its midst the next load would mix new and old.

    Args:
        check: take checksums.
    """

    def __init__(self, tensors: Generator[tuple[str, torch.Tensor]], check: bool) -> None:
        self._tensors, self._check, self._sums = tensors, check, Checksums()
        self.interrupted = ""
        """By what, in one line."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            for named in self._sums.of(self._tensors) if self._check else self._tensors:
                beat()
                yield named
        except TransferInterruptedError as error:
            self.interrupted = str(error)

    def close(self) -> None:
        """Whoever sends need not wait for this end any longer."""
        self._tensors.close()

    def loaded(self, model: torch.nn.Module, quantized: bool = False) -> Loaded:
        """How it ended, with the checksums of what arrived and of what ``model`` has now."""
        if not self._check or self.interrupted:
            return Loaded(self.interrupted)
        if quantized:
            return Loaded("", self._sums.result())
        parameters = dict(model.named_parameters(remove_duplicate=False))
        held = checksums({name: p for name, p in parameters.items() if p.numel()})
        # Where there are more devices than heads of keys and values, several devices have the same head.
        copies = [getattr(module, "num_kv_head_replicas", 1) for module in model.modules()]
        return Loaded("", self._sums.result(), {n: held.get(n) for n in parameters}, max(copies))


@dataclass(frozen=True)
class Loaded:
    """What a process of an engine has to say after a load."""

    interrupted: str
    """By what the transfer was, "" if it was not."""
    arrived: Mapping[str, int] | None = None
    """Checksums by Hugging Face names; None if they were not asked for."""
    held: Mapping[str, int | None] | None = None
    """Those of the engine's own parameters, by its names: None where there are no elements to see. None for
    all of a quantized engine, which has other numbers."""
    kv_copies: int = 1
    """How many processes have each head of keys and values."""


def differences(sent: Mapping[str, int], processes: Sequence[Loaded]) -> list[str]:
    """Names of the tensors that an engine does not have as they were sent.

    Args:
        sent: checksums of what the actor has, by Hugging Face names.
        processes: all of an engine.
    """
    arrived = [p.arrived or {} for p in processes]
    found = {name for a in arrived for name in sent.keys() | a.keys() if a.get(name) != sent.get(name)}
    held = [p.held for p in processes if p.held is not None]
    if len(held) < len(processes):
        return sorted(found)
    layers = {part for name in held[0] for part in name.split(".")[:-1]}
    own = {_common_name(name, layers): name for name in held[0]}
    expected: dict[str, dict[str, int]] = {common: {} for common in own}
    for name, value in sent.items():
        expected.setdefault(_common_name(name, layers), {})[name] = value
    for common, parts in expected.items():
        if not parts:  # the engine alone has it
            found.add(own[common])
        elif common not in own or not _agree(parts, [h[own[common]] for h in held], processes[0].kv_copies):
            found.update(parts)
    return sorted(found)


def _agree(parts: Mapping[str, int], held: Sequence[int | None], kv_copies: int) -> bool:
    """Whether processes have, each or all together, the sum of the parts; so far as it can be seen."""
    seen = [value for value in held if value is not None]
    if len(seen) < len(held):
        return True
    whole = sum(parts.values())
    in_copies = [value for name, value in parts.items() if {"k_proj", "v_proj"} & set(name.split("."))]
    totals = whole, whole + (kv_copies - 1) * sum(in_copies)
    return all((value - whole) % _MODULUS == 0 for value in seen) or any(
        (sum(seen) - total) % _MODULUS == 0 for total in totals
    )


def _common_name(name: str, layers: set[str]) -> str:
    """What a tensor's name in transformers and in an engine that has such layers have in common."""
    for engines, own in _EXPERTS.items():
        name = name.replace(engines, own)
    parts = [fused if (fused := _FUSED.get(part)) in layers else part for part in name.split(".")]
    return ".".join(part for part in parts if part not in ("model", "language_model"))


class WeightCheck:
    """``rollout.check_weights``: whether engines have the actor's weights after a transfer.

    Args:
        when: first (of every engine), always, never.
    """

    def __init__(self, when: str) -> None:
        self._when = when
        self._checked: set[Any] = set()

    def due(self, engine: Any) -> bool:
        """Whether the next transfer to an engine is to be checked."""
        return self._when == "always" or (self._when == "first" and engine not in self._checked)

    def __call__(self, engine: Any, name: str, sent: Mapping[str, int], loaded: Sequence[Loaded]) -> None:
        """Check one that was.

        Args:
            sent: checksums of the actor's weights; none if they were not taken, then what arrived counts.
            loaded: what `RolloutEngine.load_weights` returned.

        Raises:
            TrainingError: names the engine and the tensors.
        """
        arrived = next((p.arrived for p in loaded if p.arrived), {})
        if wrong := differences(sent or arrived, loaded):
            tensors = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            raise TrainingError(
                f"{name} has not the actor's weights after a transfer, by checksum: {tensors}; this is a "
                "fault of mssr or vLLM (rollout.check_weights=never trains on in spite of it)"
            )
        self._checked.add(engine)


def all_loaded(results: Any) -> Sequence[Loaded]:
    """What all processes of an engine said.

    Raises:
        TransferInterruptedError: of one the transfer was interrupted.
    """
    for loaded in results:
        if loaded.interrupted:
            raise TransferInterruptedError(loaded.interrupted)
    return list(results)
