"""A rank that trains a model of every family: what it freezes, saves, loads, and hands out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mssr.cluster.base import join_log_probs
from mssr.config import ModelConfig, to_dict
from mssr.models.families import FAMILIES
from mssr.models.loading import load_model
from mssr.models.packing import pack
from mssr.models.policy import PolicyModel
from mssr.runs import export as export_tool
from tests.conftest import Workspace
from tests.e2e.ranks import make_batch
from tests.unit.worker_lab import open_worker, weights_of

pytestmark = pytest.mark.unit
ONE_UPDATE = ["actor.updates_per_step=1", "actor.lr=0.003"]
IDS = ["t0", "t1", "t2", "t3"]


@pytest.fixture(params=FAMILIES)
def family_workspace(request: pytest.FixtureRequest, workspace_of: Callable[[str], Workspace]) -> Workspace:
    return workspace_of(request.param)


def test_training_resumes_bitwise_and_its_export_is_what_was_trained(
    family_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exported directory gives the log-probs of the policy."""
    batch, saved = make_batch(family_workspace, IDS), str(tmp_path / "saved" / "actor")
    with open_worker(family_workspace, tmp_path, *ONE_UPDATE) as worker:
        start = weights_of(worker)
        worker.update(batch, 0)
        worker.checkpoint.begin(saved)
        worker.checkpoint.result()
        trained, config = weights_of(worker), worker.config
        log_probs = join_log_probs([worker.log_probs(batch, reference=False)], batch).policy
        items = worker.updater.prompts.items(batch, range(len(IDS)))
        metrics = worker.update(batch, 1)
        onward = weights_of(worker)
    assert [name for name in start if torch.equal(start[name], trained[name])] == []
    with open_worker(family_workspace, tmp_path, *ONE_UPDATE) as worker:
        worker.checkpoint.load(saved)
        loaded = weights_of(worker)
        again = worker.update(batch, 1)
        resumed = weights_of(worker)
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    assert all(torch.equal(resumed[name], onward[name]) for name in onward)
    assert {k: v for k, v in metrics.items() if again[k] != v and not k.startswith("perf/")} == {}

    monkeypatch.setattr(export_tool, "resolve", lambda path: path)
    monkeypatch.setattr(export_tool, "verify", lambda path: SimpleNamespace(config=to_dict(config)))
    out = export_tool.export(tmp_path / "saved", tmp_path / "out", dtype="float32")
    exported = PolicyModel(load_model(ModelConfig(path=str(out)), torch.float32))
    with torch.no_grad():
        found = exported(pack(items, exported.merge_size))[0]
    np.testing.assert_allclose(found.numpy(), log_probs, atol=1e-5)
    assert all(torch.equal(w, trained[name]) for name, w in exported.model.state_dict().items())


def test_a_frozen_tower_stays(family_workspace: Workspace, tmp_path: Path) -> None:
    """Policy and reference share it, and the features that it gave; a model without one trains as it is."""
    overrides = ["model.freeze_vision=true", "algorithm.kl.coef=0.1"]
    with open_worker(family_workspace, tmp_path, *ONE_UPDATE, *overrides) as worker:
        start, family = weights_of(worker), worker.policy.family
        worker.update(make_batch(family_workspace, IDS), 0)
        after, tower = weights_of(worker), worker.policy.tower
        assert worker.reference is not None
        assert worker.reference.tower is tower
        assert worker.reference.features is worker.policy.features
        assert bool(worker.policy.features) == (tower is not None)
    prefix = f"{family.tower_name}."
    assert (tower is not None) == any(name.startswith(prefix) for name in start)
    for name in start:
        assert torch.equal(start[name], after[name]) == name.startswith(prefix), name
