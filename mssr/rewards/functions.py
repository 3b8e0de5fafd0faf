"""Reward functions in all their forms: found, called, and what they return made one thing.

A user's function is named ``path/to/file.py:function``; docs/data.md says what it may take and return. It is
called in any order and in several processes, so it must not depend on earlier calls. Each process loads its
file.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mssr.algorithms import plugins
from mssr.errors import UserError, did_you_mean
from mssr.rewards.base import RewardInput, RewardResult
from mssr.rewards.binding import Binding, Getter, bind
from mssr.rewards.rows import NO_ROWS, RowAccess, RowView
from mssr.rewards.rules import RULES, score

if TYPE_CHECKING:
    from mssr.config.data import RewardConfig

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class LoadedReward:
    """A reward function as the pool calls it.

    Args:
        function: with its options bound.
        binding: what it is given; ``batch`` functions take several items and give a list.
        access: the rows, if it asks for them.
    """

    def __init__(self, function: Callable[..., Any], binding: Binding, access: RowAccess) -> None:
        self.binding = binding
        self.batch = binding.batch
        self.is_async = _is_async(function)
        self._function, self._access = function, access

    def call(self, items: Sequence[RewardInput]) -> list[RewardResult]:
        """Score items (one unless ``batch``); whatever the function raises comes through.

        Raises:
            TypeError, ValueError: it returned something that is no score, or not as many as items.
        """
        value = self._call(items)
        if inspect.isawaitable(value):
            value = self.loop.run_until_complete(value)
        if not self.batch:
            return [as_result(value)]
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise TypeError(f"a reward of many responses must return a list, not {value!r:.100}")
        results = [as_result(v) for v in value]
        if len(results) != len(items):
            raise ValueError(f"{len(results)} scores were returned for {len(items)} responses")
        return results

    async def call_async(self, item: RewardInput) -> RewardResult:
        """Score one item with a function that is async and takes one."""
        return as_result(await self._call([item]))

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The only one of this process: a user's client may be bound to it."""
        return asyncio.new_event_loop()

    def _call(self, items: Sequence[RewardInput]) -> Any:
        views = [RowView(item, self._access) for item in items]

        def values(get: Getter) -> Any:
            return [get(view) for view in views] if self.batch else get(views[0])

        named = {name: values(get) for name, get in self.binding.named.items()}
        return self._function(*map(values, self.binding.positional), **named)


def load(config: RewardConfig, access: RowAccess | None = NO_ROWS) -> LoadedReward:
    """The reward that ``config.name`` and ``config.options`` mean.

    Args:
        access: the rows that there are; None if that is not known yet, when any name may be a column's.

    Raises:
        UserError: no such name, file or function; the file does not run; the function takes other
            arguments, or not these options.
    """
    name, options = config.name, config.options
    function: Callable[..., Any]
    if plugins.is_spec(name):
        function = plugins.load(name, "reward", noun="function")
        path, _, attribute = name.rpartition(":")
        if not callable(function):
            raise UserError(f"reward {name!r}: {path} has no function {attribute!r}")
        try:
            binding = bind(function, options, access)
        except ValueError as error:
            raise UserError(f"reward {name!r}: {attribute} {error}") from None
        known = binding.options
    elif name in RULES:
        function = functools.partial(score, name, format=config.format, format_weight=config.format_weight)
        binding = bind(function, {}, NO_ROWS)
        known = dict.fromkeys([*inspect.signature(RULES[name]).parameters][2:], False)
    else:
        raise UserError(
            f"reward.name: unknown reward {name!r}{did_you_mean(name, RULES)}: one of {sorted(RULES)} or "
            "path/to/file.py:function"
        )
    for key in options:
        if key not in known and not ("**" in known and key.isidentifier()):
            names = ", ".join(k for k in known if k != "**") or "none"
            raise UserError(
                f"reward.options.{key} is no option of {name} (it takes {names}){did_you_mean(key, known)}"
            )
    if missing := [n for n, required in known.items() if required and n not in options]:
        hint = " or have a column of that name" if access is not None and access.sources else ""
        raise UserError(
            f"reward {name!r}: {attribute} needs {', '.join(missing)}; set reward.options.{missing[0]}{hint}"
        )
    return LoadedReward(functools.partial(function, **options), binding, access or NO_ROWS)


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


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))  # an object's call
