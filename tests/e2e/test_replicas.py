"""Several copies of the policy, each shared by some ranks (HSDP): the training of one copy, in fewer bytes
between nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Workspace
from tests.e2e.ranks import RunRanks, make_batch, relative_difference

pytestmark = pytest.mark.e2e

TWO = ["actor.shard_size=2"]
SIZES = ["actor.updates_per_step=1", "rollout.rollouts_per_step=8"]
STOCHASTIC = ["actor.master_dtype=bfloat16", "actor.rounding=stochastic"]
LORA = ["actor.lora.rank=4", "actor.lr=0.01", "algorithm.kl.coef=0.1", "actor.optimizer=adamw_8bit"]
FROZEN = ["model.freeze_vision=true", "actor.keep_gathered=true"]


def test_two_copies_on_four_ranks_train_like_one(
    workspace: Workspace, run_ranks: RunRanks, tmp_path: Path
) -> None:
    batch = make_batch(workspace, [f"t{i}" for i in range(8)])
    gradient: dict[str, Any] = {"gradient": True, "overrides": [*SIZES, "actor.micro_batch_tokens=40", *TWO]}
    one_copy, two_copies = str(tmp_path / "one"), str(tmp_path / "two")
    [(expected, _)] = run_ranks(batch, 1, [gradient | {"overrides": SIZES}])
    (found, counts), *runs = run_ranks(
        batch,
        4,
        [
            gradient,
            {"save": one_copy, "steps": 2},
            {"overrides": TWO, "save": two_copies, "steps": 2},
            {"load": two_copies, "steps": 0},
            {"overrides": TWO, "load": one_copy},
            {"load": one_copy},
        ],
    )
    assert relative_difference(expected, found) < 1e-5
    # Of 3 vision blocks, 4 layers and the root: the layers once an update, the others in every pass.
    assert counts["passes"] > 1 and counts["all_reduces"] <= 4 + 4 * counts["passes"]
    (one, metrics), (two, metrics_two), (two_in_one, _), (next_two, of_two), (next_one, of_one) = runs
    assert metrics["policy/grad_norm"] == pytest.approx(metrics_two["policy/grad_norm"], rel=1e-5)
    assert relative_difference(one, two) < 1e-5
    assert (metrics["distinct_states"], metrics_two["distinct_states"]) == (4, 2)
    assert all(torch.equal(two[name], two_in_one[name]) for name in two)
    assert relative_difference(next_one, next_two) < 1e-4
    assert relative_difference(one, next_two) > 1e-3
    assert of_one["policy/grad_norm"] == pytest.approx(of_two["policy/grad_norm"], rel=1e-4)


def test_copies_stay_equal_whatever_saves_memory(
    workspace: Workspace, run_ranks: RunRanks, tmp_path: Path
) -> None:
    batch = make_batch(workspace, [f"t{i}" for i in range(8)])
    kinds = [STOCHASTIC, LORA, FROZEN]
    jobs = [
        {"overrides": [*kind, *copies], "save": str(tmp_path / f"{k}-{len(copies)}"), "steps": 2}
        for k, kind in enumerate(kinds)
        for copies in ([], TWO)
    ]
    found = run_ranks(batch, 4, [{"steps": 0}, *jobs])
    base = found[0][0]
    loads = [
        {"overrides": kind, "load": str(tmp_path / f"{k}-1"), "steps": 0} for k, kind in enumerate(kinds)
    ]
    loaded = run_ranks(batch, 2, loads)
    for k, kind in enumerate(kinds):
        (one, metrics), (two, metrics_two) = found[2 * k + 1 : 2 * k + 3]
        moved = relative_difference(base, one)
        # Rounded at random, or in 8 bits, they differ by less than a step.
        exactness = 1e-4 if kind is FROZEN else 0.25 * moved
        assert moved > 1e-4 and relative_difference(one, two) < exactness, kind
        assert (metrics["distinct_states"], metrics_two["distinct_states"]) == (4, 2), kind
        assert all(torch.equal(two[name], loaded[k][0][name]) for name in two), kind
