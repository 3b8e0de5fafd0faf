"""Reward functions by name or file, and the scoring of a batch that survives their errors."""

from __future__ import annotations

import difflib
import inspect
import logging
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from mssr import plugins
from mssr.errors import TrainingError, UserError
from mssr.rewards.base import RewardFunction, RewardResult
from mssr.rewards.exact_match import exact_match

_log = logging.getLogger(__name__)
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_F = TypeVar("_F", bound=RewardFunction)
_registry: dict[str, RewardFunction] = {"exact_match": exact_match}


def register(name: str) -> Callable[[_F], _F]:
    """Function decorator: make a reward available as ``name``; a later one replaces an earlier one.

    Raises:
        ValueError: The name has a colon, which is how a file is told from a name.
    """
    if plugins.is_spec(name):
        raise ValueError(f"the reward name {name!r} must not contain a colon")

    def add(function: _F) -> _F:
        _registry[name] = function
        return function

    return add


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_registry)


def resolve(name: str) -> RewardFunction:
    """The function called ``name``, or the one in ``path/to/file.py:function``, see `mssr.plugins`.

    Raises:
        UserError: No such name, file or function; the file does not run; the function cannot be
            called as ``function(response, answer)``.
    """
    if not plugins.is_spec(name):
        if name not in _registry:
            close = difflib.get_close_matches(name, _registry, n=1, cutoff=0.5)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise UserError(f"unknown reward {name!r}{hint}: one of {names()} or path/to/file.py:function")
        return _registry[name]
    function = plugins.load(name, "reward", noun="function")
    path, _, attribute = name.rpartition(":")
    if not callable(function):
        raise UserError(f"reward {name!r}: {path} has no function {attribute!r}")
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError as error:
        raise UserError(f"reward {name!r}: {attribute} must take (response, answer), but: {error}") from error
    except ValueError:
        pass  # a builtin without a signature
    return function


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The scores of B responses.

    Example: ``ScoredBatch(scores=[1, 0], parts={"format": [1, 1]}, errors=0)``
    """

    scores: npt.NDArray[np.float32]
    """(B,) finite; 0 where the function failed."""
    parts: dict[str, npt.NDArray[np.float32]]
    """(B,) for every part that any response had; 0 where a response lacks it."""
    errors: int
    """Responses on which the function raised or gave no usable score."""


class Scorer:
    """Scores batches with one reward function.

    It holds the function's name beside the function, so that another process can build the same one.

    Args:
        name: A registered name or ``path/to/file.py:function``.
        error_limit: The run stops when at least this fraction of a batch failed, in (0, 1]. The
            default stops only if every response failed: a parser that trips over most of an untrained
            model's responses is still a reward.
        min_batch: Smaller batches never stop the run.

    Raises:
        UserError: The function cannot be had, see `resolve`.
        ValueError: A number is out of its range.
    """

    def __init__(self, name: str, *, error_limit: float = 1.0, min_batch: int = 8) -> None:
        if not 0 < error_limit <= 1:
            raise ValueError(f"error_limit must be in (0, 1], not {error_limit}")
        if min_batch < 1:
            raise ValueError(f"min_batch must be >= 1, not {min_batch}")
        self.name = name
        self.error_limit = error_limit
        self.min_batch = min_batch
        self._function = resolve(name)
        self._error_logged = False

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> ScoredBatch:
        """Score B responses against B answers.

        A response on which the function raises, or gives NaN, an infinity or something that is no
        score, gets 0 and is counted; the first traceback of this scorer is logged.

        Raises:
            ValueError: The lengths differ.
            TrainingError: ``error_limit`` is reached.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses need as many answers, not {len(answers)}")
        results: list[RewardResult] = []
        errors, last_error = 0, ""
        for i, (response, answer) in enumerate(zip(responses, answers, strict=True)):
            try:
                results.append(_as_result(self._function(response, answer)))
            except Exception as error:
                results.append(RewardResult(0.0))
                errors += 1
                last_error = f"{type(error).__name__}: {error}"
                self._log_first(i, response)
        if len(responses) >= self.min_batch and errors >= self.error_limit * len(responses):
            raise TrainingError(
                f"the reward {self.name!r} failed on {errors} of {len(responses)} responses ({last_error})"
            )
        keys = sorted({key for result in results for key in result.parts})
        return ScoredBatch(
            scores=np.array([result.score for result in results], np.float32),
            parts={key: np.array([r.parts.get(key, 0.0) for r in results], np.float32) for key in keys},
            errors=errors,
        )

    def _log_first(self, i: int, response: str) -> None:
        if self._error_logged:
            return
        self._error_logged = True
        _log.warning(
            "reward %r failed on response %d (score 0; further failures are only counted): %.200r\n%s",
            self.name,
            i,
            response,
            traceback.format_exc(),
        )


def _as_result(value: object) -> RewardResult:
    """Whatever a reward function may return, checked: numbers that are finite in float32."""
    score: object = value
    parts: Mapping[str, object] = {}
    if isinstance(value, RewardResult):
        score, parts = value.score, value.parts
    elif isinstance(value, Mapping):
        if "score" not in value:
            raise ValueError(f"a reward's dict needs the key 'score', but has {sorted(map(str, value))}")
        score, parts = value["score"], {str(k): v for k, v in value.items() if k != "score"}
    return RewardResult(_number("score", score), {key: _number(key, part) for key, part in parts.items()})


def _number(key: str, value: object) -> float:
    if not isinstance(value, numbers.Real | np.bool_):  # bool, int and NumPy's scalars are among them
        raise TypeError(f"{key} must be a number, not {value!r:.100}")
    if not abs(float(value)) <= _FLOAT32_MAX:  # NaN fails too
        raise ValueError(f"{key} must be finite in float32, not {value}")
    return float(value)
