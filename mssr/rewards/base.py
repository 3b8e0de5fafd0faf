"""What is scored, and what comes of it.

Without slots, with which pickling would run Python for every one of thousands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RewardInput:
    """One response to score. Example: ``RewardInput("<think></think>\\\\boxed{8}", "8", 14)``"""

    response: str
    """The model's text, without special tokens."""
    answer: Any
    """The row's ground truth; text, or for a user's function the cell as the data has it."""
    response_length: int
    """Tokens of the response, the end token included."""
    prompt_id: str = ""
    """Which row of the data, for functions that ask for what is in it."""


@dataclass(frozen=True)
class RewardResult:
    """The score of one response. Example: ``RewardResult(1.0, {"accuracy": 1.0, "format": 1.0})``"""

    score: float
    """What the algorithm learns from: finite; in [0, 1] for the methods with a Beta baseline."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named numbers that are only reported, finite."""


@dataclass(frozen=True)
class Failure:
    """A response that got no score. Example: ``Failure("no score within 10 s", timeout=True)``"""

    reason: str
    """One line."""
    traceback: str = ""
    """Of the exception, if there was one."""
    timeout: bool = False
    """Whether the time limit ended it."""


Outcome = RewardResult | Failure
