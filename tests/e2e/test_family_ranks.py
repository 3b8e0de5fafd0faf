"""Models of the other families than Qwen2.5-VL on real process groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mssr.models.families import FAMILIES as ALL
from tests.conftest import Workspace
from tests.e2e.ranks import RunRanks, make_batch, relative_difference

pytestmark = pytest.mark.e2e
FAMILIES = {name: family for name, family in ALL.items() if name != "qwen2_5_vl"}
"""All but the one that test_actor.py runs."""


def test_gradient_and_checkpoint_depend_neither_on_passes_nor_on_ranks(
    workspace_of: Callable[[str], Workspace], run_ranks: RunRanks, tmp_path: Path
) -> None:
    """One prompt has images, so that one of two ranks has the blank one only; parameters shared by two ranks,
    and whole on each."""

    def job(model_type: str, *overrides: str, **more: Any) -> dict[str, Any]:
        own = workspace_of(model_type)
        sizes = ["actor.updates_per_step=1", "rollout.rollouts_per_step=6"]
        batch = make_batch(own, ["t1", "t2", "t6", "t2", "t6", "t2"])
        return {"batch": batch, "overrides": [*own.instead, *sizes, *overrides], **more}

    passes, whole = "actor.micro_batch_tokens=70", "actor.micro_batch_tokens=100000"
    jobs = []
    for name in FAMILIES:
        jobs += [job(name, passes, gradient=True), job(name, passes, "actor.shard_size=1", gradient=True)]
        jobs += [job(name, save=f"{tmp_path}/{name}")]
    on_two = run_ranks(None, 2, jobs)
    jobs = []
    for name in FAMILIES:
        jobs += [job(name, whole, gradient=True), job(name, load=f"{tmp_path}/{name}", steps=0)]
    on_one = run_ranks(None, 1, jobs)
    for k, name in enumerate(FAMILIES):
        (shared, counts), (copied, _), (saved, _) = on_two[3 * k : 3 * k + 3]
        (expected, once), (loaded, _) = on_one[2 * k : 2 * k + 2]
        assert counts["passes"] > 1 and once["passes"] == 1
        tower = FAMILIES[name].tower_name
        assert any(f".{tower}." in parameter for parameter in expected) == (tower is not None)
        assert relative_difference(expected, shared) < 1e-5, name
        assert relative_difference(expected, copied) < 1e-5, name
        assert all(torch.equal(saved[n], loaded[n]) for n in saved), name
