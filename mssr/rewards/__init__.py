"""From text to scores: rules, user functions, penalties, and processes that survive what those do."""

from mssr.rewards.base import RewardInput, RewardResult
from mssr.rewards.rows import RowAccess
from mssr.rewards.scoring import ScoredBatch, Scorer, ScoringStream, advice, check, names

__all__ = [
    "RewardInput",
    "RewardResult",
    "RowAccess",
    "ScoredBatch",
    "Scorer",
    "ScoringStream",
    "advice",
    "check",
    "names",
]
