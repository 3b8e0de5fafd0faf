"""What a reward function takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RewardResult:
    """The score of one response. Example: ``RewardResult(1.0, {"accuracy": 1.0, "format": 1.0})``"""

    score: float
    """What the algorithm learns from: finite; in [0, 1] for the methods with a Beta baseline."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named numbers that are only reported, finite."""


class RewardFunction(Protocol):
    """A response's text and the row's answer in, a score out: a number, a result, or a dict.

    A dict needs the key ``score``; its other entries are the parts. The function is called in any
    order and possibly in several processes, so it must not depend on earlier calls.
    """

    def __call__(self, response: str, answer: str, /) -> float | RewardResult | Mapping[str, float]: ...
