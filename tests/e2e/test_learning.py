"""The digits task learned by Qwen2.5-VL and by other families, with the shipped configs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mssr.data.digits import DigitsSettings, WarmStartSettings, prepare
from mssr.runs.checkpoint import read_state

pytestmark = pytest.mark.e2e
CONFIGS = Path(__file__).parents[2] / "configs/digits"
# A base model that reads less well than that of the command, whose settings tests/unit/test_digits.py holds.
# The same code makes it in a third of the time. One thread, so that it is the same on every machine.
SMALL = DigitsSettings(
    train_rows=1280,
    val_rows=128,
    warm_start=WarmStartSettings(reading_steps=240, habit_steps=40, batch_size=32, learning_rate=2e-3),
    threads=1,
)


def test_mssr_learns_digits(
    run_mssr: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """The embedded task with the shipped config, only shorter: at least 20 points in 5 steps; and its
    checkpoint, evaluated by the whole command, answers as in its last validation."""
    digits, run_dir = tmp_path / "digits", tmp_path / "run"
    prepare(digits, quiet=True, settings=SMALL)
    data = [f"data.{split}={digits / split}.parquet" for split in ("train", "val")]
    where = [f"model.path={digits / 'model'}", f"trainer.run_dir={run_dir}"]
    short = ["trainer.steps=5", "trainer.progress=plain"]
    done = run_mssr("train", CONFIGS / "mssr.yaml", *data, *where, *short)
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
    report = (run_dir / "report.html").read_text()
    assert f"{before:.3f} -&gt; {after:.3f}" in report and "data:image/jpeg;base64," in report
    out = tmp_path / "evaluation"
    val = digits / "val.parquet"
    # One engine: that two give the same is in test_evaluation.py.
    alone = ["rollout.workers=1", "cluster.launcher=local"]
    done = run_mssr("eval", "--model", run_dir, "--benchmarks", val, "--reward", "--out", out, *alone)
    assert (done.returncode, done.stderr) == (0, "")
    items = {x["id"]: x for x in map(json.loads, (out / "items.jsonl").read_text().splitlines())}
    samples = map(json.loads, (run_dir / "samples/step-000005.jsonl").read_text().splitlines())
    validation = {x["id"]: x for x in samples if x["split"] == "val"}
    assert items.keys() == validation.keys() and len(items) == SMALL.val_rows
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


# With images as a GPU does by default, engine and passes of two ranks in bfloat16 on float32 parameters; in
# words as where there is neither Ray nor vLLM.
ON_GPUS = ["model.dtype=bfloat16"]
ALONE = ["cluster.launcher=local", "rollout.engine=hf", "actor.num_ranks=1"]


@pytest.mark.parametrize(
    ("model_type", "config", "options"),
    [("qwen3_vl", "qwen3_vl.yaml", ON_GPUS), ("qwen3", "text.yaml", ALONE)],
)
def test_mssr_learns_digits_with_images_and_in_words(
    model_type: str,
    config: str,
    options: list[str],
    run_mssr: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """At least 20 points in 5 steps, on scans or questions that training has not seen."""
    prepare(tmp_path / "digits", quiet=True, settings=SMALL, model_type=model_type)
    data = [f"data.{split}={tmp_path}/digits/{split}.parquet" for split in ("train", "val")]
    where = [f"model.path={tmp_path}/digits/model", f"trainer.run_dir={tmp_path}/run"]
    short = ["trainer.steps=5", "trainer.val_every=5", "trainer.save_every=0"]
    small = ["rollout.rollouts_per_step=128", "rollout.workers=1"]
    done = run_mssr("train", CONFIGS / config, *data, *where, *short, *small, *options)
    assert done.returncode == 0, done.stderr
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 6
    assert records[-1]["val/accuracy"] >= records[0]["val/accuracy"] + 0.2
    # Engine and actor are the same policy, but for rounding: of a log-prob by a percent or so in bfloat16.
    mismatch = max(r["rollout/mismatch_kl"] for r in records[1:])
    assert (1e-7 < mismatch < 1e-3) if options is ON_GPUS else mismatch < 1e-5
    assert all(r["policy/skipped_updates"] == 0 for r in records[1:])
