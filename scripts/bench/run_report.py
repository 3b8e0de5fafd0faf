"""Time and size of a run's report: 120 steps of 16,384 rollouts with images, as they would be recorded.

python scripts/bench/run_report.py --out scripts/bench/results/run_report.md

A run directory is generated: metrics of every step, and every 10 steps what the recorder itself writes of the
rollouts and of 1,024 validation prompts, with photographs of 640 x 480. Told are what the recorder costs a
step, what the images and the report cost its thread, and the size of the page.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from PIL import Image
from report import MIB, arguments, publish

from mssr.data.dataset import PromptDataset
from mssr.runs.plot import write_report
from mssr.trainer.collect import Collected
from mssr.trainer.samples import SampleRecorder
from mssr.types import Rollout, TrainBatch

STEPS, ROLLOUTS, EVERY, PROMPTS, VALIDATION = 120, 16_384, 10, 50_000, 1_024
RESPONSE = "<think>" + "The angle at the centre is twice that at the circle. " * 25 + "</think>\\boxed{42}"
METRICS = (
    "reward/accuracy reward/score policy/entropy policy/kl_update policy/kl_ref policy/loss policy/grad_norm "
    "rollout/response_length rollout/tokens baseline/eta baseline/mean advantage/std shaping/mean "
    "timing/rollout_s timing/reward_s timing/update_s timing/sync_s timing/step_s perf/tokens_per_s perf/mfu "
    "memory/total_rss_gib memory/actor_gpu_gib watch/entropy_collapsed watch/accuracy_dropped "
    "watch/length_exploded rollout/mismatch_kl rollout/mismatch_max correction/weight epoch"
).split()


class Photograph:
    """An image that compresses like one: smooth, with some noise."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def decode(self) -> Image.Image:
        rng = np.random.default_rng(self.seed)
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC), np.int16)
        noise = rng.integers(-12, 13, smooth.shape, np.int16)
        return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


class Rows:
    """A data set of one question with a picture of its own for every prompt."""

    def row(self, prompt_id: str) -> Any:
        image = Photograph(int(prompt_id.rpartition("-")[2]))
        return SimpleNamespace(question="<image>How large is the angle x?", answer="42", images=(image,))


def rollouts(ids: Sequence[str]) -> list[Rollout]:
    tokens, log_probs = np.zeros(400, np.int32), np.zeros(400, np.float32)
    return [Rollout(i, 0, tokens, tokens, log_probs, "stop", 0, RESPONSE) for i in ids]


def measure() -> list[str]:
    rng, dataset = np.random.default_rng(0), cast(PromptDataset, Rows())
    recording, report = [], []
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory)
        (run_dir / "samples").mkdir()
        lines = [{"step": k} | {key: float(rng.random()) for key in METRICS} for k in range(STEPS + 1)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        recorder = SampleRecorder(run_dir, print)
        validation = rollouts([f"val/{k}-{k}" for k in range(VALIDATION)])
        for step in range(EVERY, STEPS + 1, EVERY):
            found = rollouts([f"p-{k}" for k in rng.choice(PROMPTS, ROLLOUTS, replace=False)])
            scores = rng.integers(0, 2, ROLLOUTS).astype(np.float32)
            batch = TrainBatch.of(found)
            start = time.perf_counter()
            recorder.train(step, dataset, Collected(found, scores, {}, 0.0), batch, scores)
            recorder.validation(
                step, "val", dataset, validation, rng.integers(0, 2, VALIDATION).astype(np.float32)
            )
            recording.append(time.perf_counter() - start)
        start = time.perf_counter()
        recorder.close()
        images = time.perf_counter() - start
        for _ in range(3):
            start = time.perf_counter()
            write_report(run_dir)
            report.append(time.perf_counter() - start)
        size = (run_dir / "report.html").stat().st_size
        count = len(list((run_dir / "images").iterdir()))
    return [
        f"| of {STEPS} steps of {ROLLOUTS:,} rollouts, samples every {EVERY} | |",
        "| --- | --- |",
        f"| recording in a step: median (most) | {np.median(recording):.3f} s ({max(recording):.3f} s) |",
        f"| {count} images, in the report's thread, together | {images:.2f} s |",
        f"| the report, in its thread: median of 3 | {np.median(report):.2f} s |",
        f"| report.html | {size / MIB:.2f} MiB |",
    ]


if __name__ == "__main__":
    publish(arguments(__doc__).parse_args(), measure)
