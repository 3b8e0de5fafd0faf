"""Rollouts on their way to the driver: two arrays for many of them.

To restore an array costs the driver about as much as the rest of a rollout, and it gets thousands a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mssr.rollout.queue import Finished
from mssr.types import Rollout

if TYPE_CHECKING:
    from mssr.cluster.shared_prompts import SharedPrompts

ARRAYS = ("prompt_token_ids", "response_token_ids", "log_probs")


@dataclass(frozen=True)
class PackedRollouts:
    """K finished rollouts, what they have of tokens laid end to end."""

    numbers: list[int]
    """(K,) of their requests."""
    fields: list[dict[str, Any]]
    """(K,) those of `Rollout` but for its arrays."""
    tokens: npt.NDArray[np.int32]
    """(sum of P + T,) prompt and response of each."""
    log_probs: npt.NDArray[np.float32]
    """(sum of T,)"""
    lengths: list[tuple[int, int]]
    """(K,) P and T of each."""
    prompts: Sequence[SharedPrompts] = ()
    """Of those that the engine had to encode, for these rollouts or earlier ones."""


def pack_rollouts(finished: Finished, prompts: Sequence[SharedPrompts] = ()) -> PackedRollouts:
    """At least one rollout, with their numbers, for the way."""
    rollouts = [rollout for _, rollout in finished]
    return PackedRollouts(
        numbers=[number for number, _ in finished],
        fields=[{k: v for k, v in vars(r).items() if k not in ARRAYS} for r in rollouts],
        tokens=np.concatenate([x for r in rollouts for x in (r.prompt_token_ids, r.response_token_ids)]),
        log_probs=np.concatenate([r.log_probs for r in rollouts]),
        lengths=[(len(r.prompt_token_ids), len(r.response_token_ids)) for r in rollouts],
        prompts=prompts,
    )


def unpack_rollouts(packed: PackedRollouts) -> Finished:
    """The rollouts, whose arrays are parts of the packed ones: who keeps one keeps all of them."""
    finished = []
    start = first = 0
    for number, fields, (p, t) in zip(packed.numbers, packed.fields, packed.lengths, strict=True):
        middle, end, last = start + p, start + p + t, first + t
        parts = packed.tokens[start:middle], packed.tokens[middle:end], packed.log_probs[first:last]
        arrays: dict[str, Any] = dict(zip(ARRAYS, parts, strict=True))
        finished.append((number, Rollout(**fields, **arrays)))
        start, first = end, last
    return finished
