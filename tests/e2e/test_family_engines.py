"""vLLM with every family: what it is given, what it makes of it, new weights, and the export."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mssr.models.families import FAMILIES
from tests.conftest import Workspace

pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("model_type", FAMILIES)]
Found = dict[str, Any]


@pytest.fixture(scope="session")
def examined(
    workspace_of: Callable[[str], Workspace], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Found]:
    """What `tests.e2e.family_engines` found out of a family, in one process for all of them."""
    out = tmp_path_factory.mktemp("engines")
    families = [part for name in FAMILIES for part in (name, str(workspace_of(name).config))]
    command = [sys.executable, "-m", "tests.e2e.family_engines", str(out), *families]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)

    def found(model_type: str) -> Found:
        file = out / f"{model_type}.json"
        assert file.is_file(), f"the process ended ({done.returncode}):\n{done.stderr[-3000:]}"
        result: Found = json.loads(file.read_text())
        assert "error" not in result, result["error"]
        return result

    return found


def test_an_engine_is_given_what_vllm_would_prepare(
    model_type: str, examined: Callable[[str], Found]
) -> None:
    """Token ids, places, pixels and grids, in float32 and as a GPU gets them; and it answers the same."""
    found = examined(model_type)
    assert found["images"] == ([1, 2, 0, 3, 3] if FAMILIES[model_type].tower_name else [0] * 5)
    assert found["inputs"] == {"torch.bfloat16": [], "torch.float32": []}
    assert found["to_both"] < 1e-6


def test_engine_and_actor_agree_after_two_updates(model_type: str, examined: Callable[[str], Found]) -> None:
    """Of all weights, the tower's included, with the same images each time."""
    found = examined(model_type)
    assert found["not_loaded"] == []
    assert len(found["mismatch"]) == 3 and max(found["mismatch"]) < 1e-5


def test_placeholders_are_never_sampled(model_type: str, examined: Callable[[str], Found]) -> None:
    found = examined(model_type)["placeholders"]
    assert found["wanted"] > 0.5 or FAMILIES[model_type].tower_name is None
    assert found["tokens"] > 100 and found["said"] == []


def test_an_export_answers_alike_in_transformers_and_vllm(
    model_type: str, examined: Callable[[str], Found]
) -> None:
    """The same tokens, from what each makes of text and images."""
    assert examined(model_type)["export"] < 1e-5
