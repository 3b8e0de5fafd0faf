"""Rollouts on their way to the driver: two arrays for many of them.

To restore an array costs the driver about as much as the rest of a rollout, and it gets thousands a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mssr.rollout.queue import Finished
from mssr.types import Rollout

if TYPE_CHECKING:
    from mssr.cluster.shared_prompts import SharedPrompts


@dataclass(frozen=True)
class PackedRollouts:
    """K finished rollouts, what they have of tokens laid end to end. See `Rollout` for the rest."""

    numbers: list[int]
    prompt_ids: list[str]
    sample_indices: list[int]
    finish_reasons: list[str]
    policy_versions: list[int]
    texts: list[str]
    tokens: npt.NDArray[np.int32]
    """(sum of P + T,) prompt and response of each."""
    log_probs: npt.NDArray[np.float32]
    """(sum of T,)"""
    lengths: list[tuple[int, int]]
    """P and T of each."""
    prompts: Sequence[SharedPrompts] = ()
    """Of those that the engine had to encode, for these rollouts or earlier ones."""


def pack_rollouts(finished: Finished, prompts: Sequence[SharedPrompts] = ()) -> PackedRollouts:
    """At least one rollout, with their numbers, for the way."""
    rollouts = [rollout for _, rollout in finished]
    parts = [part for r in rollouts for part in (r.prompt_token_ids, r.response_token_ids)]
    return PackedRollouts(
        numbers=[number for number, _ in finished],
        prompt_ids=[r.prompt_id for r in rollouts],
        sample_indices=[r.sample_index for r in rollouts],
        finish_reasons=[r.finish_reason for r in rollouts],
        policy_versions=[r.policy_version for r in rollouts],
        texts=[r.text for r in rollouts],
        tokens=np.concatenate(parts),
        log_probs=np.concatenate([r.log_probs for r in rollouts]),
        lengths=[(len(r.prompt_token_ids), len(r.response_token_ids)) for r in rollouts],
        prompts=prompts,
    )


def unpack_rollouts(packed: PackedRollouts) -> Finished:
    """The rollouts, whose arrays are parts of the packed ones: who keeps one keeps all of them."""
    finished = []
    start = first = 0
    for k, (prompt_length, response_length) in enumerate(packed.lengths):
        middle, end = start + prompt_length, start + prompt_length + response_length
        rollout = Rollout(
            prompt_id=packed.prompt_ids[k],
            sample_index=packed.sample_indices[k],
            prompt_token_ids=packed.tokens[start:middle],
            response_token_ids=packed.tokens[middle:end],
            log_probs=packed.log_probs[first : first + response_length],
            finish_reason=packed.finish_reasons[k],
            policy_version=packed.policy_versions[k],
            text=packed.texts[k],
        )
        finished.append((packed.numbers[k], rollout))
        start, first = end, first + response_length
    return finished
