"""What `pip install mssr` brings: without the trainer's packages, and with the recipes."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import mssr
from mssr.config.loading import file_layers
from mssr.config.recipes import RECIPES, SETS, find, init
from mssr.errors import UserError
from mssr.runs.config import load_config
from mssr.tools import cli

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RECIPE_FILES = sorted((ROOT / "configs").rglob("*.yaml"))

# What the base requirements bring; everything else, mssr and the standard library apart, is not to be found.
WITHOUT_THE_TRAINER = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names | {"mssr", "numpy", "omegaconf", "yaml", "antlr4"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import mssr.integrations.base
from mssr.algorithms import create
from mssr.tools.cli import main

print(create("mssr").advantages(["a", "b"], [1.0, 0.0], [1, 1])[0])
print(mssr.integrations.base.create("mssr", {}))
assert main(["init", "digits"]) == 0
for command in sys.argv[1:]:
    print(main(command.split()), file=sys.stderr)
"""
COMMANDS = [
    "train digits",
    "plan geometry3k",
    "data digits",
    "doctor",
    "prepare digits --out data",
    "eval --model m --benchmarks mathverse",
    "export run --out out",
    "plot run",
    "compare a b",
    "convert easyr1.yaml",
]


def test_the_base_install_has_algorithms_and_init_and_says_what_the_rest_needs(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_THE_TRAINER, *COMMANDS]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "configs/digits/mssr.yaml").is_file()
    said = done.stderr.splitlines()
    assert said[1::2] == ["2"] * len(COMMANDS)
    for line in said[::2]:
        assert line.startswith("mssr: error: this command needs the trainer (No module named "), line
        assert 'pip install "mssr[train,cpu]"' in line


def test_what_the_trainer_needs_is_what_its_extra_brings() -> None:
    [*wanted] = PROJECT["optional-dependencies"]["train"]
    extra = {re.match(r"[\w-]+", line)[0] for line in wanted}  # type: ignore[index]
    distributions = importlib.metadata.packages_distributions()
    assert {name for module in cli.OF_THE_TRAINER for name in map(str.lower, distributions[module])} == extra


def test_extras_hold_one_another_as_told() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {re.match(r"\w+", line)[0] for line in PROJECT["dependencies"]} == {"numpy", "omegaconf"}  # type: ignore[index]
    assert "mssr[train]" in extras["cpu"] and "mssr[train]" in extras["gpu"]
    for plugin in ("trl", "verl"):  # nothing that their users have not
        assert [re.match(r"\w+", line)[0] for line in extras[plugin]] == [plugin]  # type: ignore[index]


def test_one_version_is_told_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert citation["version"] == newest[1] == mssr.__version__
    assert "version" in PROJECT["dynamic"]


@pytest.mark.parametrize("file", RECIPE_FILES, ids=lambda file: str(file.relative_to(ROOT / "configs")))
def test_every_recipe_is_found_by_name(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find(file.relative_to(ROOT / "configs").with_suffix("")).samefile(file)


def test_a_set_means_its_first_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("digits", ["trainer.steps=3"]).trainer.steps == 3
    assert find("digits") == find("digits/") == RECIPES / "digits/mssr.yaml"
    assert load_config("geometry3k").model.path == "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.mark.parametrize("name", ["paper", "paper/", "paper/qwen3_vl_8b"])
def test_a_name_of_several_is_refused_with_them(name: str) -> None:
    with pytest.raises(UserError, match=r"several recipes; name one of .*paper/qwen3_vl_8b/mssr"):
        find(name)


@pytest.mark.parametrize("name", ["digitz", "qwen2_5_vl_3b", "../configs/digits/mssr", "mssr", "."])
def test_an_unknown_name_is_refused_with_all_recipes(name: str) -> None:
    with pytest.raises(UserError) as error:
        find(name)
    said = str(error.value)
    assert all(str(file.relative_to(ROOT / "configs").with_suffix("")) in said for file in RECIPE_FILES)
    assert "\n" not in said and (name != "digitz" or "did you mean 'digits/" in said)


def test_a_file_goes_first_and_a_name_that_may_be_either_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("seed: 7\nmodel: {path: m}\ndata: {train: t, val: v}\n")
    assert find("digits") == Path("digits") and load_config("digits").seed == 7
    Path("digits").unlink()
    Path("digits").mkdir()
    assert find("digits").samefile(RECIPES / "digits/mssr.yaml")  # an empty directory is no config
    init("digits", Path("digits"))
    for name in ("digits", "digits/text"):
        with pytest.raises(UserError, match=f"{name} may be digits/.*yaml or the recipe .*; give the path"):
            find(name)
    assert find("digits/text.yaml") == Path("digits/text.yaml")


@pytest.mark.parametrize("name", SETS)
def test_init_writes_a_set_that_works_where_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", name]) == 0
    target = Path("configs") / name
    [line] = capsys.readouterr().out.splitlines()
    [*told] = re.findall(rf"{target}/\S+\.yaml", line)
    assert told and all(Path(file).is_file() for file in told)
    written = sorted(target.rglob("*.yaml"))
    assert [file.read_text() for file in written] == [
        file.read_text() for file in RECIPE_FILES if file.is_relative_to(ROOT / target)
    ]
    for file in written:  # with all that it is based on
        shipped = file_layers(RECIPES / file.relative_to("configs"))
        assert [tree for _, tree in file_layers(file)] == [tree for _, tree in shipped]
    Path("file").touch()
    assert cli.main(["init", name, "file"]) == 2
    assert "recipes cannot be written to file: " in capsys.readouterr().err
    written[-1].write_text("mine")
    for other in written[:-1]:
        other.unlink()
    assert cli.main(["init", name]) == 2
    assert f"{written[-1]} exists" in capsys.readouterr().err
    assert sorted(target.rglob("*.yaml")) == written[-1:] and written[-1].read_text() == "mine"


@pytest.mark.parametrize(
    ("recipe", "command"),
    [
        ("digits", "mssr prepare digits --out data/digits makes it"),
        ("digits/qwen3_vl", "mssr prepare digits --out data/digits-qwen3_vl --model qwen3_vl makes it"),
        ("digits/text", "mssr prepare digits --out data/digits-qwen3 --model qwen3 makes it"),
        ("chains/stress", "mssr prepare chains --out data/chains makes it"),
    ],
)
def test_without_its_data_a_recipe_says_how_to_make_it(
    recipe: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train", "plan"):
        assert cli.main([name, recipe]) == 2
        assert capsys.readouterr().err.rstrip().endswith(command)
    assert not list(tmp_path.iterdir())
