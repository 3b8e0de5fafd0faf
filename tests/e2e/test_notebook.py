"""examples/notebook.ipynb in a short form: its cells as they are, on a smaller task, with shorter runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from mssr.data.digits import DigitsSettings, WarmStartSettings, prepare, task

pytestmark = pytest.mark.e2e
NOTEBOOK = Path(__file__).parents[2] / "examples/notebook.ipynb"
LITTLE = DigitsSettings(
    train_rows=32, val_rows=8, threads=1, warm_start=WarmStartSettings(reading_steps=2, habit_steps=1)
)
SHORT = (
    "cluster.launcher=local rollout.engine=hf rollout.workers=1 actor.num_ranks=1 actor.updates_per_step=1 "
    "rollout.rollouts_per_step=16 trainer.steps=2 trainer.val_every=1"
)


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_it_trains_draws_and_shows_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = task.fingerprint(0, DigitsSettings())
    monkeypatch.setattr(task, "fingerprint", lambda *_: whole)  # the command is to find its work done
    prepare(tmp_path / "data/digits", quiet=True, settings=LITTLE)
    monkeypatch.setenv("MSSR_NOTEBOOK_OPTIONS", SHORT)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    texts = ["".join(o.text if "text" in o else o.data["text/html"] for o in outputs) for outputs in cells]
    _, prepared, _, first, samples, second = texts

    assert "is up to date" in prepared
    check_curves(first, tmp_path / "runs/digits-mssr", "mssr")
    check_curves(second, tmp_path / "runs/digits-grpo", "grpo")
    assert '<li class="s0">digits-mssr</li><li class="s1">digits-grpo</li>' in second
    assert samples.count("<tr>") == samples.count("data:image/jpeg;base64,") == LITTLE.val_rows
    assert samples.count("step 0:") == samples.count("step 2:") == LITTLE.val_rows
    report = tmp_path / "runs/digits-mssr/report.html"
    assert str(report) in samples and report.is_file()


def check_curves(drawn: str, run: Path, method: str) -> None:
    """The last curves of a cell are those of a whole run with a method."""
    assert yaml.safe_load((run / "config.yaml").read_text())["algorithm"]["name"] == method
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    for title, key in (("validation accuracy", "val/accuracy"), ("reward", "reward/score")):
        numbers = re.search(rf">{title}</figcaption>.*?<script .*?>(.*?)</script>", drawn)
        assert numbers, f"no curve of {title}"
        curve = json.loads(numbers[1])["series"][-1]
        there = [record for record in records if key in record]
        assert curve["x"] == [record["step"] for record in there]
        assert curve["y"] == pytest.approx([record[key] for record in there], abs=1e-5)
