"""From text to scores: rules, user functions, penalties, and processes that survive what those do."""

from mssr.rewards.base import RewardInput, RewardResult
from mssr.rewards.scoring import ScoredBatch, Scorer, advice, check, names
from mssr.rewards.stream import ScoringStream

__all__ = [
    "RewardInput",
    "RewardResult",
    "ScoredBatch",
    "Scorer",
    "ScoringStream",
    "advice",
    "check",
    "names",
]
