"""Parts that train with the real command."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mssr.cluster.machine import describe
from mssr.data.digits.task import DigitsSettings, WarmStartSettings, prepare
from mssr.models.memory import colocated_fits
from mssr.models.rank_memory import GIB
from mssr.runs.config import load_config
from scripts.acceptance.parts import NotPossible, Place, Told, layout, mssr, records, train
from scripts.bench.workload import draw_lengths, write_model, write_rows
from tests.chaos.run import STEPS, Run
from tests.conftest import make_workspace

MISMATCH = 0.002
"""Largest `rollout/mismatch_kl`, nats a token, of engine and actor in bfloat16. On a CPU it is 1e-4 in the
run of `transport`, whose updates move the policy by 0.1 to 0.5: old weights would show."""
EXACT = 1e-5
"""Largest difference of log-probs in float32, which the CPU computes in."""


def doctor(place: Place) -> Told:
    """`mssr doctor`: a warning is told, an error fails."""
    rows = json.loads(mssr("doctor", "--json", fine=(0, 2)))
    wrong = [f"{r['check']}: {r['found']}; {r['advice']}" for r in rows if r["status"] == "error"]
    assert not wrong, " / ".join(wrong)
    return {r["check"]: r["found"] for r in rows if r["status"] == "warning" or "GB/s" in r["found"]}


def gpu_tests(place: Place) -> Told:
    """Those tests that the other machines leave out."""
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"])
    assert ran.returncode == 0, "see above"
    return {}


def check_agreement(place: Place, steps: Sequence[dict[str, Any]]) -> Told:
    """Engine and actor give the same tokens the same log-probs, after every transfer of weights."""
    largest = max(r["rollout/mismatch_max"] for r in steps)
    kl = max(r["rollout/mismatch_kl"] for r in steps)
    assert kl < MISMATCH, f"rollout/mismatch_kl {kl:.4f}: the engine has other weights than the actor"
    assert place.gpus or largest < EXACT, f"rollout/mismatch_max {largest:.1e}"
    return {"log-probs of engine and actor": f"KL at most {kl:.1e}, largest difference {largest:.1e}"}


def transport(place: Place, placement: str, kind: str) -> Told:
    """`three_steps` of Qwen2.5-VL with weights that go another way."""
    options = [*layout(place, placement), f"cluster.weight_transfer={kind}"]
    return three_steps(place, f"transport-{placement}-{kind}", "qwen2_5_vl", options)


def family(place: Place, model_type: str) -> Told:
    """`three_steps` of another family."""
    return three_steps(place, f"family-{model_type}", model_type, layout(place, "colocated"))


def three_steps(place: Place, name: str, model_type: str, options: Sequence[str]) -> Told:
    """With a tiny model whose vision tower and tied head are trained; checksums after every transfer."""
    config = place.scratch / f"workspace-{model_type}" / "config.yaml"
    if not config.exists():
        config.parent.mkdir()
        make_workspace(config.parent, model_type)
    every = ["rollout.check_weights=always", "trainer.val_every=0"]
    steps = train(place, name, config, [*options, *every])
    sync = statistics.median(r["timing/sync_s"] for r in steps)
    return check_agreement(place, steps) | {"transfer": f"{sync:.2f} s"}


def digits(place: Place, placement: str) -> Told:
    """The embedded task, to the accuracy that it has on a CPU; quick, it only begins to learn."""
    tiny = place.quick and not place.gpus
    settings = DigitsSettings()
    if tiny:
        settings = DigitsSettings(64, 16, WarmStartSettings(reading_steps=3, habit_steps=3, batch_size=16))
    prepare(place.scratch / "digits", quiet=True, settings=settings)
    data = [f"data.{split}={place.scratch}/digits/{split}.parquet" for split in ("train", "val")]
    # On the CPU this is also how engines are given weights in the way that is not the usual one.
    transfer = [] if place.gpus else ["cluster.weight_transfer=broadcast"]
    options = [*layout(place, placement), *data, f"model.path={place.scratch}/digits/model", *transfer]
    options += ["rollout.check_weights=always"]
    if place.quick:
        options += ["trainer.steps=3", "trainer.val_every=3"] if tiny else ["trainer.steps=20"]
    if tiny:
        options += ["rollout.rollouts_per_step=16", "rollout.max_response_length=8"]
    found = train(place, f"digits-{placement}", Path("configs/digits/mssr.yaml"), options)
    accuracies = [r["val/accuracy"] for r in found if "val/accuracy" in r]
    steps = [r for r in found if r["step"]]
    told = {"accuracy": f"{accuracies[0]:.1%} -> {accuracies[-1]:.1%} in {len(steps)} steps"}
    wanted = None if tiny else 0.5 if place.quick else 0.9
    assert wanted is None or accuracies[-1] > wanted, f"{told['accuracy']}, expected {wanted:.0%}"
    return told | speeds(steps) | check_agreement(place, steps)


def speeds(steps: Sequence[dict[str, Any]]) -> Told:
    """Medians after the first step, which warms up, and the largest peaks."""
    told = {}
    for key, name, form in (
        ("timing/step_s", "step", "{:.2f} s"),
        ("timing/rollout_s", "generation", "{:.2f} s"),
        ("timing/update_s", "update", "{:.2f} s"),
        ("timing/sync_s", "transfer", "{:.2f} s"),
        ("perf/rollouts_per_s", "rollouts/s", "{:.1f}"),
        ("perf/tokens_per_s_per_gpu", "tokens/s/GPU", "{:.0f}"),
        ("perf/update_tflops", "update TFLOP/s a rank", "{:.3g}"),
        ("perf/mfu", "MFU", "{:.1%}"),
    ):
        if values := [r[key] for r in steps[1:] if key in r]:
            told[name] = form.format(statistics.median(values))
    for role in ("actor", "rollout"):
        if peaks := [r[key] for r in steps if (key := f"memory/{role}_gpu_gib") in r]:
            told[f"GPU memory, {role}"] = f"{max(peaks):.1f} GiB"
    return told


def memory(place: Place) -> Told:
    """The digits runs: from their tenth step to the last, memory of host and GPU stays what it was."""
    told = {}
    for run_dir in sorted(place.scratch.glob("digits-*")):
        steps = [r for r in records(run_dir) if r["step"]]
        begin = min(10, len(steps) // 2)
        for key in sorted(k for k in steps[0] if k.startswith("memory/")):
            first, last = (
                statistics.median(r[key] for r in part) for part in (steps[begin:][:5], steps[-5:])
            )
            told[f"{run_dir.name} {key.removeprefix('memory/')}"] = f"{first:.2f} -> {last:.2f}"
            assert last < 1.05 * first + 0.1, f"{run_dir.name}: {key} {first:.2f} -> {last:.2f} GiB"
        told[f"{run_dir.name}, steps"] = str(len(steps))
    if not told:
        raise NotPossible("no run of the digits to look at")
    return told


FULL_OR_LESS = (
    [],
    ["actor.optimizer=adamw_8bit", "actor.offload_reference=true"],
    ["actor.master_dtype=bfloat16", "actor.offload=optimizer", "actor.offload_reference=true"],
    ["actor.lora.rank=64", "actor.lr=1.0e-5"],
)
"""What to train with; the first that fits."""


def shape(place: Place, size: str) -> Told:
    """A few whole steps in the shape of a real model, with random weights, and responses of full length."""
    if place.quick and size == "7b" and place.gpus:
        raise NotPossible("left out by --quick")
    size, scale = (size, 1.0) if place.gpus else ("tiny", 0.1)
    directory = place.scratch / f"model-{size}"
    if shutil.disk_usage(place.scratch).free < 40 * GIB and size != "tiny":
        raise NotPossible(f"{place.scratch} has less than 40 GiB free")
    dtype = torch.bfloat16 if place.gpus else torch.float32
    write_model(directory / "model", size, torch.device("cpu"), dtype)  # the GPU's memory is for others
    count = 128 * place.gpus or 8
    rows = write_rows(directory, draw_lengths(count, 1, scale)[0], scale)
    (directory / "reward.py").write_text("def even(response, answer):\n    return float(len(response) % 2)\n")
    config: dict[str, Any] = {
        "model": {"path": str(directory / "model")},
        "data": {"train": str(rows), "id_column": "id", "instruction": "", "min_pixels": 3136},
        "reward": {"name": f"{directory / 'reward.py'}:even"},
        "rollout": {"rollouts_per_step": count, "max_response_length": int(512 * scale), "kv_cache_gib": 1},
        "actor": {"updates_per_step": 4, "activation_checkpointing": size != "tiny"},
        "trainer": {"steps": 2 if place.quick else 4, "val_every": 0, "save_every": 0},
    }
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    options = layout(place, "colocated") if place.gpus else ["cluster.launcher=local", "rollout.engine=hf"]
    method = fitting(file, options) if place.gpus else []
    told = {"method": " ".join(method) or "full training"}
    try:
        return told | speeds(
            [r for r in train(place, f"shape-{size}", file, [*options, *method]) if r["step"]]
        )
    finally:
        shutil.rmtree(directory / "model")


def fitting(file: Path, options: list[str]) -> list[str]:
    """The first way to train for which memory is planned to be enough.

    Raises:
        NotPossible: there is none.
    """
    gpu_bytes, reason = min(gpu.total_bytes for gpu in describe().gpus), ""
    for method in FULL_OR_LESS:
        fits, reason = colocated_fits(load_config(file, [*options, *method]), gpu_bytes)
        if fits:
            return method
    raise NotPossible(reason)


def kill(place: Place) -> Told:
    """SIGKILL of an engine, of a rank and of the driver; the run ends as if nothing had been."""
    directory = place.scratch / "kill"
    directory.mkdir()
    workspace = make_workspace(directory)
    run = Run(directory / "course", workspace.config)
    run.extra = [*layout(place, "colocated"), f"cluster.device={place.device}", "actor.lr=1.0e-3"]
    if not place.gpus:
        run.extra += ["rollout.engine=hf"]  # starts sooner than vLLM
    told = {}
    try:
        run.start()
        for step, log in ((2, "rollout-0.log"), (4, "actor-0.log")):
            run.reach(step)
            assert run.process.poll() is None, run.screen.read_text()[-300:]
            told[f"after step {step}"] = run.kill(log)
        run.reach(6)
        run.process.kill()
        run.process.wait()
        told["after step 6"] = "SIGKILL to the driver, started again"
        run.start()
        assert run.wait() == 0, run.screen.read_text()[-300:]
        found = run.metrics()
        assert [r["step"] for r in found] == list(range(STEPS + 1)), "steps are missing or twice there"
        events = {e["event"] for e in run.events()}
        assert events >= {"engine_died", "actor_rank_died"}, f"events are {sorted(events)}"
        return told | {"steps": str(STEPS)} | check_agreement(place, found[1:])
    finally:
        run.close()
