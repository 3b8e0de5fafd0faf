"""What a user may name: registered things, and their own code as ``path/to/file.py:attribute``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from mssr.errors import UserError, did_you_mean

_PREFIX = "mssr_plugin_"  # of the names of modules that are made here

T = TypeVar("T", bound=Callable[..., Any])
_Registered = TypeVar("_Registered")


@dataclass(eq=False)
class Registry(Generic[T]):
    """Things of one kind by name. A class among them finds its name in its attribute ``name``."""

    kind: str
    """What they are, for every error: "algorithm", "policy loss"."""
    noun: str
    """What a file holds of them, "class" or "function"."""
    check: Callable[[Any, str], None]
    """Raises ValueError for what is no such thing; it gets the thing and what it is called."""
    reserved: str = ""
    """Characters that no name may have, beside the colon of ``path/to/file.py:attribute``."""
    inputs: int = 0
    """Parameters of each that come before its options."""
    known: dict[str, T] = field(default_factory=dict)

    def register(self, name: str) -> Callable[[_Registered], _Registered]:
        """Decorator: make a thing available as ``name``.

        Raises:
            ValueError: The name is taken or has a reserved character, or the thing is not of the kind.
        """
        if any(character in name for character in ":" + self.reserved):
            others = f" or any of {self.reserved}" if self.reserved else ""
            raise ValueError(f"the {self.kind} name {name!r} must not contain a colon{others}")

        def add(thing: Any) -> Any:
            taken = self.known.get(name)
            # The same again is a notebook cell that was run twice, or a module reload.
            if taken is not None and _origin(taken) != _origin(thing):
                raise ValueError(f"the {self.kind} name {name!r} is taken by {_origin(taken)[1]}")
            self._check(name, thing, getattr(thing, "__name__", repr(thing)))
            if isinstance(thing, type):
                thing.name = name  # type: ignore[attr-defined]
            self.known[name] = thing
            return thing

        return add

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self.known)

    def get(self, name: str) -> T:
        """What is called ``name``, or what stands in ``path/to/file.py:attribute``, see `load`.

        What is in a file need not be registered. A class that is not then has this path as its name.

        Raises:
            ValueError: No such name; the nearest and all names are given.
            UserError: The file or the attribute cannot be had, or is not of the kind.
        """
        if name in self.known:
            return self.known[name]
        if not (is_spec(name) or name.endswith(".py")):
            raise ValueError(self.unknown(name))
        thing = load(name, self.kind, self.noun)
        self._check(name, thing, name.rpartition(":")[2])
        if isinstance(thing, type) and thing not in self.known.values():
            thing.name = name  # type: ignore[attr-defined]
        return thing

    def options(self, name: str) -> dict[str, Any]:
        """The options of what is called ``name`` and their defaults, in the order of its signature."""
        return self._options(self.get(name))

    def bind(self, name: str, options: Mapping[str, Any], thing: T | None = None) -> Callable[..., Any]:
        """What is called ``name``, or ``thing`` in its place, with options filled in; a file is read once.

        Raises:
            ValueError: There is no such option; the nearest and all are given.
        """
        thing = thing or self.get(name)
        known = self._options(thing)
        for option in options:
            if option not in known:
                hint, taken = did_you_mean(option, known), list(known) or "none"
                raise ValueError(f"{self.kind} {name!r} has no option {option!r}{hint}: it takes {taken}")
        return functools.partial(thing, **options)

    def _options(self, thing: T) -> dict[str, Any]:
        parameters = list(inspect.signature(thing).parameters.values())
        return {option.name: option.default for option in parameters[self.inputs :]}

    def unknown(self, name: str) -> str:
        """The sentence that there is no such name, with the nearest and all names."""
        hint = did_you_mean(name, self.known)
        form = f"path/to/file.py:{'Class' if self.noun == 'class' else self.noun}"
        return f"unknown {self.kind} {name!r}{hint}: one of {self.names()} or {form}"

    def _check(self, name: str, thing: object, called: str) -> None:
        try:
            self.check(thing, called)
        except ValueError as error:
            raise UserError(f"{self.kind} {name!r}: {error}") from error


def _origin(thing: object) -> tuple[str, str]:
    """The file that defines a class or a function, or else the module, and its name there."""
    module = getattr(thing, "__module__", "")
    file = getattr(sys.modules.get(module), "__file__", None)
    return file or module, getattr(thing, "__qualname__", repr(thing))


def is_spec(name: str) -> bool:
    """Whether ``name`` is of the form ``path/to/file.py:attribute``; registered names have no colon."""
    return ":" in name


def load(spec: str, kind: str, noun: str = "attribute") -> Any:
    """What ``path/to/file.py:attribute`` stands for; ``kind`` and ``noun`` are those of `Registry`.

    The path is relative to the working directory or absolute. The file runs once for each of its
    contents: loading it again gives the same object, and after an edit the new one. It runs as a module of
    its own, so two files of one name do not shadow each other. It may import the files beside it.

    Raises:
        UserError: There is no such file, it is no Python file, it does not run, or it lacks the name.
    """
    path, _, attribute = spec.rpartition(":")
    if not path:
        raise UserError(f"{kind} {spec!r} is not of the form path/to/file.py:{noun}")
    module = _run(Path(path), f"{kind} {spec!r}")
    if attribute not in vars(module):
        own = [n for n, v in vars(module).items() if not (n.startswith("_") or isinstance(v, ModuleType))]
        hint = did_you_mean(attribute, own)
        raise UserError(f"{kind} {spec!r}: {path} has no {noun} {attribute!r}{hint}")
    return vars(module)[attribute]


def _run(path: Path, what: str) -> ModuleType:
    """The module of the file at ``path``, run now unless this content of it already was."""
    if not path.is_file():
        raise UserError(f"{what}: there is no file {str(path)!r}")
    if path.suffix != ".py":
        raise UserError(f"{what}: {path} is not a Python file (.py)")
    path = path.resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read: {error.strerror}") from error
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:16]
    name = f"{_PREFIX}{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    # Not by an import, whose bytecode cache takes an edit of the same second and size for none.
    module = sys.modules[name] = ModuleType(name)  # dataclasses and pickle look their module up there
    module.__file__ = str(path)
    try:
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
