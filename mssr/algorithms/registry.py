"""Algorithms by name, or from a user's file: the only place that knows which there are."""

from __future__ import annotations

import inspect
from typing import Any

from mssr.algorithms.base import Algorithm
from mssr.algorithms.plugins import Registry


def _check(cls: Any, called: str) -> None:
    """A method is a class whose ``__init__`` takes keywords with defaults only: the options of a config."""
    if not (isinstance(cls, type) and issubclass(cls, Algorithm)):
        raise ValueError(f"{called} is not a subclass of mssr.algorithms.Algorithm")
    if inspect.isabstract(cls):
        raise ValueError(f"{called} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    for option in inspect.signature(cls).parameters.values():
        if option.default is option.empty or option.kind is option.POSITIONAL_ONLY:
            raise ValueError(f"option {option.name!r} of {called} must be a keyword with a default")


ALGORITHMS: Registry[type[Algorithm]] = Registry("algorithm", "class", _check)

register, names, get, options = ALGORITHMS.register, ALGORITHMS.names, ALGORITHMS.get, ALGORITHMS.options


def create(name: str, **settings: Any) -> Algorithm:
    """Build an algorithm, for example ``create("mssr", kl_target=0.02)``."""
    algorithm: Algorithm = ALGORITHMS.bind(name, settings)()
    return algorithm
