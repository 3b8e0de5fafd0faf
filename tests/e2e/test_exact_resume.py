"""A run that was stopped and goes on equals one that was not, for every method and sampler."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mssr.actor.checkpoint import SafeReader
from mssr.trainer.checkpoint import read_state
from tests.chaos.course import injure, undisturbed
from tests.chaos.run import Run, comparable
from tests.conftest import Workspace

pytestmark = pytest.mark.e2e

STEPS = 4
# 6 prompts or 2 a step of 8: most steps end in the middle of an epoch.
VARIANTS: dict[str, tuple[int, list[str]]] = {
    "mssr": (1, ["algorithm.name=mssr"]),
    "mvsr": (2, ["algorithm.name=mvsr"]),
    "grpo": (3, ["algorithm.name=grpo", "rollout.n=3"]),
    "rloo_adaptive_kl": (1, ["algorithm.name=rloo", "rollout.n=3", "algorithm.kl.target=0.01"]),
    "reinforce_pp": (2, ["algorithm.name=reinforce_pp"]),
    # Draws uncertain prompts first, and remembers the last response of each.
    "spo": (3, ["algorithm.name=spo", "sampler.name=uncertainty", "algorithm.baseline.init_rollouts=0"]),
    "dynamic": (2, ["algorithm.name=grpo", "rollout.n=3", "sampler.dynamic=true", "sampler.max_draws=50"]),
}
"""Name -> (step after which it is stopped, overrides)."""

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from mssr.trainer.loggers import MetricsLog
from mssr.trainer.train import train

config, out, spec = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
write = MetricsLog.write

def stopping(at):
    def stop(self, record):
        write(self, record)
        if record["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)
    return stop

for name, (at, overrides) in spec["variants"].items():
    arguments = [*spec["common"], *overrides]
    assert train(config, [*arguments, f"trainer.run_dir={out}/{name}-straight"]) == 0
    again = [*arguments, f"trainer.run_dir={out}/{name}-stopped"]
    MetricsLog.write = stopping(at)
    assert train(config, again) == 143, name
    MetricsLog.write = write
    assert train(config, again) == 0
"""


@pytest.mark.timeout(600)
def test_stopped_and_resumed_equals_straight_bitwise(workspace: Workspace, tmp_path: Path) -> None:
    """Every method and sampler, on one rank with the transformers engine."""
    common = [
        f"trainer.steps={STEPS}",
        f"trainer.save_every={STEPS}",
        "cluster.launcher=local",
        "actor.num_ranks=1",
        "rollout.engine=hf",
        "rollout.rollouts_per_step=6",
        "rollout.max_response_length=6",
        "actor.lr=0.005",
    ]
    spec = json.dumps({"common": common, "variants": VARIANTS})
    command = [sys.executable, "-c", SCRIPT, str(workspace.config), str(tmp_path), spec]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (at, _) in VARIANTS.items():
        straight, stopped = (read_run(tmp_path / f"{name}-{kind}") for kind in ("straight", "stopped"))
        assert (tmp_path / f"{name}-stopped/checkpoints/step-{at:06d}").is_dir(), name
        for key in straight:
            assert straight[key] == stopped[key], f"{name}: {key}"


def read_run(run_dir: Path, first: int = 0) -> dict[str, Any]:
    """What must be equal: metrics (from step ``first``), samples, parameters, optimizer, trainer's state."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(first, STEPS + 1))
    checkpoint = run_dir / "checkpoints" / f"step-{STEPS:06d}"
    return {
        "metrics": comparable(records),
        "samples": {p.name: p.read_text() for p in (run_dir / "samples").iterdir()},
        "state": repr(read_state(checkpoint)),
        "parameters and optimizer": tensors_of(checkpoint),
    }


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """Parameters and moments by name, as hashes of their bytes. (Their order in the files may differ.)"""
    directory = str(checkpoint / "actor")
    index = SafeReader(directory).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in index.items()}  # type: ignore[union-attr]
    dcp.load(tensors, storage_reader=SafeReader(directory), no_dist=True)
    return {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in sorted(tensors.items())}


@pytest.fixture(scope="module")
def reference(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return undisturbed(tmp_path_factory.mktemp("chaos") / "undisturbed", workspace.config)


@pytest.mark.timeout(900)
def test_chaos_changes_nothing(workspace: Workspace, reference: Run, tmp_path: Path) -> None:
    """Ray, vLLM, two ranks; `scripts/chaos.sh` does more of it."""
    kinds = ["kill_engine", "kill_actor_rank", "flipped_bit_in_checkpoint"]
    injure(tmp_path / "run", workspace.config, reference, kinds, seed=1)
    ours, theirs = (
        sorted((d / "run/checkpoints").glob("step-*"))[-1] for d in (tmp_path / "run", reference.directory)
    )
    assert repr(read_state(ours)) == repr(read_state(theirs))
    assert tensors_of(ours) == tensors_of(theirs)


@pytest.mark.timeout(600)
def test_one_rank_goes_on_from_two_and_two_from_one(
    workspace: Workspace, reference: Run, tmp_path: Path
) -> None:
    run = Run(tmp_path / "other", workspace.config)
    checkpoint = reference.run_dir / "checkpoints/step-000008"
    # Neither the launcher nor the number of ranks is part of what a run computes.
    one = ["cluster.launcher=local", "actor.num_ranks=1", f"trainer.resume={checkpoint}", "trainer.steps=9"]
    plugins = f"{reference.directory}/plugins.py"
    for extra in (one, ["trainer.save_every=1"]):
        run.extra = [*extra, f"reward.name={plugins}:reward", f"algorithm.loss.name={plugins}:loss"]
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
