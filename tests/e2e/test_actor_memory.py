"""What saves memory, on several ranks: the same training, and checkpoints for any number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mssr.config_loading import load_config
from mssr.models.loading import load_model
from tests.conftest import Workspace
from tests.e2e.ranks import RunRanks, make_batch, relative_difference

pytestmark = pytest.mark.e2e

LORA = ["actor.lora.rank=4", "actor.lr=0.01", "algorithm.kl.coef=0.1"]
EIGHT = ["actor.optimizer=adamw_8bit"]
KAHAN = ["actor.master_dtype=bfloat16", "actor.rounding=kahan"]
STOCHASTIC = ["actor.master_dtype=bfloat16", "actor.rounding=stochastic"]
KINDS = {"lora": LORA, "eight": EIGHT, "kahan": KAHAN, "stochastic": STOCHASTIC}


@pytest.mark.parametrize("kinds", [("lora", "eight"), ("kahan", "stochastic")], ids="-".join)
def test_they_train_alike_and_resume_on_fewer_ranks(
    workspace: Workspace, run_ranks: RunRanks, tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])
    base = load_model(load_config(workspace.config).model, torch.float32).state_dict()
    jobs: list[dict[str, Any]] = []
    for kind in kinds:
        options, directory = KINDS[kind], str(tmp_path / kind)
        jobs.append({"overrides": options, "save": directory})
        jobs.append({"overrides": options, "load": directory})
    results = run_ranks(batch, 2, jobs)
    jobs = []
    for kind in kinds:
        options, directory = KINDS[kind], str(tmp_path / kind)
        jobs.append({"overrides": options, "load": directory, "steps": 0})
        jobs.append({"overrides": options, "load": directory})
        jobs.append({"overrides": options})
    others = run_ranks(batch, 1, jobs)
    for k, kind in enumerate(kinds):
        saved, next_two = (weights for weights, _ in results[2 * k : 2 * k + 2])
        loaded, next_one, alone = (weights for weights, _ in others[3 * k : 3 * k + 3])
        assert all(torch.equal(saved[n], loaded[n]) for n in saved), kind
        # The same training on one rank as on two, to the exactness of what is stored; and the next step, too.
        moved = relative_difference(base, saved)
        assert moved > 1e-4, kind
        assert relative_difference(saved, alone) < 0.25 * moved, kind
        assert relative_difference(next_two, next_one) < 0.25 * moved, kind
        assert relative_difference(saved, next_one) > 0.5 * moved, kind  # that step was not nothing


def test_they_resume_on_more_ranks(workspace: Workspace, run_ranks: RunRanks, tmp_path: Path) -> None:
    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])
    jobs: list[dict[str, Any]] = [
        {"overrides": options, "save": str(tmp_path / kind)} for kind, options in KINDS.items()
    ]
    saved = run_ranks(batch, 1, jobs)
    jobs = [
        {"overrides": options, "load": str(tmp_path / kind), "steps": 0} for kind, options in KINDS.items()
    ]
    (initial, _), *loaded = run_ranks(batch, 2, [{"steps": 0}, *jobs])
    base = load_model(load_config(workspace.config).model, torch.float32).state_dict()
    assert all(torch.equal(initial[n], base[n]) for n in base)  # read on rank 0, and handed on
    for kind, (before, _), (after, _) in zip(KINDS, saved, loaded, strict=True):
        assert not [n for n in before if not torch.equal(before[n], after[n])], kind
