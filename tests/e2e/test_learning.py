"""The digits task learned by other families than Qwen2.5-VL, with the shipped configs of both kinds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from mssr.data.digits import DigitsSettings, WarmStartSettings, prepare

pytestmark = pytest.mark.e2e
CONFIGS = Path(__file__).parents[2] / "configs/digits"
# A base model that reads less well than the command's and is made in a third of the time. One thread, so that
# it is the same on every machine.
SMALL = DigitsSettings(
    train_rows=1280,
    val_rows=128,
    warm_start=WarmStartSettings(reading_steps=240, habit_steps=40, batch_size=32, learning_rate=2e-3),
    threads=1,
)


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
    """At least 20 points in 10 steps, on scans or questions that training has not seen."""
    prepare(tmp_path / "digits", quiet=True, settings=SMALL, model_type=model_type)
    data = [f"data.{split}={tmp_path}/digits/{split}.parquet" for split in ("train", "val")]
    where = [f"model.path={tmp_path}/digits/model", f"trainer.run_dir={tmp_path}/run"]
    short = ["trainer.steps=10", "trainer.val_every=10", "trainer.save_every=0"]
    small = ["rollout.rollouts_per_step=128", "rollout.workers=1"]
    done = run_mssr("train", CONFIGS / config, *data, *where, *short, *small, *options)
    assert done.returncode == 0, done.stderr
    records = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(records) == 11
    assert records[-1]["val/accuracy"] >= records[0]["val/accuracy"] + 0.2
    # Engine and actor are the same policy, but for rounding: of a log-prob by a percent or so in bfloat16.
    mismatch = max(r["rollout/mismatch_kl"] for r in records[1:])
    assert (1e-7 < mismatch < 1e-3) if options is ON_GPUS else mismatch < 1e-5
    assert all(r["policy/skipped_updates"] == 0 for r in records[1:])
