"""The methods by one flag, in one process with the transformers engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mssr import algorithms
from tests.conftest import Workspace

pytestmark = pytest.mark.e2e

TRAIN_EACH = """
import sys
from mssr.trainer.train import train
from mssr.runs.export import export

config, out, *names = sys.argv[1:]
for name in names:
    local = ["cluster.launcher=local", "rollout.engine=hf", "actor.num_ranks=1", "data.val=null"]
    once = ["trainer.steps=2", "trainer.save_every=2"]
    code = train(config, [f"algorithm.name={name}", f"trainer.run_dir={out}/{name}", *local, *once])
    assert code == 0, name
    export(f"{out}/{name}", f"{out}/{name}-export")
"""


def test_each_method_trains_with_one_flag(workspace: Workspace, tmp_path: Path) -> None:
    new = {"dbb", "flash_reinforce", "maxrl"}  # of the same parts; by value and by state in tests/unit
    names = sorted(set(algorithms.names()) - new)
    groups = ["dr_grpo", "grpo", "lite_ppo", "reinforce_pp_baseline", "rloo"]
    baselines = ["mssr", "mvsr", "spo"]
    assert names == sorted([*groups, *baselines, "reinforce_pp"])
    command = [sys.executable, "-c", TRAIN_EACH, str(workspace.config), str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    base = load_file(workspace.path / "model/model.safetensors")
    exports = {name: load_file(tmp_path / f"{name}-export" / "model.safetensors") for name in names}
    for name in names:
        records = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records] == [0, 1, 2]
        moved = {k for k in base if not torch.equal(base[k], exports[name][k])}
        assert any("visual" in k for k in moved) and any("layers" in k for k in moved), name
        # The same rollouts for all; a prompt's n answers are next to one another in the samples.
        lines = (tmp_path / name / "samples/step-000001.jsonl").read_text().splitlines()
        ids = [json.loads(x)["id"] for x in lines]
        assert len(ids) == 16
        assert len(set(ids)) == (2 if name in groups else 8), name
        assert ("baseline/eta" in records[1]) == (name in baselines)
        assert ("baseline/drift" in records[1]) == (name == "spo")
        assert (tmp_path / name / "init_rollouts.jsonl").is_file() == (name == "spo")
        assert ("shaping/mean" in records[1]) == (name == "mssr")
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert any(not torch.equal(exports[a][k], exports[b][k]) for k in base), (a, b)


TRAIN_WITH_REWARDS = """
import sys
from mssr.tools.cli import main

config, out, *rewards = sys.argv[1:]
local = ["cluster.launcher=local", "rollout.engine=hf", "actor.num_ranks=1", "data.val=null"]
for name in rewards:
    file, function = name.split(":")
    code = main(["train", config, *local, f"reward.name={name}", f"trainer.run_dir={out}/{function}"])
    print(code, file=sys.stderr)
"""


def test_a_reward_that_fails_or_exceeds_its_range_ends_the_run_in_one_line(
    workspace: Workspace, tmp_path: Path
) -> None:
    rewards = [f"{workspace.path / 'reward.py'}:{function}" for function in ("too_large", "broken")]
    command = [sys.executable, "-c", TRAIN_WITH_REWARDS, str(workspace.config), str(tmp_path), *rewards]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    too_large, code, broken, other_code = done.stderr.splitlines()
    assert "reward.py:too_large" in too_large and "[0, 1]" in too_large and code == "2"
    assert "failed on 16 of 16 responses (RuntimeError: no score today)" in broken and other_code == "1"
    assert "no score today" in (tmp_path / "broken/logs/driver.log").read_text()  # with the traceback
