"""Rollouts -> the ragged batch that the ranks work on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mssr.types import Rollout, TrainBatch


def make_batch(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    token_advantages: np.ndarray | None = None,
    old_log_probs: np.ndarray | None = None,
    reference_log_probs: np.ndarray | None = None,
    kl_coef: float = 0.0,
) -> TrainBatch:
    """Rollouts laid end to end."""
    tokens = [part for r in rollouts for part in (r.prompt_token_ids, r.response_token_ids)]
    lengths = [len(r.prompt_token_ids) + len(r.response_token_ids) for r in rollouts]
    return TrainBatch(
        prompt_ids=tuple(r.prompt_id for r in rollouts),
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt_lengths=np.array([len(r.prompt_token_ids) for r in rollouts], dtype=np.int64),
        advantages=advantages,
        engine_log_probs=np.concatenate([r.log_probs for r in rollouts]),
        token_advantages=token_advantages,
        old_log_probs=old_log_probs,
        reference_log_probs=reference_log_probs,
        kl_coef=kl_coef,
    )
