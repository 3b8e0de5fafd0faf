"""From text to scores: exact match, user functions, and scoring that survives their errors."""

from mssr.rewards.base import RewardFunction, RewardResult
from mssr.rewards.scoring import ScoredBatch, Scorer, names, register, resolve

__all__ = [
    "RewardFunction",
    "RewardResult",
    "ScoredBatch",
    "Scorer",
    "names",
    "register",
    "resolve",
]
