"""Features of a frozen vision tower: computed once, equal to those computed anew, within the memory given."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mssr.actor.worker import PolicyWorker
from mssr.models.bounded_cache import BoundedCache
from mssr.models.packing import PackedBatch, pack
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
from tests.conftest import Workspace
from tests.unit.test_attention import make_policy, run

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def policy(workspace: Workspace) -> PolicyModel:
    policy = make_policy(workspace, "auto")
    policy.model.model.visual.requires_grad_(False)
    return policy


@pytest.fixture
def calls(policy: PolicyModel) -> Iterator[list[int]]:
    """Patches of each call of the tower."""
    seen: list[int] = []
    visual = policy.model.model.visual
    handle = visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


def make_batches(workspace: Workspace, policy: PolicyModel) -> tuple[PackedBatch, PackedBatch]:
    from mssr.data.prompt_source import PromptSource
    from mssr.models.packing import PackItem

    source = PromptSource(load_config(workspace.config))
    items = []
    for prompt_id in ("t0", "t1", "t2", "t3"):
        prompt = source.encoder.encode(source.row(prompt_id))
        items.append(PackItem(prompt, policy.rope_positions(prompt), torch.arange(20, 26)))
    return pack(items[:3], policy.merge_size), pack(items[::-1], policy.merge_size)


def test_a_pass_computes_only_what_is_not_known(
    workspace: Workspace, policy: PolicyModel, calls: list[int]
) -> None:
    first, second = make_batches(workspace, policy)
    policy.features = None
    expected = [run(policy, batch) for batch in (first, second)]
    calls.clear()
    policy.features = BoundedCache(2**20)
    for batch, values in zip((first, second, second), (*expected, expected[1]), strict=True):
        actual = run(policy, batch)
        torch.testing.assert_close(actual[0], values[0], atol=5e-6, rtol=0)
        assert actual[1].keys() == values[1].keys() and not any("visual" in n for n in actual[1])
        for name, gradient in values[1].items():
            torch.testing.assert_close(actual[1][name], gradient, atol=1e-5, rtol=1e-4)
    # All of the first, then t3's image of the second, then none; one by one.
    assert first.pixels is not None and second.pixels is not None
    images = len(first.image_keys)
    assert sum(calls[:images]) == len(first.pixels)
    assert calls[images:] == [len(second.pixels) - len(first.pixels)]


def test_what_is_kept_does_not_depend_on_the_pass(workspace: Workspace, policy: PolicyModel) -> None:
    """Or a run that is resumed in the middle of an epoch would not be the same to the last bit."""
    kept = []
    for batch in make_batches(workspace, policy):
        policy.features = BoundedCache(2**20)
        run(policy, batch)
        kept.append({key: policy.features.get(key) for key in batch.image_keys})
    assert kept[0].keys() < kept[1].keys()
    assert all(torch.equal(features, kept[1][key]) for key, features in kept[0].items())


def test_without_memory_every_pass_computes_them(
    workspace: Workspace, policy: PolicyModel, calls: list[int]
) -> None:
    first, _ = make_batches(workspace, policy)
    policy.features = BoundedCache(0)
    for _ in range(2):
        run(policy, first)
    assert len(calls) == 2 * len(first.image_keys)


def test_policy_and_reference_share_tower_and_features(workspace: Workspace, tmp_path: Path) -> None:
    """And neither is sharded, so that a rank may run it alone."""
    overrides = ["model.freeze_vision=true", "algorithm.kl.coef=0.1", "actor.num_ranks=1"]
    worker = PolicyWorker(load_config(workspace.config, overrides), 0, f"file://{tmp_path}/rendezvous")
    try:
        assert worker.reference is not None
        tower = worker.policy.model.model.visual
        assert worker.reference.model.model.visual is tower
        assert worker.reference.features is worker.policy.features is not None
        assert not any(hasattr(p, "full_tensor") for p in tower.parameters())
        assert hasattr(worker.policy.model.lm_head.weight, "full_tensor")
        weights = worker.export_weights()
        assert weights is not None and any(".visual." in name for name in weights)
    finally:
        worker.close()
