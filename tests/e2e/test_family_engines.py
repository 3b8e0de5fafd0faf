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

NAMES = [*FAMILIES, "qwen3_vl-untied", "qwen2-untied"]
pytestmark = [pytest.mark.e2e, pytest.mark.parametrize("name", NAMES)]
Found = dict[str, Any]


def sees_images(name: str) -> bool:
    return FAMILIES[name.split("-")[0]].tower_name is not None


@pytest.fixture(scope="session")
def examined(
    workspace_of: Callable[[str], Workspace], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Found]:
    """What `tests.e2e.family_engines` found out of a family, in one process for all of them."""
    out = tmp_path_factory.mktemp("engines")
    configs = [workspace_of(name.split("-")[0]).config for name in NAMES]
    families = [part for pair in zip(NAMES, configs, strict=True) for part in map(str, pair)]
    command = [sys.executable, "-m", "tests.e2e.family_engines", str(out), *families]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)

    def found(name: str) -> Found:
        file = out / f"{name}.json"
        assert file.is_file(), f"the process ended ({done.returncode}):\n{done.stderr[-3000:]}"
        result: Found = json.loads(file.read_text())
        assert "error" not in result, result["error"]
        return result

    return found


def assert_near(gaps: list[dict[str, float]]) -> None:
    """Equal in float32; in a dtype with which more is lost, as near as the actor is in that dtype."""
    if "noise" not in gaps[0]:
        assert all(gap["largest"] < 1e-5 for gap in gaps)  # NaN is not
        return
    noise = sum(gap["noise"] for gap in gaps) / len(gaps)
    assert max(gap["mean"] for gap in gaps) < 2 * noise < 0.1
    assert sum(gap["mean"] for gap in gaps) / len(gaps) < 1.25 * noise


def test_an_engine_is_given_what_vllm_would_prepare(name: str, examined: Callable[[str], Found]) -> None:
    """Token ids, places, pixels and grids, in float32 and as a GPU gets them; and it answers the same."""
    found = examined(name)
    same_image_twice = [[0], [0, 1], [], [0, 1, 2], [0, 1, 0]]
    assert found["images"] == (same_image_twice if sees_images(name) else [[]] * 5)
    assert found["inputs"] == {"torch.bfloat16": [], "torch.float32": [], "originals": []}
    assert found["to_both"] < 1e-6
    # With several devices vLLM would else split the tower's weights, and not the images, over them.
    assert found["tower_on_each_device"] == sees_images(name)


def test_engine_and_actor_agree_after_two_updates(name: str, examined: Callable[[str], Found]) -> None:
    """Of all weights, the tower's included, with the same images, after transfers that broke off."""
    found = examined(name)
    assert found["not_loaded"] == []
    assert len(found["mismatch"]) == 3
    assert_near(found["mismatch"])


def test_placeholders_are_never_sampled(name: str, examined: Callable[[str], Found]) -> None:
    found = examined(name)["placeholders"]
    assert found["wanted"] > 0.5 or not sees_images(name)
    assert found["not_loaded"] == [] and found["tokens"] > 100
    assert found["said"] == []


def test_an_export_answers_alike_in_transformers_and_vllm(
    name: str, examined: Callable[[str], Found]
) -> None:
    """The same tokens, from what each makes of text and images; and nothing is lost or rounded on the way."""
    found = examined(name)
    export, before = found["export"], found["mismatch"][0]
    assert export["changed"] == []
    if exact := "noise" not in before:
        assert export["other_tokens"] == []
    assert_near([export if exact else export | {"noise": before["noise"]}])
