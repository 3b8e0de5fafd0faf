"""From text to scores: rules, user functions, penalties, and processes that survive what those do.

`base` has what is scored and what comes of it; `extraction` finds the answer in a response. `latex`, `units`,
`symbolic` and `math_rule` decide whether two answers are the same mathematics, `choice` which options a text
chooses, and `rules` makes the named rewards of these. `functions` loads and calls them, and those of users,
which may ask for what is in `rows`; `penalties` take off a score. `worker` does this in processes of its own,
which `pool` keeps running for `scoring`. `servers` are the rewards that ask an `endpoint`, with `judge` one
of them.
"""

from mssr.rewards.base import RewardInput, RewardResult
from mssr.rewards.rows import RowAccess
from mssr.rewards.scoring import ScoredBatch, Scorer, ScoringStream, advice, check

__all__ = [
    "RewardInput",
    "RewardResult",
    "RowAccess",
    "ScoredBatch",
    "Scorer",
    "ScoringStream",
    "advice",
    "check",
]
