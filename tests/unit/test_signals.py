"""What the driver is told of an update is what happened: KL, loss, means, groups, epochs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mssr.actor.step import TokenMeans
from mssr.algorithms.objective import MicroBatchLoss
from mssr.cluster.base import join_log_probs
from mssr.config.checks import validate
from mssr.errors import UserError
from mssr.runs.config import load_config
from mssr.trainer.collect import with_signal
from mssr.types import Rollout, TrainBatch
from tests.conftest import Workspace
from tests.e2e.ranks import make_batch
from tests.unit.test_recovery import drive, never, world  # noqa: F401
from tests.unit.worker_lab import LORA, open_worker, weights_of

pytestmark = pytest.mark.unit
FOUR = ["t0", "t1", "t2", "t3"]
PLAIN = ["actor.lora.rank=0", "actor.updates_per_step=2"]


def log_probs(worker: Any, batch: TrainBatch) -> np.ndarray:
    return join_log_probs([worker.log_probs(batch, reference=False)], batch).policy


def k3(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    d = after.astype(np.float64) - before
    return np.expm1(d) - d


@pytest.mark.parametrize("updates", [1, 2])
def test_dropout_is_not_taken_for_a_move_of_the_policy(
    workspace: Workspace, tmp_path: Path, updates: int
) -> None:
    """The old log-probs are those of the policy that sampled, which dropped nothing."""
    batch = make_batch(workspace, FOUR)
    options = ["actor.lora.dropout=0.5", f"actor.updates_per_step={updates}", "actor.vision_cache_gib=0"]
    with open_worker(workspace, tmp_path, *LORA, *options) as worker:
        worker.update(batch, 0)  # adapters that are 0 have nothing to drop
        sampled = dataclasses.replace(batch, engine_log_probs=log_probs(worker, batch))
        worker.config.actor.lr = 1e-30
        metrics = worker.update(sampled, 1)
        assert metrics["policy/kl_update"] < 1e-9
        assert metrics["rollout/mismatch_max"] < 1e-4 and metrics["rollout/mismatch_kl"] < 1e-9
        assert metrics["policy/ratio"] != pytest.approx(1.0, abs=1e-4)  # it does drop in training


def test_what_the_loss_knows_is_not_in_the_dtype_of_the_pass(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the loss is evaluated in a sharded model, which casts the tensors that it is given."""
    seen: set[torch.dtype] = set()
    call = MicroBatchLoss.__call__

    def spy(loss: MicroBatchLoss, *given: Any) -> torch.Tensor:
        seen.update((loss.tokens.engine_log_probs.dtype, loss.tokens.advantages.dtype))
        return call(loss, *given)

    monkeypatch.setattr(MicroBatchLoss, "__call__", spy)
    with open_worker(workspace, tmp_path, *LORA, *PLAIN, "model.dtype=bfloat16") as worker:
        worker.update(make_batch(workspace, FOUR), 0)
    assert seen == {torch.float32}


def test_what_is_held_out_is_measured_and_not_trained_on(workspace: Workspace, tmp_path: Path) -> None:
    batch = make_batch(workspace, FOUR)
    held_out = [*PLAIN, "actor.kl_probe=held_out", "actor.kl_probe_fraction=0.25"]
    with open_worker(workspace, tmp_path, *LORA, *held_out) as worker:
        [index] = [s for micro in worker.updater.plan(batch, 0).probe[0] for s in micro.sequences]
        before = log_probs(worker, batch)
        metrics = worker.update(batch, 0)
        own = slice(*batch.response_offsets[index : index + 2])
        expected = k3(before, log_probs(worker, batch))[own].mean()
        assert metrics["policy/kl_update"] == pytest.approx(expected, rel=1e-3) and expected > 1e-5
        weights = weights_of(worker)
    batch.advantages[index] += 100.0
    with open_worker(workspace, tmp_path, *LORA, *held_out) as worker:
        worker.update(batch, 0)
        assert all(torch.equal(weights[n], w) for n, w in weights_of(worker).items())
    with open_worker(workspace, tmp_path, *LORA, *PLAIN) as worker:
        worker.update(batch, 0)
        assert not all(torch.equal(weights[n], w) for n, w in weights_of(worker).items())


def test_a_step_too_small_to_hold_out_is_refused(workspace: Workspace) -> None:
    overrides = ["actor.kl_probe=held_out", "rollout.rollouts_per_step=4", "actor.updates_per_step=4"]
    with pytest.raises(UserError, match=r"actor\.kl_probe=held_out takes 1 of the 4 prompts"):
        validate(load_config(workspace.config, overrides))


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_a_micro_batch_without_response_tokens_trains_on(
    workspace: Workspace, tmp_path: Path, loss: str
) -> None:
    """An empty response counts for nothing: the others train as if it were not there."""
    batch = make_batch(workspace, FOUR)
    options = ["actor.lora.rank=0", "actor.updates_per_step=1", "actor.micro_batch_tokens=20"]
    options += [f"algorithm.loss.name={loss}", "algorithm.kl.coef=0"]
    results = []
    for keep in (without_response(batch, 2), without_sequence(batch, 2)):
        with open_worker(workspace, tmp_path, *LORA, *options) as worker:
            metrics = worker.update(keep, 0)
            results.append((metrics, weights_of(worker)))
    (emptied, weights), (left_out, expected) = results
    for key in ("policy/entropy", "policy/loss", "rollout/mismatch_max"):
        assert emptied[key] == pytest.approx(left_out[key], rel=1e-5), key
    assert all(torch.allclose(weights[n], w, atol=1e-6) for n, w in expected.items())


def without_response(batch: TrainBatch, index: int) -> TrainBatch:
    return cut(batch, index, batch.offsets[index] + batch.prompt_lengths[index])


def without_sequence(batch: TrainBatch, index: int) -> TrainBatch:
    kept = np.arange(len(batch)) != index
    shorter = cut(batch, index, batch.offsets[index])
    return dataclasses.replace(
        shorter,
        prompt_ids=tuple(p for p, k in zip(batch.prompt_ids, kept, strict=True) if k),
        offsets=np.delete(shorter.offsets, index),
        prompt_lengths=batch.prompt_lengths[kept],
        advantages=batch.advantages[kept],
    )


def cut(batch: TrainBatch, index: int, start: int) -> TrainBatch:
    """Without the tokens of a sequence from ``start`` on."""
    end, tokens = batch.offsets[index + 1], np.arange(len(batch.tokens))
    responses = np.arange(len(batch.engine_log_probs))
    own = (responses >= batch.response_offsets[index]) & (responses < batch.response_offsets[index + 1])
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[(tokens < start) | (tokens >= end)],
        offsets=np.where(batch.offsets >= end, batch.offsets - (end - start), batch.offsets),
        engine_log_probs=batch.engine_log_probs[~own],
    )


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("rendezvous") / "file"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_not_finite_dilutes_no_mean(process_group: None) -> None:
    means = TokenMeans()
    means.add("x", torch.tensor([2.0, float("nan"), 4.0]))
    means.add("x", torch.tensor([float("inf")]))
    means.add("x", torch.tensor([100.0]), weight=0.0)  # only ran along
    means.add("never", torch.tensor([float("nan")]))
    means.max("largest", torch.empty(0))
    means.max("largest", torch.tensor([3.0, float("nan")]))
    means.total("loss", torch.tensor(2.5))
    before = copy.deepcopy(means)
    means.add("x", torch.tensor([99.0]))
    means.total("loss", torch.tensor(1.0))
    found = before.reduce()
    assert (found["x"], found["largest"], found["loss"]) == (3.0, 3.0, 2.5)
    assert np.isnan(found["never"])
    assert means.reduce()["loss"] == 3.5


def rollouts_of(prompts: str) -> list[Rollout]:
    empty = np.empty(0, np.int32)
    return [
        Rollout(p, i, empty, empty, np.empty(0, np.float32), "stop", 0, "") for i, p in enumerate(prompts)
    ]


def test_dynamic_sampling_has_the_groups_of_the_estimators() -> None:
    """A prompt that is drawn twice in a step has one group of all its responses."""

    def kept(prompts: str, scores: str, at_most: int) -> list[int]:
        numbers = [np.nan if s == "?" else float(s) for s in scores]
        return with_signal(rollouts_of(prompts), np.array(numbers, np.float32), at_most).tolist()

    assert kept("aabb", "0110", 4) == [0, 1, 2, 3]
    assert kept("aabb", "0111", 4) == [0, 1]
    assert kept("aabbaa", "0001" + "11", 8) == [0, 1, 4, 5, 2, 3]  # neither half of a is left out
    assert kept("aabbaa", "0001" + "00", 8) == [2, 3]
    assert kept("bbaacc" + "aa", "011101" + "00", 6) == [0, 1, 2, 3, 6, 7]
    assert kept("bbccaa" + "aa", "010100" + "11", 6) == [0, 1, 2, 3]  # a's four do not fit, and are not cut
    assert kept("aa", "00", 2) == []
    assert kept("bbaaacc", "1101?0?", 5) == [
        2,
        3,
        4,
    ]  # what has no score decides nothing, and keeps its place
    assert kept("aabb", "????", 4) == []


def test_with_a_lag_the_epoch_is_that_of_what_was_trained_on(world: Any, tmp_path: Path) -> None:  # noqa: F811
    plain = drive(world, tmp_path / "plain", never)
    lagging = drive(world, tmp_path / "lag", never, lag=1)
    epochs = [r["epoch"] for r in plain]
    assert epochs == [r["epoch"] for r in lagging] and len(set(epochs)) == len(epochs)
