"""Benchmarks by name: registered ones, a class in a user's file, or any data in the project's own form."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mssr.algorithms import plugins
from mssr.errors import UserError
from mssr.evaluation.base import Benchmark

_B = TypeVar("_B", bound=type[Benchmark])
_registry: dict[str, type[Benchmark]] = {}


def register(name: str) -> Callable[[_B], _B]:
    """Class decorator: make a `Benchmark`, which is built without arguments, available by a name.

    A new benchmark is a file with such a class, and a line in ``benchmarks/__init__.py``.

    Raises:
        ValueError: the name is taken, or could be the name of data (it has a colon, ``@``, ``/`` or dot).
    """
    if plugins.is_spec(name) or _is_data(name):
        raise ValueError(f"the benchmark name {name!r} must not contain a colon, '@', '/' or '.'")

    def add(cls: _B) -> _B:
        if name in _registry and _registry[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"the benchmark name {name!r} is taken by {_registry[name].__name__}")
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def names() -> list[str]:
    """All registered names, sorted."""
    _load_builtin()
    return sorted(_registry)


def get(name: str) -> Benchmark:
    """The benchmark called ``name``.

    Args:
        name: a registered name; ``path/to/file.py:Class`` (see `mssr.algorithms.plugins`); or a source of
            data in the project's own form (a file, a directory, ``hub/name@split``, see
            `mssr.data.sources`), which is scored by the default rule of `own.Own`.

    Raises:
        UserError: no such name, with the nearest; or the file or class cannot be had.
    """
    _load_builtin()
    if name in _registry:
        return _registry[name]()
    if plugins.is_spec(name) and name.rpartition(":")[0].endswith(".py"):
        return _from_file(name)
    if _is_data(name) or Path(name).exists():
        from mssr.evaluation.own import Own

        return Own(name)
    close = difflib.get_close_matches(name, _registry, n=1, cutoff=0.5)
    hint = f", did you mean {close[0]!r}?" if close else ""
    raise UserError(
        f"unknown benchmark {name!r}{hint}: one of {', '.join(sorted(_registry))}, path/to/file.py:Class, "
        "or data such as my.parquet or hub/name@split"
    )


def _from_file(name: str) -> Benchmark:
    cls = plugins.load(name, "benchmark", noun="class")
    if not (isinstance(cls, type) and issubclass(cls, Benchmark)):
        raise UserError(f"benchmark {name!r} is no subclass of mssr.evaluation.base.Benchmark")
    try:
        benchmark = cls()
    except TypeError as error:
        raise UserError(f"benchmark {name!r} cannot be built without arguments ({error})") from error
    if not cls.name:
        cls.name = name
    return benchmark


def _is_data(name: str) -> bool:
    return any(c in name for c in "@/.")


def _load_builtin() -> None:
    from mssr.evaluation import benchmarks

    assert benchmarks
