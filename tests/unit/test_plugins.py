"""Loading a user's function or class from a file."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest

from mssr.algorithms import plugins
from mssr.errors import UserError

pytestmark = pytest.mark.unit

SOURCE = """
from __future__ import annotations
import dataclasses
import math

@dataclasses.dataclass
class Point:
    x: float = math.pi

def double(x):
    return 2 * x
"""


def write(path: Path, source: str = SOURCE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def test_a_spec_has_a_colon() -> None:
    assert plugins.is_spec("a/b.py:f") and plugins.is_spec(":f") and not plugins.is_spec("exact_match")


def test_functions_and_classes_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "mine.py")
    assert plugins.load(f"{path}:double", "reward")(4) == 8
    point = plugins.load(f"{path}:Point", "algorithm")
    assert pickle.loads(pickle.dumps(point(2.0))) == point(2.0)
    assert point.__module__ in sys.modules
    monkeypatch.chdir(tmp_path)
    assert plugins.load("mine.py:Point", "algorithm") is point
    assert not list(tmp_path.glob("__pycache__"))  # nothing is written beside the user's file


def test_a_file_runs_once_until_it_is_edited(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", "value = object()\nnumber = 1\n")
    spec = f"{path}:value"
    before = os.stat(path)
    first = plugins.load(spec, "reward")
    assert plugins.load(spec, "reward") is first
    write(path, "value = object()\nnumber = 2\n")  # as long as before, and within the same second
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert plugins.load(spec, "reward") is not first
    assert plugins.load(f"{path}:number", "reward") == 2


def test_files_of_one_name_do_not_shadow_each_other(tmp_path: Path) -> None:
    first = write(tmp_path / "a/mine.py", "def f(): return __name__")
    second = write(tmp_path / "b/mine.py", "def f(): return __name__")
    names = [plugins.load(f"{path}:f", "reward")() for path in (first, second)]
    assert names[0] != names[1] and "mine" not in sys.modules


def test_a_file_may_import_its_neighbours_and_not_those_of_another(tmp_path: Path) -> None:
    source = """
import helper_of_a_test
from package_of_a_test.inner import number
def f():
    import later_of_a_test
    return helper_of_a_test.number, number, later_of_a_test.number
"""
    found = []
    for folder, number in (("a", 1), ("b", 2)):
        path = write(tmp_path / folder / "mine.py", source)
        for name in ("helper_of_a_test.py", "package_of_a_test/inner.py"):
            write(tmp_path / folder / name, f"number = {number}")
        write(tmp_path / folder / "package_of_a_test/__init__.py", "")
        write(tmp_path / "a" / "later_of_a_test.py", "number = 3")
        found.append(plugins.load(f"{path}:f", "reward"))
    assert [f() for f in found] == [(1, 1, 3), (2, 2, 3)]
    assert not list(tmp_path.rglob("__pycache__/helper*"))


@pytest.mark.parametrize(
    ("file", "source", "attribute", "message"),
    [
        ("missing.py", None, "f", "there is no file '.*missing.py'"),
        ("text.txt", "hello", "f", r"text.txt is not a Python file \(.py\)"),
        ("syntax.py", "def f(:\n", "f", "syntax.py does not run: SyntaxError"),
        ("exits.py", "import sys\nsys.exit(3)\n", "f", "exits.py does not run: SystemExit: 3"),
        ("raises.py", "raise KeyError('one\\ntwo')\n", "f", "raises.py does not run: KeyError"),
        ("mine.py", SOURCE, "duble", "mine.py has no class 'duble', did you mean 'double'?"),
        ("mine.py", SOURCE, "mathe", "mine.py has no class 'mathe'$"),
        ("mine.py", SOURCE, "", "mine.py has no class ''$"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, file: str, source: str | None, attribute: str, message: str
) -> None:
    if source is not None:
        write(tmp_path / file, source)
    for _ in range(2):  # a file that failed is not taken for loaded
        with pytest.raises(UserError, match=message) as error:
            plugins.load(f"{tmp_path / file}:{attribute}", "algorithm", noun="class")
        assert str(error.value).startswith(f"algorithm '{tmp_path / file}:{attribute}'")
        assert "\n" not in str(error.value)


def test_a_spec_without_a_file_is_refused() -> None:
    with pytest.raises(UserError, match=r"reward ':f' is not of the form path/to/file\.py:attribute"):
        plugins.load(":f", "reward")
    with pytest.raises(UserError, match="'grpo' is not of the form"):
        plugins.load("grpo", "reward")


def test_an_interrupt_while_a_file_runs_is_no_error_of_the_user(tmp_path: Path) -> None:
    path = write(tmp_path / "slow.py", "raise KeyboardInterrupt\n")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            plugins.load(f"{path}:f", "reward")


def a_registry() -> plugins.Registry:
    def check(thing: object, called: str) -> None:
        if not isinstance(thing, type):
            raise ValueError(f"{called} is no class")

    return plugins.Registry("colour", "class", check, reserved="@/")


def test_a_registry_gives_a_name_once(tmp_path: Path) -> None:
    colours = a_registry()
    path = write(tmp_path / "mine.py", "class Red: number = 1")
    first = colours.register("red")(plugins.load(f"{path}:Red", "colour"))
    assert first.name == "red" and colours.names() == ["red"] and colours.get("red") is first
    write(path, "class Red: number = 2")  # an edit of the same file, as a notebook cell that is run again
    second = colours.register("red")(plugins.load(f"{path}:Red", "colour"))
    assert colours.get("red") is second is not first
    other = write(tmp_path / "b" / "mine.py", "class Red: number = 3")
    with pytest.raises(ValueError, match="the colour name 'red' is taken by Red"):
        colours.register("red")(plugins.load(f"{other}:Red", "colour"))
    for name in ("a:b", "a@b", "a/b"):
        with pytest.raises(ValueError, match="must not contain a colon or any of @/"):
            colours.register(name)
    with pytest.raises(ValueError, match="colour 'blue': 3 is no class"):
        colours.register("blue")(3)


def test_a_registry_finds_names_and_files(tmp_path: Path) -> None:
    colours = a_registry()
    path = write(tmp_path / "mine.py", "class Red: pass\nnumber = 3")
    red = colours.get(f"{path}:Red")
    assert red.name == f"{path}:Red" and colours.names() == []
    colours.register("red")(red)
    assert colours.get(f"{path}:Red").name == "red"
    with pytest.raises(
        ValueError, match=r"unknown colour 'rad', did you mean 'red'\?: one of \['red'\] or path"
    ):
        colours.get("rad")
    with pytest.raises(UserError, match=r"colour '.*mine.py:number': number is no class"):
        colours.get(f"{path}:number")
    with pytest.raises(UserError, match=r"is not of the form path/to/file\.py:class"):
        colours.get(str(path))
