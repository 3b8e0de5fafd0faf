"""docs/models.md says which models there are, and shows the code that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from mssr.models.families import FAMILIES
from mssr.models.published import published

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/models.md"


def test_the_table_has_every_family_and_size() -> None:
    rows = {
        cells[2].strip("` "): cells
        for line in PAGE.read_text().splitlines()
        if len(cells := line.split("|")) == 7
    }
    assert rows.keys() - {"model_type", "---"} == FAMILIES.keys()
    for name, tree in published().items():
        size = re.search(r"-([\d.]+B(-A\d+B)?)", name)
        ends = re.split(r", | to ", rows[tree["model_type"]][3].strip())
        assert size and (size[1] in ends or float(ends[0][:-1]) < float(size[1][:-1]) < float(ends[-1][:-1]))


def test_the_family_that_it_walks_through_is_shown_whole_and_as_it_is() -> None:
    lines = (ROOT / "mssr/models/families/qwen3_vl.py").read_text().splitlines()
    [kind] = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.ClassDef)]
    methods = [node for node in kind.body if isinstance(node, ast.FunctionDef)]
    code = ["\n".join(line[4:] for line in lines[m.lineno - 1 : m.end_lineno]) for m in methods]
    shown = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "\n".join(shown).split() == "\n".join(code).split()
    assert all(part.strip() in PAGE.read_text() for part in code)
