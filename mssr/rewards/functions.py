"""Reward functions in all their forms: found, recognised, called, and what they return made one thing.

A user's function is named ``path/to/file.py:function``. Its form is told from the names of its parameters:

    f(response, answer)               one response; any two names will do
    f(responses, answers)             a list of responses and a list of answers: both names end in "s"
    compute_score(reward_input)       EasyR1: a dict of response, response_length and ground_truth
    compute_score(reward_inputs)      EasyR1: a list of such dicts

Each may be ``async def``. Further parameters are options, set by ``reward.options``; one without a default
must be set. A parameter ``response_length`` (``response_lengths`` of the second form) gets the length in
tokens. Each response gets a number, a `RewardResult`, or a dict with ``score`` or ``overall``, whose other
entries are the parts that the metrics show as ``reward/<part>``. The forms that take lists return a list.

The function is called in any order and in several processes, so it must not depend on earlier calls. Its
file is loaded once and the processes are forked from there: threads and connections are to be made in the
function, not at import.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
import numbers
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mssr import plugins
from mssr.errors import UserError
from mssr.rewards.base import RewardInput, RewardResult

if TYPE_CHECKING:
    from mssr.data_config import RewardConfig

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_Arguments = Callable[[Sequence[RewardInput]], tuple[tuple[Any, ...], dict[str, Any]]]


class LoadedReward:
    """A reward function as the pool calls it.

    Args:
        function: with its options bound.
        arguments: of a call, from the items; one item unless ``batch``.
        batch: whether a call takes several items and gives a list.
    """

    def __init__(self, function: Callable[..., Any], arguments: _Arguments, *, batch: bool = False) -> None:
        self.batch = batch
        self.is_async = _is_async(function)
        self._function = function
        self._arguments = arguments
        self._runner: asyncio.Runner | None = None

    def call(self, items: Sequence[RewardInput]) -> list[RewardResult]:
        """Score items (one unless ``batch``); whatever the function raises comes through.

        Raises:
            TypeError, ValueError: it returned something that is no score, or not as many as items.
        """
        value = self._call(items)
        if inspect.isawaitable(value):
            value = self.run(_wait_for(value))
        return self._results(value, len(items))

    async def call_async(self, item: RewardInput) -> RewardResult:
        """Score one item with a function that is async and takes one."""
        return self._results(await self._call([item]), 1)[0]

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the one event loop of this process, which a user's client may be bound to."""
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(coroutine)

    def _call(self, items: Sequence[RewardInput]) -> Any:
        positional, named = self._arguments(items)
        return self._function(*positional, **named)

    def _results(self, value: object, count: int) -> list[RewardResult]:
        if not self.batch:
            return [as_result(value)]
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise TypeError(f"a reward of many responses must return a list, not {value!r:.100}")
        results = [as_result(v) for v in value]
        if len(results) != count:
            raise ValueError(f"{len(results)} scores were returned for {count} responses")
        return results


def load(config: RewardConfig) -> LoadedReward:
    """The reward that ``config.name`` and ``config.options`` mean.

    Raises:
        UserError: no such name, file or function; the file does not run; the function takes other
            arguments, or not these options.
    """
    if plugins.is_spec(config.name):
        return _load_file(config.name, dict(config.options))
    return _load_rule(config)


def rule_names() -> list[str]:
    """Rewards that need no file, sorted."""
    from mssr.rewards import rules

    return sorted(rules.RULES)


def as_result(value: object) -> RewardResult:
    """Whatever a reward function may return for one response, checked.

    Raises:
        TypeError, ValueError: it is no number that is finite in float32, or a dict without a score.
    """
    score: object = value
    parts: Mapping[str, object] = {}
    if isinstance(value, RewardResult):
        score, parts = value.score, value.parts
    elif isinstance(value, Mapping):
        key = next((k for k in ("score", "overall") if k in value), None)
        if key is None:
            raise ValueError(
                f"a reward's dict needs the key 'score' or 'overall', but has {sorted(map(str, value))}"
            )
        score = value[key]
        parts = {str(k): v for k, v in value.items() if k != key and v is not None}
    return RewardResult(_number("score", score), {key: _number(key, part) for key, part in parts.items()})


def _number(key: str, value: object) -> float:
    if not isinstance(value, numbers.Real | np.bool_):  # bool, int and NumPy's scalars are among them
        raise TypeError(f"{key} must be a number, not {value!r:.100}")
    if not abs(float(value)) <= _FLOAT32_MAX:  # NaN fails too
        raise ValueError(f"{key} must be finite in float32, not {value}")
    return float(value)


def _load_rule(config: RewardConfig) -> LoadedReward:
    from mssr.rewards import rules

    name, known = config.name, rule_names()
    if name not in rules.RULES:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"reward.name: unknown reward {name!r}{hint}: one of {known} or path/to/file.py:function"
        )
    _check_options(name, config.options, _options(rules.RULES[name], taken=2))
    bound = functools.partial(
        rules.score, name, format=config.format, format_weight=config.format_weight, **config.options
    )
    return LoadedReward(bound, _text_arguments())


def _load_file(name: str, options: dict[str, Any]) -> LoadedReward:
    function = plugins.load(name, "reward", noun="function")
    path, _, attribute = name.rpartition(":")
    if not callable(function):
        raise UserError(f"reward {name!r}: {path} has no function {attribute!r}")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin without a signature
        return LoadedReward(functools.partial(function, **options), _text_arguments())
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]
    first = positional[0] if positional else ""
    length = None
    if first in ("reward_input", "reward_inputs"):
        taken, batch = 1, first == "reward_inputs"
        arguments = _dict_arguments(batch)
    else:
        if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise UserError(
                f"reward {name!r}: {attribute} must take (response, answer), (responses, answers), "
                f"(reward_input) or (reward_inputs), not ({', '.join(p.name for p in parameters)})"
            )
        taken = 2
        batch = len(positional) > 1 and all(n.endswith("s") for n in positional[:2])
        wanted = "response_lengths" if batch else "response_length"
        length = wanted if wanted in {p.name for p in parameters[taken:]} else None
        arguments = _text_arguments(length, batch)
    known = {k: required for k, required in _options(function, taken).items() if k != length}
    _check_options(name, options, known)
    missing = [n for n, required in known.items() if required and n not in options]
    if missing:
        raise UserError(
            f"reward {name!r}: {attribute} needs {', '.join(missing)}; set reward.options.{missing[0]}"
        )
    return LoadedReward(functools.partial(function, **options), arguments, batch=batch)


def _options(function: Callable[..., Any], taken: int) -> dict[str, bool]:
    """Parameters that ``reward.options`` may set -> whether it must; ``**`` stands for any.

    Args:
        taken: how many positional parameters get the response and the answer.
    """
    options: dict[str, bool] = {}
    for i, p in enumerate(inspect.signature(function).parameters.values()):
        if p.kind is p.VAR_KEYWORD:
            options["**"] = False
        elif p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and i >= taken):
            options[p.name] = p.default is p.empty
    return options


def _check_options(name: str, options: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    for key in options:
        if key in known or ("**" in known and key.isidentifier()):
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]}?" if close else ""
        names = ", ".join(k for k in known if k != "**") or "none"
        raise UserError(f"reward.options.{key} is no option of {name} (it takes {names}){hint}")


def _text_arguments(length: str | None = None, batch: bool = False) -> _Arguments:
    """Arguments (response, answer), or lists of them; ``length`` is the keyword that gets the lengths."""

    def arguments(items: Sequence[RewardInput]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        columns = [i.response for i in items], [i.answer for i in items], [i.response_length for i in items]
        responses, answers, lengths = columns if batch else [column[0] for column in columns]
        return (responses, answers), {} if length is None else {length: lengths}

    return arguments


def _dict_arguments(batch: bool) -> _Arguments:
    """EasyR1's argument: a dict for each response."""

    def arguments(items: Sequence[RewardInput]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = [
            {"response": i.response, "response_length": i.response_length, "ground_truth": i.answer}
            for i in items
        ]
        return (rows if batch else rows[0],), {}

    return arguments


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 (an object whose call is async)
    )


async def _wait_for(value: Awaitable[object]) -> object:
    return await value
