"""Which forward passes a step makes, with and without a graph, and how ranks share them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mssr.actor import update
from mssr.actor.update import PolicyUpdater
from mssr.cluster.base import join_log_probs
from mssr.models.cost import CostModel
from mssr.models.packing import PackedBatch
from mssr.types import TrainBatch
from tests.conftest import Workspace
from tests.e2e.ranks import make_batch
from tests.unit.step_lab import StepLab, open_lab

pytestmark = pytest.mark.unit
WIDE = "actor.micro_batch_tokens=4096"
"""A pass holds all sequences."""


@pytest.fixture(scope="module")
def lab(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepLab]:
    with open_lab(workspace, tmp_path_factory.mktemp("lab")) as lab:
        yield lab


def passes_of_a_step(
    updater: PolicyUpdater, batch: TrainBatch, monkeypatch: pytest.MonkeyPatch
) -> tuple[Counter[str], dict[str, float], float]:
    """How often a model ran, "graph" where a gradient was wanted; the metrics; operations of the passes."""
    found: Counter[str] = Counter()
    operations: list[float] = []
    models = {"policy": updater.policy, "reference": updater.reference}
    for name, model in models.items():
        if model is not None:

            def spy(*args: Any, forward: Any = model.forward, name: str = name, **kwargs: Any) -> Any:
                found[name + " graph" * torch.is_grad_enabled()] += 1
                forward_pass = operations_of(args[0], updater.cost_model)
                operations.append(forward_pass * (3 if torch.is_grad_enabled() else 1))
                return forward(*args, **kwargs)

            monkeypatch.setattr(model, "forward", spy)
    return found, updater.step(batch, 0), sum(operations)


def operations_of(packed: PackedBatch, cost: CostModel) -> float:
    """Of a forward pass, from what the model is given."""
    lengths = packed.cu_seqlens.diff().double()
    text = cost.per_token * lengths.sum() + cost.per_square * lengths.square().sum()
    head = cost.per_response_token * len(packed.targets)
    patches = np.array([math.prod(grid) for grid in packed.image_grids])
    return float(text) + head + float(cost.images_forward(patches).sum())


KNOWN = {"old_log_probs": -3.0, "reference_log_probs": -3.1}
PASSES: list[tuple[list[str], tuple[str, ...], dict[str, int]]] = [
    # On policy the first pass gives the old log-probs; the last one measures the KL.
    (["actor.updates_per_step=1"], (), {"policy graph": 1, "policy": 1}),
    (["actor.updates_per_step=3"], (), {"policy graph": 3, "policy": 2 + 1}),
    (["actor.updates_per_step=3"], ("old_log_probs",), {"policy graph": 3, "policy": 1}),
    (
        ["actor.updates_per_step=2", "algorithm.kl.coef=0.1"],
        (),
        {"policy graph": 2, "policy": 1 + 1, "reference": 2},
    ),
    (
        ["actor.updates_per_step=2", "algorithm.kl.coef=0.1"],
        ("old_log_probs", "reference_log_probs"),
        {"policy graph": 2, "policy": 1},
    ),
    (
        ["actor.updates_per_step=2", "algorithm.loss.text_anchor_coef=0.1"],
        (),
        {"policy graph": 2, "policy": 2 + 1 + 1},
    ),
    # Visual credit needs both before every update, and the old log-probs are among them.
    (
        ["actor.updates_per_step=2", "algorithm.shaping.visual=vppo"],
        (),
        {"policy graph": 2, "policy": 2 + 2 + 1},
    ),
    (
        ["actor.updates_per_step=2", "actor.kl_probe=held_out", "actor.kl_probe_fraction=0.3"],
        (),
        {"policy graph": 2, "policy": 1 + 1 + 1},
    ),
    # The KL is in the reward, so that the loss has none, and needs no reference.
    (
        ["algorithm.name=reinforce_pp", "algorithm.kl.coef=0.1", "algorithm.kl.placement=reward"],
        ("old_log_probs",),
        {"policy graph": 2, "policy": 1},
    ),
]


@pytest.mark.parametrize(("options", "known", "expected"), PASSES)
def test_a_step_makes_the_passes_that_it_needs(
    lab: StepLab,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    known: tuple[str, ...],
    expected: dict[str, int],
) -> None:
    updater = lab.updater(tmp_path, WIDE, *options)
    tokens = len(lab.batch.engine_log_probs)
    arrays = {name: np.full(tokens, KNOWN[name], np.float32) for name in known}
    batch = dataclasses.replace(lab.batch, **arrays)
    found, metrics, operations = passes_of_a_step(updater, batch, monkeypatch)
    assert found == expected
    # Without images the prompt has no marks around them, either.
    blind = {"algorithm.loss.text_anchor_coef=0.1", "algorithm.shaping.visual=vppo"}
    rel = 0.02 if blind & {*options} else 1e-9
    assert metrics["perf/update_tera_operations"] * 1e12 == pytest.approx(operations, rel=rel)
    in_loss = "algorithm.kl.coef=0.1" in options and "algorithm.kl.placement=reward" not in options
    assert ("policy/kl_ref" in metrics) == in_loss


def test_whole_parameters_are_kept_to_the_last_pass_and_dropped_after_it(
    lab: StepLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a reference that is kept gathered nothing changes, so it is never dropped."""
    dropped: list[Any] = []
    last: list[bool] = []
    monkeypatch.setattr(update, "reshard", dropped.append)
    monkeypatch.setattr(
        update, "accumulate_locally", lambda _, last_pass=last, **k: last_pass.append(k["last"])
    )
    for kept in ("false", "true"):
        options = ["actor.updates_per_step=1", "algorithm.kl.coef=0.1", f"actor.keep_gathered={kept}"]
        updater = lab.updater(tmp_path, "actor.micro_batch_tokens=100", *options)
        passes = len(updater.plan(lab.batch, 0).updates[0].ranks[0])
        assert passes > 2
        updater.step(lab.batch, 0)
        assert last == ([False] * (passes - 1) + [True] if kept == "true" else [])
        before_and_after = [lab.policy] * 2 if kept == "true" else [lab.policy, lab.reference] * 2
        assert all(a is b for a, b in zip(dropped, before_and_after, strict=True))
        dropped.clear()


@pytest.mark.parametrize("prompts", [["t0", "t1", "t2", "t3", "t6"], ["t1"]], ids=["shared", "runs along"])
def test_two_ranks_between_them_have_the_gradient_of_one(
    lab: StepLab, workspace: Workspace, tmp_path: Path, prompts: list[str]
) -> None:
    """One after the other, without collectives: FSDP would take the mean of their gradients."""
    batch = make_batch(workspace, prompts)

    def backward(rank: int, ranks: int) -> tuple[torch.Tensor, float, float, Any]:
        options = ["actor.updates_per_step=1", f"rollout.rollouts_per_step={len(prompts)}"]
        updater = lab.updater(tmp_path, f"actor.num_ranks={ranks}", *options)
        updater.rank = rank
        state = updater.begin(batch)
        updater.guard.begin()
        updater.backward(state, updater.plan(batch, 0).updates[0])
        updater._probe_kl(state, updater.plan(batch, 0))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in lab.policy.parameters()]
        observed = {s for sequences, _ in updater.guard._passes for s in sequences}
        measured = state.measured.reduce()
        scored = updater.log_probs(batch, reference=False)
        lab.policy.zero_grad(set_to_none=True)
        gradient = torch.cat([g.flatten() for g in gradients])
        return gradient, measured["policy/loss"], measured["rollout/mismatch_max"], (observed, scored)

    whole, loss, largest, (_, scored) = backward(0, 1)
    (first, a, c, (seen, half)), (second, b, d, (rest, other)) = backward(0, 2), backward(1, 2)
    torch.testing.assert_close((first + second) / 2, whole, rtol=1e-6, atol=1e-9)
    assert a + b == pytest.approx(loss, rel=1e-6) and max(c, d) == pytest.approx(largest, rel=1e-6)
    assert seen.isdisjoint(rest) and seen | rest == set(range(len(prompts)))
    np.testing.assert_allclose(
        join_log_probs([half, other], batch).policy, join_log_probs([scored], batch).policy, atol=1e-6
    )
    if len(prompts) == 1:
        assert not (first.any() and second.any())


def test_where_nothing_is_finite_the_kl_is_none(lab: StepLab, tmp_path: Path) -> None:
    """The method and the weight of the KL learn from it, and take no NaN."""
    updater = lab.updater(tmp_path, "actor.updates_per_step=1", "algorithm.kl.coef=0.1")
    with torch.no_grad():
        lab.policy.model.lm_head.weight[:] = torch.nan
    metrics = updater.step(lab.batch, 0)
    assert metrics["policy/skipped_updates"] == 1
    assert (metrics["policy/kl_update"], metrics["policy/kl_ref"]) == (0.0, 0.0)
    assert math.isnan(metrics["policy/entropy"]) and math.isnan(metrics["policy/loss"])
