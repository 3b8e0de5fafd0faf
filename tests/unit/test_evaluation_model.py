"""What `mssr eval` asks under which config, the file of responses, and what the user sees."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml

from mssr.config import Config, to_dict
from mssr.errors import UserError
from mssr.evaluation.model import open_model
from mssr.evaluation.responses import Response, ResponseFile
from mssr.evaluation.runner import EvaluationProgress
from mssr.runs.config import load_config
from mssr.runs.manifest import Manifest, write_manifest
from tests.conftest import Workspace

pytestmark = pytest.mark.unit


def test_a_model_without_config_gets_the_defaults(workspace: Workspace) -> None:
    model = open_model(str(workspace.path / "model"), None, ["rollout.workers=2"], False, print)
    assert model.config.data.instruction == Config().data.instruction
    assert model.config.data.max_prompt_length > Config().data.max_prompt_length
    assert model.config.rollout.workers == 2 and model.label == "model"


RESPONSES = [Response("a", str(k), 0, "text\u2028\ud800", 3, "stop") for k in range(4)]


def test_a_cut_part_is_removed(tmp_path: Path) -> None:
    file = ResponseFile(tmp_path, {"model": "m"})
    file.append(RESPONSES[:2])
    whole = file.path.read_bytes()
    file.append(RESPONSES[2:])
    everything = file.path.read_bytes()
    # Whatever is missing of the last part, the part is gone and the one before stays.
    for cut in range(len(whole), len(everything)):
        file.path.write_bytes(everything[:cut])
        again = ResponseFile(tmp_path, {"model": "m"})
        assert list(again.found.values()) == RESPONSES[:2], cut
        assert file.path.read_bytes() == whole
    again.append(RESPONSES[2:])
    assert file.path.read_bytes() == everything
    assert list(ResponseFile(tmp_path, {"model": "m"}).found.values()) == RESPONSES


def test_a_damaged_header_is_an_error(tmp_path: Path) -> None:
    ResponseFile(tmp_path, {"model": "m"})
    path = tmp_path / "responses.jsonl"
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match="is damaged; remove it, or choose another --out"):
        ResponseFile(tmp_path, {"model": "m"})


def test_progress_shows_the_accuracy_so_far() -> None:
    stream = io.StringIO()
    progress = EvaluationProgress(stream, "plain", 8)
    progress.update(4, {"mathvista": (1, 4), "mmk12": (3, 4)})
    progress.close()
    assert stream.getvalue() == "4/8 responses  accuracy so far 0.500  mathvista 0.250 mmk12 0.750\n"
    quiet = io.StringIO()
    progress = EvaluationProgress(quiet, "auto", 8)  # no terminal
    progress.update(4, {})
    progress.note("starting")
    progress.announce("engine 0 died")
    assert quiet.getvalue() == "mssr: engine 0 died\n"
    live = io.StringIO()
    progress = EvaluationProgress(live, "live", 8)
    progress.update(4, {"mathvista": (1, 4)})
    progress.close()
    assert "accuracy so far 0.250" in live.getvalue()


def test_a_checkpoint_is_asked_as_it_was_trained(workspace: Workspace, tmp_path: Path) -> None:
    """Template, instruction, pixels and lengths of its training; what only training reads is left behind."""
    tree = yaml.safe_load(workspace.config.read_text())
    tree["data"] |= {"instruction": "Be brief.", "max_prompt_length": 99}
    tree["rollout"] |= {"max_response_length": 17, "rollouts_per_step": 8}
    tree["algorithm"] = {"name": "grpo"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    config = load_config(file)
    checkpoint = tmp_path / "myrun" / "checkpoints" / "step-000004"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, Manifest(4, to_dict(config), None), {})
    (checkpoint.parent / "latest").write_text(checkpoint.name)
    for name in (checkpoint, checkpoint.parent / "latest", tmp_path / "myrun"):
        model = open_model(str(name), None, [], False, print)
        data, rollout = model.config.data, model.config.rollout
        assert (data.instruction, data.max_prompt_length, data.id_column) == ("Be brief.", 99, "id")
        assert (rollout.max_response_length, model.step) == (17, 4)
        assert model.config.model.path == str(workspace.path / "model")
        assert (model.label, model.config.reward.name) == ("myrun-step-000004", "exact_match")
    changed = open_model(str(checkpoint), None, ["data.max_prompt_length=64"], True, print)
    assert changed.config.data.max_prompt_length == 64
    assert changed.config.reward.name == config.reward.name
    with pytest.raises(UserError, match="is a checkpoint and has its own"):
        open_model(str(checkpoint), str(file), [], False, print)
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 4', '"step": 5'))
    with pytest.raises(UserError, match="damaged"):
        open_model(str(checkpoint), None, [], False, print)
