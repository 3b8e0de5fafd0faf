"""The messages of the errors that mssr/ makes, read from its code: ``{}`` is what varies."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERRORS = frozenset(
    "UserError TrainingError EngineError TransferInterruptedError WorkersLostError "
    "ValueError TypeError LookupError ImportError CallError WorkerDiedError WorkerHungError".split()
)
"""The rest says that mssr or the machine is at fault: RuntimeError, KeyError, AssertionError, OSError ..."""
PREFIX = "mssr: error: "
WORDS = 10
"""A message with fewer letters of its own is told by what it is put together from."""


class UnreadableError(Exception):
    """An expression whose text is not in the code: that of another error, for example."""


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


class Module:
    """A file of code."""

    def __init__(self, path: Path) -> None:
        self.nodes = list(ast.walk(tree(path)))
        self.functions = [n for n in self.nodes if isinstance(n, ast.FunctionDef)]
        self.calls = [n for n in self.nodes if isinstance(n, ast.Call)]

    def messages(self) -> Iterator[tuple[int, list[str] | ast.expr]]:
        """Line of each error that is made, and what it may say, or the expression where that is not known."""
        own = [n for n in self.nodes if isinstance(n, ast.ClassDef) and ERRORS & {*map(_name, n.bases)}]
        inside = {call for kind in own for call in ast.walk(kind) if _name(call) == "__init__"}
        for call in self.calls:
            if call.args and (_name(call) in ERRORS or call in inside or _name(call) == "print"):
                try:
                    found: list[str] | ast.expr = self.read(call.args[0])
                except UnreadableError:
                    found = call.args[0]
                if _name(call) == "print":  # by the command itself
                    texts = found if isinstance(found, list) else []
                    found = [text.removeprefix(PREFIX) for text in texts if text.startswith(PREFIX)]
                yield call.lineno, found
        for node in self.nodes:  # why a response has no score, or a row is not used: quoted by errors
            if isinstance(node, ast.Call) and _name(node) == "Failure":
                yield node.lineno, self._or_any(node.args[0], ())
            elif isinstance(node, ast.Tuple) and {*map(_name, node.elts[:1])} & {"BAD", "DUPLICATE"}:
                yield node.lineno, self._or_any(node.elts[1], ())

    def read(self, node: ast.expr, inside: tuple[str, ...] = ()) -> list[str]:
        """What an expression may say; ``inside`` are the variables and functions that led to it."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            parts = [self._part(part, inside) for part in node.values]
            few = len(re.findall("[A-Za-z]", "".join(part[0] for part in parts if len(part) == 1))) < WORDS
            chosen = [part if few or len(part) == 1 else ["{}"] for part in parts]
            return ["".join(text) for text in itertools.product(*chosen)]
        if isinstance(node, ast.IfExp):
            return self.read(node.body, inside) + self.read(node.orelse, inside)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return [a + b for a in self.read(node.left, inside) for b in self._or_any(node.right, inside)]
        if isinstance(node, ast.Call) and _name(node) == "format" and isinstance(node.func, ast.Attribute):
            return self.read(node.func.value, inside)
        name = _name(node)
        if isinstance(node, ast.Name):
            values = self._values(node)
        elif isinstance(node, ast.Call):
            made = [n for f in self.functions if f.name == name for n in ast.walk(f)]
            values = [n.value for n in made if isinstance(n, ast.Return) and n.value is not None]
        else:
            raise UnreadableError
        if name in inside:
            raise UnreadableError
        found = [text for value in values for text in self._or_any(value, (*inside, name))]
        if set(found) <= {"{}"}:
            raise UnreadableError
        return found

    def _part(self, part: ast.expr, inside: tuple[str, ...]) -> list[str]:
        """Of an f-string."""
        if isinstance(part, ast.FormattedValue):
            plain = isinstance(part.value, ast.Name) and part.conversion == -1 and part.format_spec is None
            return self._or_any(part.value, inside) if plain else ["{}"]
        return self.read(part, inside)

    def _or_any(self, node: ast.expr, inside: tuple[str, ...]) -> list[str]:
        try:
            return self.read(node, inside)
        except UnreadableError:
            return ["{}"]

    def _values(self, name: ast.Name) -> list[ast.expr]:
        """What a variable may be: of its function, of that one's callers, or a constant of any file."""
        around = [f for f in self.functions if f.lineno <= name.lineno <= (f.end_lineno or 0)]
        found: list[ast.expr] = []
        for function in around[-1:]:
            for node in ast.walk(function):
                if isinstance(node, ast.Assign):
                    found += [v for target in node.targets for v in _given(target, node.value, name.id)]
                elif isinstance(node, ast.NamedExpr | ast.AugAssign):
                    found += _given(node.target, node.value, name.id)
                elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
                    found += [v for row in node.iter.elts for v in _given(node.target, row, name.id)]
            parameters = [a.arg for a in function.args.args if a.arg != "self"]
            if name.id in parameters and re.match("_[^_]", function.name):  # all its callers are here
                place = parameters.index(name.id)
                calls = [call for call in self.calls if _name(call) == function.name]
                found += [call.args[place] for call in calls if place < len(call.args)]
        if not found and name.id.isupper() and name.id in (known := constants()):
            found = [known[name.id]]
        return found


@functools.cache
def constants() -> dict[str, ast.Constant]:
    """Texts with a name in capitals that only one file gives."""
    found: dict[str, list[ast.Constant]] = {}
    for path in sorted((ROOT / "mssr").rglob("*.py")):
        for node in tree(path).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and isinstance(node.value.value, str):
                        found.setdefault(target.id, []).append(node.value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


def _name(node: ast.AST) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _given(target: ast.expr, value: ast.expr, name: str) -> list[ast.expr]:
    """What of a value goes to a variable of that name."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts, strict=False)
        return [found for t, v in pairs for found in _given(t, v, name)]
    return [value] if isinstance(target, ast.Name) and target.id == name else []
