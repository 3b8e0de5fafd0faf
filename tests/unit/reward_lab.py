"""Reward functions of a test's own, and batches that they score in processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mssr.config.data import RewardConfig
from mssr.rewards import RewardInput, ScoredBatch, Scorer


def write(folder: Path, body: str) -> str:
    """The name of the function ``f`` of a file with this content."""
    path = folder / "reward.py"
    path.write_text(body + "\n")
    return f"{path}:f"


def inputs(*responses: str) -> list[RewardInput]:
    return [RewardInput(response, "", 1) for response in responses]


def score(
    name: str, items: list[RewardInput], max_length: int = 10, clip: bool = False, **config: Any
) -> ScoredBatch:
    """By a scorer made for the occasion."""
    with Scorer(RewardConfig(**{"name": name, "workers": 1, **config}), max_length, clip=clip) as scorer:
        return scorer.score(items)
