"""What is scored, and what comes of it.

Without slots, with which pickling would run Python for every one of thousands.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RewardInput:
    """One response to score. Example: ``RewardInput("<think></think>\\\\boxed{8}", "8", 14)``"""

    response: str
    """The model's text, as it was generated but without special tokens."""
    answer: Any
    """The row's ground truth; text, or for a user's function the cell as the data has it."""
    response_length: int
    """Tokens of the response, the end token included."""
    prompt_id: str = ""
    """Which row of the data, for functions that ask for what is in it."""
    prefix: str = ""
    """What stands in the prompt and belongs to the response, which the named rules see before it."""

    @property
    def whole(self) -> str:
        """The response with what belongs to it."""
        return self.prefix + self.response


@dataclass(frozen=True)
class RewardResult:
    """The score of one response. Example: ``RewardResult(1.0, {"accuracy": 1.0, "format": 1.0})``"""

    score: float
    """What the algorithm learns from: finite; in [0, 1] for the methods with a Beta baseline."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named numbers that are only reported; finite."""


@dataclass(frozen=True)
class Failure:
    """A response that could not be scored. Example: ``Failure("no score within 10 s", timeout=True)``"""

    reason: str
    """One line."""
    traceback: str = ""
    """Of the exception, if there was one."""
    timeout: bool = False
    """Whether the time limit ended it."""
    unscored: bool = False
    """Whether it has no score, which says nothing of the response, and is left out. Else it scores 0."""


Outcome = RewardResult | Failure
NONE = Failure("it gave None", unscored=True)
"""Of a function of TRL's that has nothing to say of a response."""


def as_result(value: object) -> RewardResult:
    """Whatever a reward function may return for one response, checked.

    Raises:
        TypeError, ValueError: it is no number that is finite in float32, or a dict without a score.
    """
    value = _single(value)
    parts: Mapping[str, object] = {}
    if isinstance(value, RewardResult):
        parts, value = value.parts, value.score
    elif isinstance(value, Mapping):
        key = next((k for k in ("score", "overall") if k in value), None)
        if key is None:
            raise ValueError(
                f"a reward's dict needs the key 'score' or 'overall', but has {sorted(map(str, value))}"
            )
        parts = {str(k): n for k, v in value.items() if k != key and _is_number(n := _single(v))}
        value = _single(value[key])
    return RewardResult(_number("score", value), {key: _number(key, part) for key, part in parts.items()})


def combined(outcomes: Sequence[tuple[str, float, Outcome]]) -> Outcome:
    """What several rewards say of one response together: label, weight and outcome of each.

    The score is the weighted sum; of those that are `NONE` it is the sum without them. Any other failure is
    one of the whole. Parts are the score of each that gave one under its label, and its own as
    ``label/part``; one without a label is a sum already.
    """
    failures = [o for _, _, o in outcomes if isinstance(o, Failure) and o != NONE]
    if failures:
        return min(failures, key=lambda failure: failure.unscored)
    score, parts, found = 0.0, dict[str, float](), False
    for label, weight, outcome in outcomes:
        if isinstance(outcome, RewardResult):
            score, found = score + weight * outcome.score, True
            parts |= {f"{label}/{key}" if label else key: part for key, part in outcome.parts.items()}
            parts |= {label: outcome.score} if label else {}
    return RewardResult(score, parts) if found else NONE


def _single(value: object) -> object:
    """What a list or an iterator of one holds; a scalar of torch or NumPy as Python's."""
    if isinstance(value, Iterator):
        value = list(value)
    if isinstance(value, list | tuple) and len(value) == 1:
        return _single(value[0])
    if hasattr(value, "shape") and hasattr(value, "item") and math.prod(value.shape) == 1:
        return value.item()
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real | np.bool_)  # bool, int and NumPy's scalars are among them


def _number(key: str, value: object) -> float:
    if not _is_number(value):
        raise TypeError(f"{key} must be a number, not {value!r:.100}")
    number = float(value)  # type: ignore[arg-type]
    if not abs(number) <= _FLOAT32_MAX:  # NaN fails too
        raise ValueError(f"{key} must be finite in float32, not {value}")
    return number
