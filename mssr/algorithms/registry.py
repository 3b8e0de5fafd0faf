"""Algorithms by name, or from a user's file: the only place that knows which there are."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from mssr.algorithms import plugins
from mssr.algorithms.base import Algorithm
from mssr.errors import UserError

_A = TypeVar("_A", bound=type[Algorithm])
_registry: dict[str, type[Algorithm]] = {}


def register(name: str) -> Callable[[_A], _A]:
    """Class decorator: make an `Algorithm` available as ``algorithm.name``.

    Every parameter of its ``__init__`` must be an explicit keyword with a default: they are the
    options that a config may set.

    Raises:
        ValueError: The name is taken or has a colon, or an option has no default.
    """
    if plugins.is_spec(name):
        raise ValueError(f"the algorithm name {name!r} must not contain a colon")

    def add(cls: _A) -> _A:
        if name in _registry and _registry[name].__qualname__ != cls.__qualname__:
            # The same class again is a notebook cell that was run twice, or a module reload.
            raise ValueError(f"the algorithm name {name!r} is taken by {_registry[name].__name__}")
        _check_options(cls)
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def names() -> list[str]:
    """All names, sorted."""
    return sorted(_registry)


def get(name: str) -> type[Algorithm]:
    """The class called ``name``, or the one in ``path/to/file.py:Class``, see `mssr.algorithms.plugins`.

    What its class attributes say (``default_n``, ``aggregation`` and the like) needs no instance. A class
    from a file need not be registered; if it is not, its name is ``path/to/file.py:Class``.

    Raises:
        ValueError: No such name; the nearest and all names are given.
        UserError: The file or the class cannot be had, or the class is no `Algorithm` whose options
            all have defaults.
    """
    if not plugins.is_spec(name):
        if name not in _registry:
            raise ValueError(
                f"unknown algorithm {name!r}{_did_you_mean(name, _registry)}:"
                f" one of {names()} or path/to/file.py:Class"
            )
        return _registry[name]
    cls = plugins.load(name, "algorithm", noun="class")
    what, attribute = f"algorithm {name!r}", name.rpartition(":")[2]
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise UserError(f"{what}: {attribute} is not a subclass of mssr.algorithms.Algorithm")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise UserError(f"{what}: {attribute} does not define {missing}")
    try:
        _check_options(cls)
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error
    if _registry.get(cls.name) is not cls:
        cls.name = name
    return cls


def options(name: str) -> dict[str, Any]:
    """The options of an algorithm and their defaults, in the order of its signature.

    Raises:
        ValueError: As `get`.
    """
    return {option.name: option.default for option in _parameters(get(name))}


def create(name: str, **settings: Any) -> Algorithm:
    """Build an algorithm, for example ``create("mssr", kl_target=0.02)``.

    Raises:
        ValueError: As `get`; or there is no such option, or a value is out of its range.
    """
    known = options(name)
    for option in settings:
        if option not in known:
            raise ValueError(
                f"algorithm {name!r} has no option {option!r}{_did_you_mean(option, known)}:"
                f" it takes {list(known) or 'none'}"
            )
    return get(name)(**settings)


def _check_options(cls: type[Algorithm]) -> None:
    for option in _parameters(cls):
        if option.default is option.empty or option.kind is option.POSITIONAL_ONLY:
            raise ValueError(f"option {option.name!r} of {cls.__name__} must be a keyword with a default")


def _parameters(cls: type[Algorithm]) -> list[inspect.Parameter]:
    return list(inspect.signature(cls).parameters.values())


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
