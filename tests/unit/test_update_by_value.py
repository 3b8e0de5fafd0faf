"""Signs and sizes of what an update reports and does, each by a value that is known beforehand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mssr.cluster.base import join_log_probs
from mssr.types import TrainBatch
from tests.conftest import Workspace
from tests.e2e.ranks import make_batch
from tests.unit.step_lab import StepLab, open_lab

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def lab(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepLab]:
    with open_lab(workspace, tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def with_advantages(batch: TrainBatch, value: float) -> TrainBatch:
    return dataclasses.replace(batch, advantages=np.full(len(batch), value, np.float32))


@pytest.mark.parametrize(
    ("option", "metric", "sign"),
    [
        ("algorithm.loss.entropy_coef=0.3", "policy/entropy", -1),
        ("algorithm.kl.coef=0.3", "policy/kl_ref", 1),
        ("algorithm.loss.text_anchor_coef=0.3", "policy/kl_anchor", 1),
    ],
)
def test_a_term_alone_is_the_loss_and_pulls_its_way(
    lab: StepLab, tmp_path: Path, option: str, metric: str, sign: int
) -> None:
    """Without advantages there is nothing but the term: entropy rises, divergences fall."""
    step = ["actor.updates_per_step=1", "actor.lr=0.01", "actor.max_grad_norm=100"]
    updater = lab.updater(tmp_path, "algorithm.name=mvsr", *step, option)
    updater.optimizer = torch.optim.SGD(lab.policy.parameters())
    batch = dataclasses.replace(with_advantages(lab.batch, 0.0), kl_coef=0.3)
    before, after = updater.step(batch, 0), updater.step(batch, 1)
    assert [m["perf/prompts_encoded_by_ranks"] for m in (before, after)] == [5, 0]
    assert before[metric] > 0.01
    assert before["policy/loss"] == pytest.approx(sign * 0.3 * before[metric], rel=1e-9)
    assert sign * (after[metric] - before[metric]) < -1e-4


@pytest.mark.parametrize(("advantage", "capped"), [(1.0, 1.5), (-1.0, -0.5)])
def test_shaping_strengthens_what_was_good_and_spares_what_was_bad(
    lab: StepLab, tmp_path: Path, advantage: float, capped: float
) -> None:
    """A bonus at its cap, |A| / 2, makes 1 to 1.5 and -1 to -0.5; below it, it is coef * H."""
    batch = with_advantages(lab.batch, advantage)
    plain, most, little = (
        lab.updater(tmp_path, "actor.updates_per_step=1", *options).step(batch, 0)
        for options in (
            ["algorithm.name=mvsr"],
            ["algorithm.name=mssr", "algorithm.shaping.coef=100"],
            ["algorithm.name=mssr", "algorithm.shaping.coef=0.02"],
        )
    )
    # On policy the ratio is 1, so the loss is minus the mean advantage, and the gradient goes with it.
    assert plain["policy/loss"] == pytest.approx(-advantage, rel=1e-9)
    assert most["policy/loss"] == pytest.approx(-capped, rel=1e-9)
    assert most["policy/grad_norm"] == pytest.approx(abs(capped) * plain["policy/grad_norm"], rel=1e-6)
    bonus = 0.02 * plain["policy/entropy"]
    assert 0.05 < bonus < 0.2
    assert little["policy/loss"] == pytest.approx(-(advantage + bonus), rel=1e-9)
    assert (most["shaping/mean"], little["shaping/mean"]) == pytest.approx((0.5, bonus), rel=1e-9)
    branches = [m["shaping/entropy_branch_fraction"] for m in (most, little)]
    assert branches == [0, 1] and "shaping/mean" not in plain


@pytest.mark.parametrize("updates", [1, 2])
def test_kl_update_is_that_of_the_policy_before_against_the_policy_after(
    lab: StepLab, tmp_path: Path, updates: int
) -> None:
    """From the log-probs of both, on the share of the rollouts that is asked for."""
    size = [f"actor.updates_per_step={updates}", "actor.kl_probe_fraction=0.5", "actor.lr=0.01"]
    updater = lab.updater(tmp_path, "algorithm.name=mvsr", *size)

    def log_probs() -> np.ndarray:
        joined = join_log_probs([updater.log_probs(lab.batch, reference=False)], lab.batch)
        return joined.policy.astype(np.float64)

    before = log_probs()
    plans = [update.sequences for update in updater.plan(lab.batch, 0).updates]
    probed = [s for plan in plans for s in plan[: math.ceil(len(plan) / 2)]]
    metrics = updater.step(lab.batch, 0)
    change = log_probs() - before
    of = np.repeat(np.arange(len(lab.batch)), lab.batch.response_lengths)
    change = change[np.isin(of, probed)]
    expected, reversed_ = (float(np.mean(np.exp(d) - 1 - d)) for d in (change, -change))
    assert expected > 0.05 and abs(reversed_ / expected - 1) > 0.05
    assert metrics["policy/kl_update"] == pytest.approx(expected, rel=1e-5)


class Recorder:
    """Stands for an optimizer with two groups: notes the learning rates of its steps, and changes nothing."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{}, {}]
        self.seen: list[tuple[float, ...]] = []

    def step(self) -> None:
        self.seen.append(tuple(group["lr"] for group in self.param_groups))

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


HALF = math.sqrt(0.5) / 2
TABLES = {
    # Peak 0.1 over 8 steps; with a warm-up of 3 the first steps are a quarter, a half and three quarters.
    "constant": ([], [0.1] * 8),
    "warm-up": (["actor.warmup_steps=3"], [0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1]),
    "linear": (["actor.lr_schedule=linear"], [0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125]),
    "warm-up and linear": (
        ["actor.lr_schedule=linear", "actor.warmup_steps=3"],
        [0.025, 0.05, 0.075, 0.1, 0.08, 0.06, 0.04, 0.02],
    ),
    "warm-up and cosine": (
        ["actor.lr_schedule=cosine", "actor.warmup_steps=4"],  # then cosines of 0, 45, 90 and 135 degrees
        [0.02, 0.04, 0.06, 0.08, 0.1, 0.05 + 0.1 * HALF, 0.05, 0.05 - 0.1 * HALF],
    ),
    "warm-up to the end": (
        ["actor.lr_schedule=cosine", "actor.warmup_steps=8"],
        [k / 90 for k in range(1, 9)],
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_learning_rate_follows_its_table(
    lab: StepLab, workspace: Workspace, tmp_path: Path, name: str
) -> None:
    options, table = TABLES[name]
    updater = lab.updater(tmp_path, "actor.lr=0.1", "trainer.steps=8", "actor.updates_per_step=1", *options)
    updater.optimizer = recorder = Recorder()
    batch = make_batch(workspace, ["t2"])
    reported = [updater.step(batch, step)["policy/lr"] for step in range(8)]
    assert reported == pytest.approx(table, rel=1e-12)
    assert recorder.seen == [(lr, lr) for lr in reported]
