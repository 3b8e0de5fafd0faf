"""What `mssr export` takes over from the model that was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from mssr.config.run import to_dict
from mssr.models.loading import load_model
from mssr.runs import export as export_tool
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("said_of", ["model", "text_config"])
def test_weights_have_the_dtype_of_the_model_that_was_trained(
    workspace_of: Callable[[str], Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said_of: str
) -> None:
    """Published files of Qwen3-VL say it of the language model only."""
    workspace = workspace_of("qwen3_vl")
    shutil.copytree(workspace.path / "model", tmp_path / "model")
    tree = json.loads((tmp_path / "model/config.json").read_text())
    for part in (tree, tree["text_config"], tree["vision_config"]):
        part.pop("dtype", None)
    (tree if said_of == "model" else tree[said_of])["dtype"] = "bfloat16"
    (tmp_path / "model/config.json").write_text(json.dumps(tree))
    config = load_config(workspace.config, [f"model.path={tmp_path / 'model'}"])
    state = load_model(config.model, torch.float32).state_dict()
    dcp.save({"model": state}, checkpoint_id=str(tmp_path / "saved/actor"), no_dist=True)
    monkeypatch.setattr(export_tool, "verify", lambda path: SimpleNamespace(config=to_dict(config)))
    out = export_tool.export(tmp_path / "saved", tmp_path / "out")
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
