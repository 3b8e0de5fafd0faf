"""What is a family's own is in its file: nothing else in mssr/ knows one by name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mssr
from mssr.errors import UserError
from mssr.models.families import FAMILIES, family_named

pytestmark = pytest.mark.unit

ROOT = Path(mssr.__file__).parent
NAMES = re.compile(r"qwen|deepstack|visual|comparison: ", re.IGNORECASE)
KNOWN = {
    "models/tiny.py": "Qwen2Tokenizer",  # of all of them
    "data/encoder.py": "qwen_vl_utils",  # resizes images for all of them
    "data/prepared.py": "qwen2_5_vl",  # of an embedded task unless another is asked for
    "tools/cli.py": "qwen2_5_vl|qwen_vl_utils",  # likewise; the package is one of the trainer's
    "config/recipes.py": "qwen2_5_vl",  # in names of recipes
    "tools/convert_options.py": "^visual$",  # in names of modules, in others' configs
    # Visual credit, which has nothing to do with the tower of that name.
    "algorithms/credit.py": "^visual_kl$",
    "actor/visual.py": "^visual(_factors|_kl|_fraction)?$",
    "actor/operations.py": "^visual$",
    "actor/update.py": r"^(mssr\.actor\.)?visual(_factors)?$",
    "config/algorithm.py": "^visual(_fraction| != none)?$",
    "models/loading.py": r"^algorithm\.shaping\.visual$",
}
"""File -> the family's name that may stand there."""


def code_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines with the names and strings in them, without docstrings."""
    expressions = (node.value for node in ast.walk(tree) if isinstance(node, ast.Expr))
    docstrings = {id(value) for value in expressions if isinstance(value, ast.Constant)}
    for node in ast.walk(tree):
        for field, value in ast.iter_fields(node):
            if isinstance(value, str) and id(node) not in docstrings and field != "type_comment":
                yield getattr(node, "lineno", 0), value
        if isinstance(node, ast.Match) and "model_type" in ast.unparse(node.subject):
            yield node.lineno, f"comparison: {ast.unparse(node)}"
        elif isinstance(node, ast.Compare) and "model_type" in ast.unparse(node):
            sides = ast.Tuple([node.left, *node.comparators])
            literals = (x.value for x in ast.walk(sides) if isinstance(x, ast.Constant))
            if any(isinstance(x, str) and x != "model_type" for x in literals):
                yield node.lineno, f"comparison: {ast.unparse(node)}"


def found_in(source: str, known: str | None = None) -> list[str]:
    allowed = re.compile(known or "(?!)", re.IGNORECASE)
    words = [(line, word) for line, word in code_words(ast.parse(source)) if NAMES.search(word)]
    return [f"{line}: {word}" for line, word in words if not allowed.search(word)]


def test_no_code_outside_the_room_knows_a_family() -> None:
    paths = [p for p in ROOT.rglob("*.py") if p.parent != ROOT / "models" / "families"]
    assert len(paths) > 100
    names = {path: path.relative_to(ROOT).as_posix() for path in paths}
    found = {name: found_in(path.read_text(), KNOWN.get(name)) for path, name in names.items()}
    assert {name: words for name, words in found.items() if words} == {}


@pytest.mark.parametrize(
    "source",
    [
        "if config.model_type == 'other': pass",
        "match config.model_type:\n  case 'other': pass",
        "x = config.model_type in ('other',)",
        "tower = model.model.visual",
        "name.startswith('model.visual.')",
        "from transformers import Qwen2VLConfig",
        "from mssr.models.families.qwen3_vl import Qwen3VL",
        "f(deepstack_visual_embeds=1)",
    ],
)
def test_what_knows_one_is_found(source: str) -> None:
    assert found_in(source) and not found_in(f'"""{source.splitlines()[0]}"""')


def test_an_unknown_type_is_named_with_those_that_work() -> None:
    with pytest.raises(UserError) as error:
        family_named("llama", "/models/llama")
    message = str(error.value)
    assert "\n" not in message and "/models/llama" in message and "llama" in message
    assert all(name in message for name in FAMILIES)
