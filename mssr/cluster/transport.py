"""Rollouts on their way to the driver: few arrays for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mssr.rollout.queue import Finished
from mssr.types import PackedRollouts

if TYPE_CHECKING:
    from mssr.cluster.shared_prompts import SharedPrompts


@dataclass(frozen=True)
class FinishedPart:
    """Rollouts of an engine that have finished, by the numbers of their requests."""

    numbers: list[int]
    rollouts: PackedRollouts
    prompts: Sequence[SharedPrompts] = ()
    """Of those that the engine had to encode, for these rollouts or earlier ones."""


def pack_rollouts(finished: Finished, prompts: Sequence[SharedPrompts] = ()) -> FinishedPart:
    """At least one rollout, with their numbers, for the way."""
    numbers, rollouts = zip(*finished, strict=True)
    return FinishedPart(list(numbers), PackedRollouts.of(rollouts), prompts)


def unpack_rollouts(part: FinishedPart) -> Finished:
    """See `PackedRollouts.unpack`."""
    return list(zip(part.numbers, part.rollouts.unpack(), strict=True))
