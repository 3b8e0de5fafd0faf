"""What is taken off a score for responses that are too long or repeat themselves.

A penalty is a number in [0, weight]. L is the length of a response in tokens, Lmax the longest one allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mssr.rewards.base import RewardInput, RewardResult

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig


def overlong_penalty(length: int, max_length: int, buffer: int, weight: float = 1.0) -> float:
    """Soft overlong punishment: 0 up to Lmax - buffer, then linear up to ``weight`` at Lmax and beyond.

    Source: DAPO, arXiv 2503.14476, eq. 13: -min(-(L - (Lmax - Lc)) / Lc, 0) with the buffer Lc.
    """
    return weight * min(max((length - (max_length - buffer)) / buffer, 0.0), 1.0)


def length_penalty(length: int, max_length: int, weight: float = 1.0) -> float:
    """``weight`` * L / Lmax, at most ``weight``."""
    return weight * min(length / max_length, 1.0)


def repetition_penalty(text: str, ngram: int, weight: float = 1.0) -> float:
    """``weight`` * the fraction of the text's word n-grams that stood in it before.

    Words are what white space separates. Of the five 2-grams in "a b a b a b" three stood before: 3/5.
    """
    words = text.split()
    count = len(words) - ngram + 1
    if count < 2:
        return 0.0
    distinct = len(set(zip(*(words[i : i + count] for i in range(ngram)), strict=True)))
    return weight * (1 - distinct / count)


def penalised(
    result: RewardResult, item: RewardInput, config: RewardConfig, max_length: int, clip: bool
) -> RewardResult:
    """The result less the configured penalties, which become parts, as does the score before them.

    Args:
        clip: take a score no lower than 0. One that is so by itself stays: the method is to refuse it.
    """
    taken: dict[str, float] = {}
    if config.overlong_buffer:
        taken["penalty_overlong"] = overlong_penalty(
            item.response_length, max_length, config.overlong_buffer, config.overlong_penalty
        )
    if config.length_penalty:
        taken["penalty_length"] = length_penalty(item.response_length, max_length, config.length_penalty)
    if config.repetition_penalty:
        taken["penalty_repetition"] = repetition_penalty(
            item.whole, config.repetition_ngram, config.repetition_penalty
        )
    if not taken:
        return result
    raw = result.score
    score = raw - sum(taken.values())
    parts = {"accuracy": raw, **result.parts, "score_raw": raw, **taken}
    return RewardResult(max(score, min(raw, 0.0)) if clip else score, parts)
