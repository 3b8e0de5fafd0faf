"""Benchmarks by name: registered ones, a class in a user's file, or any data in the project's own form."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mssr.algorithms import plugins
from mssr.algorithms.plugins import Registry
from mssr.config.data import DataConfig, RewardConfig
from mssr.errors import UserError
from mssr.evaluation.base import Benchmark
from mssr.evaluation.own import Own

_B = TypeVar("_B", bound=type[Benchmark])

BUILTIN = ("geometry3k", "hallusionbench", "mathverse", "mathvista", "mmk12", "r1_onevision")
"""Each is registered by the module of this name in `mssr.evaluation.benchmarks`, imported when asked for."""
DATA_MARKS = "@/."
"""A name with one of these means data."""


def _check(cls: Any, called: str) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Benchmark)):
        raise UserError(f"{called} is no subclass of mssr.evaluation.base.Benchmark")


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark", "class", _check, DATA_MARKS)


def register(name: str) -> Callable[[_B], _B]:
    """Class decorator: make a `Benchmark`, which is built without arguments, available by a name.

    A new benchmark is a file with such a class in ``benchmarks/``, and its name in `BUILTIN`.

    Raises:
        ValueError: the name is taken, or could be the name of data (it has a colon, ``@``, ``/`` or dot).
    """
    _import(name)
    return BENCHMARKS.register(name)


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted({*BUILTIN, *BENCHMARKS.known})


def get(name: str, reward: RewardConfig | None = None, config: DataConfig | None = None) -> Benchmark:
    """The benchmark called ``name``.

    Args:
        name: a registered name; ``path/to/file.py:Class`` (see `mssr.algorithms.plugins`); or a source of
            data in the project's own form (a file, a directory, ``hub/name@split``, see
            `mssr.data.sources`), judged by the default rule of `own.Own`.
        reward, config: of such data, see `own.Own`.

    Raises:
        UserError: no such name, with the nearest; or the file or class cannot be had.
    """
    _import(name)
    if name in BENCHMARKS.known:
        return BENCHMARKS.known[name]()
    if plugins.is_spec(name) and name.rpartition(":")[0].endswith(".py"):
        return _from_file(name)
    if any(c in name for c in DATA_MARKS) or Path(name).exists():
        return Own(name, reward=reward, config=config)
    for builtin in BUILTIN:
        _import(builtin)
    raise UserError(f"{BENCHMARKS.unknown(name)} or data such as my.parquet or hub/name@split")


def _import(name: str) -> None:
    if name in BUILTIN:
        importlib.import_module(f"mssr.evaluation.benchmarks.{name}")


def _from_file(name: str) -> Benchmark:
    cls = plugins.load(name, "benchmark", "class")
    _check(cls, f"benchmark {name!r}")
    try:
        benchmark: Benchmark = cls()
    except TypeError as error:
        raise UserError(f"benchmark {name!r} cannot be built without arguments ({error})") from error
    if not cls.name:
        cls.name = name
    return benchmark
