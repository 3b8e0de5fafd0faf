"""What a user can get wrong ends in one line that names it, with exit code 2, before any worker starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mssr.tools import errors
from mssr.tools.cli import main
from tests.conftest import Workspace, make_rows, write_rows

pytestmark = pytest.mark.unit


@pytest.fixture
def fails(
    workspace: Workspace, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Train with overrides, expect exit code 2, return the line on stderr."""

    def no_workers(config: object) -> None:
        raise AssertionError("workers were started")

    monkeypatch.setattr("mssr.trainer.session.launch", no_workers)
    monkeypatch.setenv("MSSR_CACHE", str(tmp_path / "cache"))

    def run(*overrides: str, run_dir: Path | None = None) -> str:
        arguments = [str(workspace.config), f"trainer.run_dir={run_dir or tmp_path / 'run'}", *overrides]
        assert main(["train", *arguments]) == 2
        error = capfd.readouterr().err
        assert error.startswith("mssr: error: ") and error.count("\n") == 1
        assert errors.find(error.strip()), f"mssr explain does not know {error}"
        return error

    return run


def test_missing_data_file(fails) -> None:
    assert "nowhere.parquet does not exist" in fails("data.train=nowhere.parquet")
    assert "neither a file, a directory nor hub/name@split" in fails("data.val=nowhere")


def test_wrong_lists_of_sources(fails, workspace: Workspace) -> None:
    good = workspace.path / "train.parquet"
    assert "unknown key 'wieght'" in fails(f"data.train=[{{path: {good}, wieght: 2}}]")
    assert "must be above 0" in fails(f"data.train=[{{path: {good}, weight: 0}}]")
    assert "only data.train" in fails(f"data.val=[{{path: {good}, weight: 1}}]")
    assert "nowhere.csv does not exist" in fails(f"data.train=[{good}, nowhere.csv]")
    assert "a file is one split" in fails(f"data.train={good}@test")


def test_missing_column(fails) -> None:
    error = fails("data.answer_column=solution")
    assert "no column 'solution'" in error and "data.answer_column" in error and "problem" in error


def test_damaged_data_file(fails, tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    assert "bad.parquet cannot be opened" in fails(f"data.train={tmp_path / 'bad.parquet'}")


@pytest.fixture
def damaged(workspace: Workspace, tmp_path: Path) -> Path:
    """Row 1 has a truncated image, row 3 none where it should, row 5 no question, row 6 a repeated id."""
    write_rows(tmp_path / "good.parquet", make_rows(8, "t", seed=1))
    table = pq.read_table(tmp_path / "good.parquet")
    rows = table.to_pylist()
    rows[1]["images"][0]["bytes"] = rows[1]["images"][0]["bytes"][:60]
    rows[3]["images"][0] = {"bytes": None, "path": None}
    rows[5]["problem"] = " "
    rows[6]["id"] = "t0"
    path = tmp_path / "damaged.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return path


def test_unusable_rows_are_named_and_listed(fails, damaged: Path, tmp_path: Path) -> None:
    error = fails(f"data.train={damaged}")
    assert "4 of 8 rows are bad" in error and "damaged.parquet row" in error
    listed = [json.loads(x) for x in (tmp_path / "run/bad_rows.jsonl").read_text().splitlines()]
    reasons = {x["where"].rsplit(" ", 1)[1]: x["reason"] for x in listed}
    assert set(reasons) == {"1", "3", "5", "6"}
    assert "image 0 cannot be read" in reasons["1"]
    assert "missing" in reasons["3"]
    assert "problem is empty" in reasons["5"]
    assert "t0 occurs twice" in reasons["6"]


def test_unusable_rows_may_be_allowed(
    workspace: Workspace, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mssr.data.encoder import PromptEncoder
    from mssr.data.loading import load_prompts
    from mssr.models.loading import load_processor
    from mssr.runs.config import load_config

    monkeypatch.setenv("MSSR_CACHE", str(tmp_path / "cache"))
    config = load_config(workspace.config, ["data.max_bad_fraction=0.5"])
    encoder = PromptEncoder(load_processor(config.model), config.data)
    loaded = load_prompts(str(damaged), config.data, encoder, tmp_path / "bad_rows.jsonl")
    assert loaded.dataset.ids == ["t0", "t2", "t4", "t7"] and loaded.bad == 4
    assert loaded.dataset.row("t4").answer == "4"


def test_train_and_validation_rows_may_share_ids(workspace: Workspace) -> None:
    from mssr.data.prompt_source import PromptSource
    from mssr.runs.config import load_config

    source = PromptSource(load_config(workspace.config))
    train, val = source.row("t0"), source.row("val/t0")
    assert "train.parquet row 0" in train.where and "val.parquet row 0" in val.where
    assert train.images[0].read() != val.images[0].read()


def test_only_overlong_prompts(fails) -> None:
    assert "data.max_prompt_length=5" in fails("data.max_prompt_length=5")


def test_what_is_no_model(fails, workspace: Workspace, tmp_path: Path) -> None:
    assert "/no/model does not exist" in fails("model.path=/no/model")
    assert "config.json" in fails(f"model.path={tmp_path}")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "is a llama model" in fails(f"model.path={other}")
    partial = tmp_path / "partial"
    shutil.copytree(workspace.path / "model", partial)
    (partial / "tokenizer.json").unlink()
    assert "has no processor" in fails(f"model.path={partial}")
    (partial / "model.safetensors").unlink()
    assert "no *.safetensors" in fails(f"model.path={partial}")


def test_unknown_reward(fails, tmp_path: Path) -> None:
    assert "exact_matsch" in fails("reward.name=exact_matsch")
    assert "nofile.py" in fails(f"reward.name={tmp_path}/nofile.py:score")


def test_a_run_directory_of_another_run(fails, workspace: Workspace, tmp_path: Path) -> None:
    from mssr.runs.config import load_config
    from mssr.runs.run_directory import prepare_run_directory

    run_dir = tmp_path / "taken"

    def prepare(*overrides: str) -> tuple[str, ...]:
        config = load_config(workspace.config, [f"trainer.run_dir={run_dir}", *overrides])
        with prepare_run_directory(config) as notes:
            return notes

    prepare("seed=9")
    # Nothing was trained yet, so the corrected config may take over.
    assert prepare() == ()
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    before = (run_dir / "config.yaml").read_text()
    error = fails("algorithm.name=rloo", "seed=3", "actor.lr=0.1", run_dir=run_dir)
    assert "algorithm.name: mssr -> rloo" in error and "seed: 0 -> 3" in error and "actor.lr" not in error
    assert "trainer.resume_force" in error
    assert (run_dir / "config.yaml").read_text() == before
    # How it is computed may change, what it computes may not; in between, the user is told.
    assert prepare("trainer.steps=9") == ()
    assert prepare("actor.lr=0.1") == ("changed since the state was saved: actor.lr: 0.001 -> 0.1",)
    assert prepare("actor.lr=0.1") == ()
    forced = prepare("actor.lr=0.1", "seed=3", "trainer.resume_force=true")
    assert forced == ("changed by trainer.resume_force, against the saved state: seed: 0 -> 3",)
    error = fails("seed=3", "actor.lora.rank=4", "trainer.resume_force=true", run_dir=run_dir)
    assert "actor.lora.rank: 0 -> 4" in error and "another form" in error and "seed" not in error
    assert "already holds a run" in fails("trainer.resume=never", "seed=3", run_dir=run_dir)
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n'
    (run_dir / "config.yaml").write_text("a: [1")
    assert "config.yaml is damaged" in fails(run_dir=run_dir)


def test_resume_from_nothing(fails, tmp_path: Path) -> None:
    message = fails(f"trainer.resume={tmp_path / 'gone'}")
    assert "trainer.resume: " in message and "no such directory" in message


def test_a_wrong_config_is_refused_before_the_seconds_of_imports(workspace: Workspace) -> None:
    program = (
        "import sys\nfrom mssr.tools import cli\n"
        "code = cli.main(['train', sys.argv[1], 'actor.num_rank=1'])\n"
        "print(code, *{'ray', 'transformers', 'torchvision', 'datasets', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(workspace.config)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "2\n" and "actor.num_ranks" in done.stderr


def test_other_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plot", str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "neither a run directory nor a complete checkpoint" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step"')
    assert main(["plot", str(tmp_path)]) == 2
    assert "line 2 is damaged" in capsys.readouterr().err
