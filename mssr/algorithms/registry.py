"""Algorithms by name: the only place that knows which there are."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mssr.algorithms.base import Algorithm

_A = TypeVar("_A", bound=type[Algorithm])
_registry: dict[str, type[Algorithm]] = {}


def register(name: str) -> Callable[[_A], _A]:
    """Class decorator: make an `Algorithm` available as ``algorithm.name``.

    Every parameter of its ``__init__`` must be an explicit keyword with a default: they are the
    options that a config may set.

    Raises:
        ValueError: The name is taken, or an option has no default.
    """

    def add(cls: _A) -> _A:
        if name in _registry and _registry[name].__qualname__ != cls.__qualname__:
            # The same class again is a notebook cell that was run twice, or a module reload.
            raise ValueError(f"the algorithm name {name!r} is taken by {_registry[name].__name__}")
        for option in _parameters(cls):
            if option.default is option.empty or option.kind is option.POSITIONAL_ONLY:
                raise ValueError(f"option {option.name!r} of {cls.__name__} must be a keyword with a default")
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def names() -> list[str]:
    """All names, sorted."""
    return sorted(_registry)


def get(name: str) -> type[Algorithm]:
    """The class called ``name``: its ``default_n``, ``min_n`` and ``shapes_entropy`` need no instance.

    Raises:
        ValueError: No such name; the nearest and all names are given.
    """
    if name not in _registry:
        raise ValueError(f"unknown algorithm {name!r}{_did_you_mean(name, _registry)}: one of {names()}")
    return _registry[name]


def options(name: str) -> dict[str, Any]:
    """The options of an algorithm and their defaults, in the order of its signature.

    Raises:
        ValueError: No such name.
    """
    return {option.name: option.default for option in _parameters(get(name))}


def create(name: str, **settings: Any) -> Algorithm:
    """Build an algorithm, for example ``create("mssr", kl_target=0.02)``.

    Raises:
        ValueError: No such name, no such option, or a value out of its range.
    """
    known = options(name)
    for option in settings:
        if option not in known:
            raise ValueError(
                f"algorithm {name!r} has no option {option!r}{_did_you_mean(option, known)}:"
                f" it takes {list(known) or 'none'}"
            )
    return get(name)(**settings)


def _parameters(cls: type[Algorithm]) -> list[inspect.Parameter]:
    return list(inspect.signature(cls).parameters.values())


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
