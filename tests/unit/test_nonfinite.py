"""An update with something in it that is not finite is not made, and is dumped with what spoilt it."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mssr.actor import guard
from mssr.actor.update import PolicyUpdater
from mssr.errors import TrainingError
from tests.conftest import Workspace
from tests.unit.step_lab import StepLab, open_lab

pytestmark = pytest.mark.unit
IDS = ["t0", "t1", "t2", "t3"]
LAYER = "model.model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def lab(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepLab]:
    with open_lab(workspace, tmp_path_factory.mktemp("lab"), IDS) as lab:
        yield lab


def state_of(updater: PolicyUpdater) -> list[torch.Tensor]:
    tensors = [p.detach().clone() for p in updater.policy.parameters()]
    for state in updater.optimizer.state.values():
        tensors += [torch.as_tensor(state[key]).clone() for key in sorted(state)]
    return tensors


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def dumps(run_dir: Path) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    found = sorted((run_dir / "nonfinite").glob("*.json"))
    return [(json.loads(p.read_text()), load_file(p.with_suffix(".safetensors"))) for p in found]


def with_nan(values: np.ndarray, *where: int) -> np.ndarray:
    values = values.copy()
    values[list(where)] = np.nan
    return values


def test_a_sequence_with_a_nan_advantage_is_named_with_its_arrays(lab: StepLab, tmp_path: Path) -> None:
    batch = replace(lab.batch, advantages=with_nan(lab.batch.advantages, 2))
    updater = lab.updater(tmp_path)
    metrics = updater.step(batch, 11)
    assert metrics["policy/skipped_updates"] == 1
    [(report, arrays)] = dumps(tmp_path)
    update = next(k for k, plan in enumerate(updater.plan(batch, 11).updates, 1) if 2 in plan.sequences)
    assert (tmp_path / f"nonfinite/step-000012-update-{update}-rank-0.json").is_file()
    assert (report["step"], report["update"], report["rank"]) == (12, update, 0)
    assert report["sequences"] == [{"index": 2, "prompt_id": "t2", "nonfinite": ["loss", "advantage"]}]
    assert report["left_out"] == 0 and LAYER in report["parameters"]
    start, end = batch.offsets[2], batch.offsets[3]
    assert np.array_equal(arrays["tokens"], batch.tokens[start:end])
    assert arrays["sequences"].tolist() == [2]
    assert arrays["prompt_lengths"].tolist() == [batch.prompt_lengths[2]]
    length = int(batch.response_lengths[2])
    assert arrays["response_lengths"].tolist() == [length]
    for name in ("log_probs", "old_log_probs", "engine_log_probs", "entropy"):
        assert arrays[name].shape == (length,) and np.isfinite(arrays[name]).all()
    assert np.isnan(arrays["advantages"]).all()
    assert arrays["engine_log_probs"].tolist() == [-3.0] * length


def test_the_metrics_are_those_of_the_updates_that_were_made(lab: StepLab, tmp_path: Path) -> None:
    """The method learns from policy/kl_update, which takes no NaN."""
    metrics = lab.updater(tmp_path).step(replace(lab.batch, advantages=with_nan(lab.batch.advantages, 2)), 0)
    whole = lab.updater(tmp_path).step(lab.batch, 0)
    assert all(np.isfinite(v) for v in metrics.values())
    assert metrics["policy/entropy"] == pytest.approx(whole["policy/entropy"], rel=0.1)
    none_made = lab.updater(tmp_path).step(
        replace(lab.batch, advantages=with_nan(lab.batch.advantages, *range(4))), 0
    )
    assert none_made["policy/kl_update"] < 1e-12 and none_made["policy/skipped_updates"] == 2
    assert none_made["policy/entropy"] == pytest.approx(whole["policy/entropy"], rel=0.1)


def test_a_skipped_update_changes_neither_parameters_nor_optimizer(lab: StepLab, tmp_path: Path) -> None:
    updater = lab.updater(tmp_path)
    updater.step(lab.batch, 0)  # so that there are moments to spoil
    before = state_of(updater)
    updater.step(replace(lab.batch, advantages=with_nan(lab.batch.advantages, *range(4))), 1)
    assert same(before, state_of(updater))
    assert all(p.grad is None for p in updater.policy.parameters())
    updater.step(lab.batch, 2)
    assert not same(before, state_of(updater))
    assert all(torch.isfinite(x).all() for x in state_of(updater))


def test_a_non_finite_log_prob_of_the_engine_alone_skips_the_update(lab: StepLab, tmp_path: Path) -> None:
    """It reaches no gradient here, and is a sign that the engine is broken all the same."""
    start = int(lab.batch.response_offsets[1])
    engine = lab.batch.engine_log_probs.copy()
    engine[start] = -np.inf
    updater = lab.updater(tmp_path, "actor.updates_per_step=1")
    before = state_of(updater)
    metrics = updater.step(replace(lab.batch, engine_log_probs=engine), 0)
    assert metrics["policy/skipped_updates"] == 1 and np.isfinite(metrics["rollout/mismatch_kl"])
    assert same(before, state_of(updater))
    [(report, arrays)] = dumps(tmp_path)
    assert report["sequences"] == [{"index": 1, "prompt_id": "t1", "nonfinite": ["engine_log_prob"]}]
    assert report["parameters"] == [] and np.isinf(arrays["engine_log_probs"][0])


def test_a_model_that_gives_nan_is_named_by_log_prob_and_entropy(lab: StepLab, tmp_path: Path) -> None:
    updater = lab.updater(tmp_path, "actor.updates_per_step=1")
    with torch.no_grad():
        updater.policy.get_parameter(LAYER)[0, 0] = torch.nan
    assert updater.step(lab.batch, 0)["policy/skipped_updates"] == 1
    [(report, _)] = dumps(tmp_path)
    assert sorted(x["prompt_id"] for x in report["sequences"]) == IDS
    assert all({"log_prob", "entropy", "loss"} <= set(x["nonfinite"]) for x in report["sequences"])


def test_a_gradient_that_no_sequence_explains_names_its_parameter(lab: StepLab, tmp_path: Path) -> None:
    updater = lab.updater(tmp_path, "actor.updates_per_step=1")
    before = state_of(updater)
    hook = updater.policy.get_parameter(LAYER).register_hook(
        lambda g: g.index_fill(0, torch.tensor(0), torch.inf)
    )
    metrics = updater.step(lab.batch, 0)
    hook.remove()
    assert metrics["policy/skipped_updates"] == 1 and same(before, state_of(updater))
    [(report, arrays)] = dumps(tmp_path)
    assert report["parameters"] == [LAYER] and report["gradient_norm"] == "inf"
    assert {x["prompt_id"]: x["nonfinite"] for x in report["sequences"]} == {i: ["gradient"] for i in IDS}
    assert len(arrays["tokens"]) == len(lab.batch.tokens)


def test_the_run_ends_after_so_many_in_a_row(lab: StepLab, tmp_path: Path) -> None:
    bad = replace(lab.batch, advantages=with_nan(lab.batch.advantages, *range(4)))
    updater = lab.updater(tmp_path, "actor.updates_per_step=1", "actor.max_nonfinite_updates=3")
    for step in range(2):
        updater.step(bad, step)
    updater.step(lab.batch, 2)  # a good one starts the count anew
    for step in (3, 4):
        updater.step(bad, step)
    with pytest.raises(TrainingError, match=r"3 updates in a row.*step 6.*t\d.*nonfinite"):
        updater.step(bad, 5)


def test_dumps_are_bounded(lab: StepLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_SEQUENCES", 3)
    monkeypatch.setattr(guard, "MAX_DUMPS", 2)
    bad = replace(lab.batch, advantages=with_nan(lab.batch.advantages, *range(4)))
    updater = lab.updater(tmp_path, "actor.updates_per_step=1", "actor.max_nonfinite_updates=99")
    for step in range(4):
        updater.step(bad, step)
    found = dumps(tmp_path)
    assert [report["step"] for report, _ in found] == [1, 2]
    assert all(len(r["sequences"]) == 3 == len(a["sequences"]) and r["left_out"] == 1 for r, a in found)


def test_a_full_disk_does_not_end_the_run(
    lab: StepLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        metrics = lab.updater(tmp_path).step(
            replace(lab.batch, advantages=with_nan(lab.batch.advantages, 2)), 0
        )
    assert metrics["policy/skipped_updates"] == 1
    assert "No space left on device" in caplog.text and "t2" in caplog.text
    assert list((tmp_path / "nonfinite").iterdir()) == []
