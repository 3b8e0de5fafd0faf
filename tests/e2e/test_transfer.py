"""Engines and ranks that share devices train like those that have their own, whichever way weights take."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Workspace
from tests.e2e.run_states import STEPS, read_run, train_each

pytestmark = pytest.mark.e2e
# Two updates a step of all weights, the vision tower's too; the head is tied to the embedding.
COMMON = [
    f"trainer.steps={STEPS}",
    f"trainer.save_every={STEPS}",
    "trainer.val_every=2",
    "rollout.workers=2",
    "rollout.max_response_length=6",
    "rollout.check_weights=always",
    "actor.lr=0.005",
    "cluster.threads_per_rollout=1",
    "cluster.launcher=ray",
]
VARIANTS: dict[str, tuple[int | None, list[str]]] = {
    "colocated": (None, [*COMMON, "cluster.placement=colocated", "cluster.weight_transfer=ipc"]),
    "apart": (None, [*COMMON, "cluster.placement=apart", "cluster.weight_transfer=broadcast"]),
}


@pytest.fixture(scope="module")
def runs(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of both."""
    out = tmp_path_factory.mktemp("transfer")
    train_each(workspace.config, out, VARIANTS)
    return out


def test_colocated_and_apart_are_the_same_run_bitwise(runs: Path) -> None:
    colocated, apart = (read_run(runs / f"{name}-straight") for name in VARIANTS)
    for a, b in zip(colocated["metrics"], apart["metrics"], strict=True):
        assert {k: (a.get(k), b.get(k)) for k in a | b if a.get(k) != b.get(k)} == {}, f"step {a['step']}"
    for key in colocated:
        assert colocated[key] == apart[key], key


@pytest.mark.parametrize("name", list(VARIANTS))
def test_engines_have_the_actors_weights_after_every_transfer(runs: Path, name: str) -> None:
    """The gate of the design, and checksums, of which a difference would have ended the run. The other
    transport is that of the runs in test_training.py."""
    records = read_run(runs / f"{name}-straight")["metrics"][1:]
    assert max(r["rollout/mismatch_max"] for r in records) < 1e-5
    assert min(r["policy/kl_update"] for r in records) > 1e-4  # the weights did change
    log = (runs / f"{name}-straight/logs/rollout-1.log").read_text()
    assert "Traceback" not in log
