"""`mssr train` as a user runs it: Ray, vLLM, two FSDP2 ranks, on a random tiny model."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mssr.runs.checkpoint import read_state
from mssr.tools.cli import main
from tests.chaos.course import injure, undisturbed
from tests.chaos.run import PATIENCE_S, STEPS, Run, comparable
from tests.conftest import Workspace
from tests.e2e.run_states import tensors_of

pytestmark = pytest.mark.e2e
RunMssr = Callable[..., subprocess.CompletedProcess[str]]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All steps without interruption; one of them profiled."""
    directory = tmp_path_factory.mktemp("reference") / "undisturbed"
    return undisturbed(directory, workspace.config, ["trainer.profile_steps=[2]"])


@pytest.fixture
def straight_run(reference: Run) -> Path:
    return reference.run_dir


def test_a_run_without_a_terminal_is_quiet(reference: Run) -> None:
    """Nothing of Ray, vLLM or transformers on the screen."""
    assert reference.screen.read_text() == f"mssr: run directory {reference.run_dir}\n"


def test_the_run_directory_holds_what_it_promises(straight_run: Path) -> None:
    records = metrics_of(straight_run)
    assert [r["step"] for r in records] == list(range(STEPS + 1))
    promised = """reward/accuracy policy/entropy policy/kl_ref policy/kl_update policy/clip_fraction
        policy/grad_norm baseline/eta baseline/mean baseline/unseen_fraction advantage/std
        advantage/degenerate_fraction shaping/mean shaping/entropy_branch_fraction
        shaping/sign_flip_fraction rollout/tokens rollout/response_length rollout/truncated_fraction
        rollout/mismatch_kl timing/step_s timing/rollout_s timing/reward_s timing/update_s timing/sync_s
        perf/rollouts_per_s perf/tokens_per_s perf/update_tflops rollout/prompt_tokens epoch
        memory/driver_rss_gib""".split()
    for record in records[1:]:
        assert not [key for key in promised if not isinstance(record.get(key), float)]
        assert not record.keys() & {"perf/gpus", "perf/tokens_per_s_per_gpu", "perf/mfu"}  # there is no GPU
    assert [r["step"] for r in records if "val/accuracy" in r] == [0, 3, 6, 9, 10]
    assert (straight_run / "checkpoints" / "latest").read_text() == "step-000010"
    assert (straight_run / "config.yaml").is_file()
    validation = [
        json.loads(x) for x in (straight_run / "samples/step-000010.jsonl").read_text().splitlines()
    ]
    assert {s["id"] for s in validation if s["split"] == "val"} == {"t0", "t1", "t2", "t3"}
    for log in ("driver.log", "actor-0.log", "actor-1.log", "rollout-0.log"):
        assert (straight_run / "logs" / log).is_file()


def test_ranks_get_their_prompts_from_the_engines(straight_run: Path) -> None:
    """All of them in the first epoch, which is the first step here."""
    records = metrics_of(straight_run)
    assert records[1]["perf/prompts_encoded_by_ranks"] == 0
    assert sum(r["perf/prompts_encoded_by_ranks"] for r in records[2:]) <= 8  # one on the other rank
    assert "encoded again" not in (straight_run / "logs/actor-0.log").read_text()


def test_a_profiled_step_leaves_traces(straight_run: Path) -> None:
    names = {p.name for p in (straight_run / "profiles").iterdir()}
    assert names == {"step-000002-rank-0.json", "step-000002-rank-1.json", "step-000002-ray.json"}
    trace = json.loads((straight_run / "profiles/step-000002-rank-1.json").read_text())
    assert any("backward" in e.get("name", "").lower() for e in trace["traceEvents"])
    timeline = json.loads((straight_run / "profiles/step-000002-ray.json").read_text())
    assert any("generate" in e.get("name", "") for e in timeline)


def test_engine_and_actor_agree_after_every_weight_update(straight_run: Path) -> None:
    """The gate of weight transfer: same images each step, vision tower trained, tied embeddings."""
    records = metrics_of(straight_run)[1:]
    # 16 rollouts of 8 prompts: every step has every image twice, after two and more updates.
    assert all(r["epoch"] % 2 == 0 for r in records)
    assert max(r["rollout/mismatch_max"] for r in records) < 1e-5
    assert min(r["policy/kl_update"] for r in records) > 1e-4  # the weights did change


def test_the_gate_sees_stale_weights(workspace: Workspace) -> None:
    """Each kind of staleness alone would be orders of magnitude above the gate."""
    from mssr.data.prompt_source import PromptSource
    from mssr.models.loading import load_model
    from mssr.models.packing import PackItem, pack
    from mssr.models.policy import PolicyModel
    from mssr.runs.config import load_config

    config = load_config(workspace.config)
    source = PromptSource(config)
    models = [PolicyModel(load_model(config.model, torch.float32)) for _ in range(2)]
    prompt = source.encoder.encode(source.row("t0"))
    item = PackItem(prompt, models[0].rope_positions(prompt), torch.arange(20, 30))
    with torch.no_grad():
        for part in ("visual", "embed_tokens"):
            changed = [p for n, p in models[1].model.named_parameters() if part in n]
            for p in changed:
                p.mul_(1.01)
            difference = models[0](pack([item], 2))[0] - models[1](pack([item], 2))[0]
            assert difference.abs().max() > 1e-4, part
            for p in changed:
                p.div_(1.01)


def test_export_is_a_model_that_transformers_loads(
    straight_run: Path, workspace: Workspace, run_mssr: RunMssr, tmp_path: Path
) -> None:
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    best = straight_run / "checkpoints" / "best"
    done = run_mssr("export", straight_run, "--out", tmp_path / "latest")
    assert done.returncode == 0, done.stderr
    assert main(["export", str(best), "--out", str(tmp_path / "best")]) == 0
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(workspace.path / "model")
    ours = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "latest")
    assert ours.dtype == base.dtype
    # Without its end token a model talks on until its limit.
    assert ours.generation_config.eos_token_id == base.generation_config.eos_token_id is not None
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(ours.state_dict()[name], base.state_dict()[name])
    processor = AutoProcessor.from_pretrained(tmp_path / "latest")
    assert processor.tokenizer.eos_token and processor.image_processor
    step = best.read_text()
    assert main(["export", str(straight_run / "checkpoints" / step), "--out", str(tmp_path / "again")]) == 0
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("best", "again")]
    assert files[0] == files[1]


def test_chaos_changes_nothing(workspace: Workspace, reference: Run, tmp_path: Path) -> None:
    """Ray, vLLM, two ranks; `scripts/chaos.sh` does more of it. That an engine dies is in the next test."""
    kinds = ["kill_actor_rank", "flipped_bit_in_checkpoint"]
    injure(tmp_path / "run", workspace.config, reference, kinds, seed=1)
    ours, theirs = (
        sorted((d / "run/checkpoints").glob("step-*"))[-1] for d in (tmp_path / "run", reference.directory)
    )
    assert repr(read_state(ours)) == repr(read_state(theirs))
    assert tensors_of(ours) == tensors_of(theirs)


def test_an_engine_of_two_processes_samples_the_same_and_is_replaced_when_one_dies(
    workspace: Workspace, reference: Run, tmp_path: Path
) -> None:
    """Each process gets the weights from the rank beside it; those of the reference are apart."""
    run = Run(tmp_path / "parallel", workspace.config)
    beside = ["cluster.placement=colocated", "cluster.weight_transfer=ipc", "rollout.check_weights=always"]
    run.extra = [*beside, "rollout.tensor_parallel=2", "trainer.steps=3"]
    run.start()
    try:
        run.reach(1)
        [worker] = [p for p in run.processes() if "VLLM::Worker_TP1" in p.name() + " ".join(p.cmdline())]
        worker.kill()
        assert run.wait() == 0, run.screen.read_text()
        assert [e["event"] for e in run.events()] == ["engine_died"]
        assert "engine's processes has died" in run.events()[0]["detail"]
        for ours, theirs in zip(comparable(run.metrics()), comparable(reference.metrics()), strict=False):
            different = {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
            # Sums over two processes are rounded another way; all that was sampled is the same.
            assert different <= {k for k in ours if k.startswith("rollout/mismatch")}, different
            assert ours.get("rollout/mismatch_max", 0) < 1e-5
        assert {name: reference.samples()[name] for name in run.samples()} == run.samples()
        deadline = time.monotonic() + PATIENCE_S
        while left := run.processes():
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.2)
    finally:
        run.close()


def test_one_rank_goes_on_from_two(workspace: Workspace, reference: Run, tmp_path: Path) -> None:
    """Neither the launcher nor the number of ranks is part of what a run computes. (That two ranks load what
    one has saved is in test_actor.py.)"""
    run = Run(tmp_path / "other", workspace.config)
    checkpoint = reference.run_dir / "checkpoints/step-000008"
    plugins = f"{reference.directory}/plugins.py"
    one = ["cluster.launcher=local", "actor.num_ranks=1", f"trainer.resume={checkpoint}"]
    run.extra = [*one, f"reward.name={plugins}:reward", f"algorithm.loss.name={plugins}:loss"]
    run.start()
    assert run.wait() == 0, run.screen.read_text()
    theirs = reference.metrics()
    for ours in run.metrics():
        expected = comparable(theirs)[ours["step"]]
        for key, value in comparable([ours])[0].items():
            assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-5), f"step {ours['step']}: {key}"
    assert [r["step"] for r in run.metrics()] == [9, 10]
    # Also where engine and actor share a process, and its threads.
    assert max(r["rollout/mismatch_max"] for r in run.metrics()) < 1e-5
    states = [read_state(r.run_dir / "checkpoints/step-000010") for r in (run, reference)]
    assert repr(states[0]["sampler"]) == repr(states[1]["sampler"])
    trackers = [s["estimator"]["algorithm"] for s in states]
    assert repr(trackers[0]["baseline"]["keys"]) == repr(trackers[1]["baseline"]["keys"])
