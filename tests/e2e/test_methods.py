"""The methods by one flag, in one process with the transformers engine; and the digits task."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mssr import algorithms
from mssr.runs.checkpoint import read_state
from tests.conftest import Workspace

pytestmark = pytest.mark.e2e
DIGITS_CONFIG = Path(__file__).parents[2] / "configs/digits/mssr.yaml"

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
    names = algorithms.names()
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


# What a step depends on beside the parameters: the uncertainty of every prompt, its last response, first
# values, redrawn groups, an adaptive weight, per-token rewards.
RESUMED = {
    "spo": [
        "algorithm.name=spo",
        "algorithm.baseline.init_rollouts=2",
        "rollout.rollouts_per_step=4",
        "algorithm.kl.target=0.001",
        "algorithm.kl.horizon=20",
    ],
    "dynamic": [
        "algorithm.name=reinforce_pp_baseline",
        "algorithm.kl.placement=reward",
        "algorithm.kl.target=0.01",
        "rollout.n=2",
        "rollout.rollouts_per_step=4",
        "sampler.dynamic=true",
    ],
}
RESUME_EACH = """
import json, sys
from mssr.trainer.train import train

config, out, jobs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for name, options in jobs.items():
    local = ["cluster.launcher=local", "rollout.engine=hf", "actor.num_ranks=1", "data.val=null"]
    for run, steps in (("straight", 4), ("resumed", 2), ("resumed", 4)):
        where = [f"trainer.run_dir={out}/{name}-{run}", f"trainer.steps={steps}", "trainer.save_every=2"]
        assert train(config, [*options, *local, *where]) == 0, name
"""


def test_every_kind_of_state_survives_a_resume(workspace: Workspace, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RESUME_EACH, str(workspace.config), str(tmp_path), json.dumps(RESUMED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = ("timing/", "perf/", "memory/")
    for name in RESUMED:
        straight, resumed = (
            [
                {k: v for k, v in json.loads(line).items() if not k.startswith(measured)}
                for line in (tmp_path / f"{name}-{run}" / "metrics.jsonl").read_text().splitlines()
            ]
            for run in ("straight", "resumed")
        )
        assert len(straight) == 5 and straight == resumed, name
        for step in (3, 4):
            samples = f"samples/step-{step:06d}.jsonl"
            both = [(tmp_path / f"{name}-{run}" / samples).read_text() for run in ("straight", "resumed")]
            assert both[0] == both[1], name
    assert any(r["sampler/draws"] > 1 for r in resumed_records(tmp_path, "dynamic"))
    coefs = [r["policy/kl_coef"] for r in resumed_records(tmp_path, "spo")]
    assert len(set(coefs)) == 4  # it adapts


def resumed_records(directory: Path, name: str) -> list[dict[str, float]]:
    lines = (directory / f"{name}-resumed" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines][1:]


def test_a_reward_that_fails_or_exceeds_its_range_ends_the_run_in_one_line(
    workspace: Workspace, run_mssr: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    local = ["cluster.launcher=local", "rollout.engine=hf", "actor.num_ranks=1", "data.val=null"]
    too_large = f"reward.name={workspace.path / 'reward.py'}:too_large"
    done = run_mssr("train", workspace.config, *local, too_large, f"trainer.run_dir={tmp_path / 'large'}")
    assert done.returncode == 2
    assert "reward.py:too_large" in done.stderr and "[0, 1]" in done.stderr and done.stderr.count("\n") == 1
    reward = f"reward.name={workspace.path / 'reward.py'}:broken"
    done = run_mssr("train", workspace.config, *local, reward, f"trainer.run_dir={tmp_path / 'run'}")
    assert done.returncode == 1
    assert "failed on 16 of 16 responses (RuntimeError: no score today)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "no score today" in (tmp_path / "run/logs/driver.log").read_text()  # with the traceback


@pytest.fixture(scope="module")
def digits(
    run_mssr: Callable[..., subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    data = tmp_path_factory.mktemp("digits") / "digits"
    prepared = run_mssr("prepare", "digits", "--out", data, "--quiet")
    assert prepared.returncode == 0, prepared.stderr
    return data


def short(digits: Path, run_dir: Path) -> list[str | Path]:
    """Arguments of a run of 5 steps."""
    data = [f"data.{split}={digits / split}.parquet" for split in ("train", "val")]
    where = [f"model.path={digits / 'model'}", f"trainer.run_dir={run_dir}"]
    return ["train", DIGITS_CONFIG, *data, *where, "trainer.steps=5"]


def test_mssr_learns_digits(
    run_mssr: Callable[..., subprocess.CompletedProcess[str]], digits: Path, tmp_path: Path
) -> None:
    """The embedded task with the shipped config, only shorter: at least 20 points in 5 steps; and its
    checkpoint, evaluated by the whole command, answers as in its last validation."""
    run_dir = tmp_path / "run"
    done = run_mssr(*short(digits, run_dir), "trainer.progress=plain")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [x.split()[1] for x in lines if x.startswith("step ")] == ["0:", "1/5", "2/5", "3/5", "4/5", "5/5"]
    records = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    before, after = records[0]["val/accuracy"], records[-1]["val/accuracy"]
    assert before <= 0.35
    assert after >= before + 0.2
    assert records[-1]["memory/total_rss_gib"] < 8
    check_baseline_and_shaping(records[1:], read_state(run_dir / "checkpoints/step-000005"))
    assert any(f"{before:.3f} -> {after:.3f}" in x for x in lines)  # the summary at the end
    assert (run_dir / "plots/curves.png").stat().st_size > 10_000
    report = (run_dir / "report.html").read_text()
    assert f"{before:.3f} -&gt; {after:.3f}" in report and "data:image/png;base64," in report
    out = tmp_path / "evaluation"
    val = digits / "val.parquet"
    done = run_mssr("eval", "--model", run_dir, "--benchmarks", val, "--reward", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    items = {x["id"]: x for x in map(json.loads, (out / "items.jsonl").read_text().splitlines())}
    samples = map(json.loads, (run_dir / "samples/step-000005.jsonl").read_text().splitlines())
    validation = {x["id"]: x for x in samples if x["split"] == "val"}
    assert items.keys() == validation.keys() and len(items) == 256
    for prompt_id, item in items.items():
        sample = validation[prompt_id]
        assert (item["response"], float(item["correct"])) == (sample["response"], sample["score"])
    accuracy = json.loads((out / "results.json").read_text())["benchmarks"]["val"]["accuracy"]
    assert accuracy == pytest.approx(after, abs=1e-6)


def check_baseline_and_shaping(steps: list[dict[str, float]], state: dict[str, Any]) -> None:
    """What the method learned, by hand from rewards and KL; each prompt was visited once. That it reaches
    advantages and gradient is in tests/unit/test_driver_by_hand.py and test_update_by_value.py."""
    counts = state["estimator"]["algorithm"]["baseline"]["counts"]
    blocks, rewards, kls = np.split(counts, len(steps)), [], []
    for step, block in zip(steps, blocks, strict=True):
        prior = np.mean(rewards) if rewards else 0.5
        reward = step["reward/score"]
        rewards.append(reward)
        kls.append(step["policy/kl_update"])
        eta = 0.96 - min(np.mean(kls) / 0.01, 1.0) * (0.96 - 0.875)
        assert step["baseline/eta"] == pytest.approx(eta, abs=1e-9)
        assert step["baseline/unseen_fraction"] == 1.0
        right = block[:, 0] > 1
        assert right.mean() == pytest.approx(reward, abs=1e-6)
        expected = eta * np.array([prior, 1 - prior]) + np.stack([right, ~right], axis=1)
        np.testing.assert_allclose(block, expected, atol=1e-6)
        # No bonus exceeds half of |A|, whose mean is at most 1; some are smaller, no sign flips.
        assert 0.001 < step["shaping/mean"] < 0.5
        assert 0 < step["shaping/entropy_branch_fraction"] < 1
        assert step["shaping/sign_flip_fraction"] == 0
        assert step["advantage/std"] == pytest.approx(1.0, abs=1e-3)
    values = counts[:, 0] / counts.sum(1)
    assert steps[-1]["baseline/mean"] == pytest.approx(values.mean(), abs=1e-6)
