"""A user's own code by name: ``path/to/file.py:attribute`` for rewards, algorithms, losses, data."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from mssr.errors import UserError

_PREFIX = "mssr_plugin_"
"""Of the names of modules that are made here."""


def is_spec(name: str) -> bool:
    """Whether ``name`` is of the form ``path/to/file.py:attribute``; registered names have no colon."""
    return ":" in name


def load(spec: str, kind: str, noun: str = "attribute") -> Any:
    """What ``path/to/file.py:attribute`` stands for.

    The file runs once for each of its contents: loading it again gives the same object, and after an
    edit the new one. It runs as a module of its own, so two files of one name do not shadow each other.
    It may import the files beside it.

    Args:
        spec: A path, relative to the working directory or absolute, a colon, and a top-level name.
        kind: What the user asked for, the first word of every error: "reward", "algorithm".
        noun: What the name should be, for the error that it is not there: "function", "class".

    Raises:
        UserError: There is no such file, it is no Python file, it does not run, or it lacks the name.
    """
    path, _, attribute = spec.rpartition(":")
    if not path:
        raise UserError(f"{kind} {spec!r} is not of the form path/to/file.py:{noun}")
    module = _run(Path(path), f"{kind} {spec!r}")
    if attribute not in vars(module):
        public = [name for name, value in vars(module).items() if not _foreign(name, value)]
        close = difflib.get_close_matches(attribute, public, n=1, cutoff=0.5)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise UserError(f"{kind} {spec!r}: {path} has no {noun} {attribute!r}{hint}")
    return vars(module)[attribute]


def _foreign(name: str, value: object) -> bool:
    return name.startswith("_") or isinstance(value, ModuleType)


def _run(path: Path, what: str) -> ModuleType:
    """The module of the file at ``path``, run now unless this content of it already was."""
    if not path.is_file():
        raise UserError(f"{what}: there is no file {str(path)!r}")
    path = path.resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:16]
    name = f"{_PREFIX}{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{what}: {path} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    try:
        # Not by the loader, whose bytecode cache takes an edit of the same second and size for none.
        with _neighbours(path.parent):
            exec(compile(source, str(path), "exec"), vars(module))
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what}: {path} does not run: {reason}") from error
    return module


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Let what runs import the files beside it, where an earlier file had others of these names beside it."""
    others = {_home(m) for name, m in sys.modules.items() if name.startswith(_PREFIX)} - {folder}
    stale = [
        name
        for name, module in sys.modules.items()
        if _home(module) in others and ((folder / f"{name}.py").is_file() or (folder / name).is_dir())
    ]
    for name in [n for n in sys.modules if n.partition(".")[0] in stale]:
        del sys.modules[name]
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing is left beside a user's file
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # for what a function imports when it is called


def _home(module: ModuleType) -> Path | None:
    """The folder that a module, or a package, is in."""
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    return Path(file).parents[1] if Path(file).name == "__init__.py" else Path(file).parent
