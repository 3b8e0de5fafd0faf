"""Reward functions in all their forms: found, called, and what they return made one thing.

A user's function is named ``path/to/file.py:function``; `mssr.rewards.binding` says what it is given. It may
be ``async def``. Each response gets a number, a scalar of NumPy or torch, a list of one of these, a
`RewardResult`, or a dict with ``score`` or ``overall``, whose other numbers are the parts that the metrics
show as ``reward/<part>`` (what is no number is left out). A function of a batch returns a list of them, an
array, or yields them.

The function is called in any order and in several processes, so it must not depend on earlier calls. Each
process loads its file.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mssr.algorithms import plugins
from mssr.errors import UserError
from mssr.rewards.base import RewardInput, RewardResult
from mssr.rewards.binding import Binding, bind
from mssr.rewards.rows import NO_ROWS, RowAccess, RowReader

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_IN_PLACE = bind(lambda response, answer, /: 0.0, {}, None)
"""(response, answer)."""


class LoadedReward:
    """A reward function as the pool calls it.

    Args:
        function: with its options bound.
        binding: what it is given; ``batch`` functions take several items and give a list.
        reader: of the rows, if it asks for them.
    """

    def __init__(
        self, function: Callable[..., Any], binding: Binding, reader: RowReader | None = None
    ) -> None:
        self.binding = binding
        self.batch = binding.batch
        self.is_async = _is_async(function)
        self._function = function
        self._reader = reader
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
        positional, named = self.binding.arguments(items, self._reader)
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


def load(
    config: RewardConfig, access: RowAccess | None = NO_ROWS, reader: RowReader | None = None
) -> LoadedReward:
    """The reward that ``config.name`` and ``config.options`` mean.

    Args:
        access: the rows that there are; None if that is not known yet, when any name may be a column's.
        reader: of the rows in place of ``access``, for a function that asks for them and is to be called.

    Raises:
        UserError: no such name, file or function; the file does not run; the function takes other
            arguments, or not these options.
    """
    if plugins.is_spec(config.name):
        return _load_file(config.name, dict(config.options), reader.access if reader else access, reader)
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
    value = _single(value)
    if isinstance(value, RewardResult):
        parts: Mapping[str, object] = value.parts
        score: object = value.score
    elif isinstance(value, Mapping):
        key = next((k for k in ("score", "overall") if k in value), None)
        if key is None:
            raise ValueError(
                f"a reward's dict needs the key 'score' or 'overall', but has {sorted(map(str, value))}"
            )
        score = _single(value[key])
        parts = {str(k): n for k, v in value.items() if k != key and _is_number(n := _single(v))}
    else:
        score, parts = value, {}
    return RewardResult(_number("score", score), {key: _number(key, part) for key, part in parts.items()})


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


def _load_rule(config: RewardConfig) -> LoadedReward:
    from mssr.rewards import rules

    name, known = config.name, rule_names()
    if name not in rules.RULES:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"reward.name: unknown reward {name!r}{hint}: one of {known} or path/to/file.py:function"
        )
    keywords = list(inspect.signature(rules.RULES[name]).parameters)[2:]
    _check_options(name, config.options, dict.fromkeys(keywords, False))
    bound = functools.partial(
        rules.score, name, format=config.format, format_weight=config.format_weight, **config.options
    )
    return LoadedReward(bound, _IN_PLACE)


def _load_file(
    name: str, options: dict[str, Any], access: RowAccess | None, reader: RowReader | None
) -> LoadedReward:
    function = plugins.load(name, "reward", noun="function")
    path, _, attribute = name.rpartition(":")
    if not callable(function):
        raise UserError(f"reward {name!r}: {path} has no function {attribute!r}")
    try:
        inspect.signature(function)
    except ValueError:  # a builtin without
        function = _in_place(function)
    try:
        binding = bind(function, options, access)
    except ValueError as error:
        raise UserError(f"reward {name!r}: {attribute} {error}") from None
    _check_options(name, options, binding.options)
    missing = [n for n, required in binding.options.items() if required and n not in options]
    if missing:
        hint = " or have a column of that name" if access is not None and access.sources else ""
        raise UserError(
            f"reward {name!r}: {attribute} needs {', '.join(missing)}; set reward.options.{missing[0]}{hint}"
        )
    return LoadedReward(functools.partial(function, **options), binding, reader)


def _check_options(name: str, options: Mapping[str, Any], known: Mapping[str, bool]) -> None:
    for key in options:
        if key in known or ("**" in known and key.isidentifier()):
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]}?" if close else ""
        names = ", ".join(k for k in known if k != "**") or "none"
        raise UserError(f"reward.options.{key} is no option of {name} (it takes {names}){hint}")


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda response, answer, **options: function(response, answer, **options)


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 (an object whose call is async)
    )


async def _wait_for(value: Awaitable[object]) -> object:
    return await value
