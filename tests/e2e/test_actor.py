"""The FSDP2 update on real process groups: what must not change the gradient, and what must not hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mssr.models.loading import load_model
from mssr.runs.config import load_config
from tests.conftest import Workspace
from tests.e2e.ranks import RunRanks, make_batch, relative_difference

pytestmark = pytest.mark.e2e


def test_gradient_depends_neither_on_micro_batches_nor_on_ranks(
    workspace: Workspace, run_ranks: RunRanks
) -> None:
    batch = make_batch(workspace, [f"t{i % 8}" for i in range(12)])

    def job(budget: int, *overrides: str) -> dict[str, Any]:
        sizes = ["actor.updates_per_step=1", "rollout.rollouts_per_step=12"]
        return {"gradient": True, "overrides": [*sizes, f"actor.micro_batch_tokens={budget}", *overrides]}

    kept, recomputed = "actor.keep_gathered=true", "actor.activation_checkpointing=true"
    *runs, (gradient, counts) = run_ranks(batch, 1, [job(100000), job(120), job(100000, recomputed)])
    assert relative_difference(runs[0][0], gradient) < 1e-5
    assert (runs[0][1]["layer_runs"], counts["layer_runs"]) == (1, 2)
    runs += run_ranks(batch, 2, [job(100000), job(70), job(100000, kept), job(70, kept)])
    assert [m["passes"] for _, m in runs][::2] == [1, 1, 1]
    assert all(m["passes"] > 2 for _, m in runs[1::2])  # the budgets really differ
    names = set(runs[0][0])
    assert any("visual" in n for n in names) and any("language_model.layers" in n for n in names)
    for gradient, _ in runs[1:]:
        assert relative_difference(runs[0][0], gradient) < 1e-5


def test_whole_tensors_are_gathered_from_any_number_of_rows(
    workspace: Workspace, run_ranks: RunRanks
) -> None:
    """Fewer rows than ranks, rows that do not divide, several in one collective, one too large for that."""
    shapes = [(4, 2), (3,), (5, 3), (2,), (1, 2, 2), (2,), (3, 100), (2,), (2,)]
    [(found, _)] = run_ranks(make_batch(workspace, ["t0"]), 2, [{"gather": shapes}])
    for k, shape in enumerate(shapes):
        assert torch.equal(found[f"{k}"].float(), torch.arange(np.prod(shape)).float().reshape(shape)), shape
    assert [found["0"].dtype, found["2"].dtype] == [torch.float64, torch.float32]


# By sequences, with whole-sequence ratios, and passes of their own for the anchor.
EVERY_TERM = [
    "algorithm.loss.name=gspo",
    "algorithm.loss.entropy_coef=0.1",
    "algorithm.loss.text_anchor_coef=0.5",
    "algorithm.kl.coef=0.5",
    "algorithm.correction.weight=sequence",
    "algorithm.correction.mask=token",
]


def test_the_other_terms_of_the_loss_depend_on_neither(workspace: Workspace, run_ranks: RunRanks) -> None:
    batch = make_batch(workspace, [f"t{i % 8}" for i in range(8)])

    def job(budget: int, *overrides: str) -> dict[str, Any]:
        sizes = ["actor.updates_per_step=1", "rollout.rollouts_per_step=8"]
        return {"gradient": True, "overrides": [*sizes, f"actor.micro_batch_tokens={budget}", *overrides]}

    (plain, _), (whole, _) = run_ranks(batch, 1, [job(100000), job(100000, *EVERY_TERM)])
    assert relative_difference(plain, whole) > 0.01
    for gradient, _ in run_ranks(batch, 2, [job(100000, *EVERY_TERM), job(70, *EVERY_TERM)]):
        assert relative_difference(whole, gradient) < 1e-5


UNEVEN = [
    (["t1", "t2"], 1),  # an image on one rank, text alone on the other: neither may wait for ever
    (["t2", "t6", "t2"], 1),  # no image anywhere
    (["t0", "t1"], 2),  # one sequence an update: a rank runs along with weight 0
]


def test_uneven_work_neither_hangs_nor_counts(workspace: Workspace, run_ranks: RunRanks) -> None:
    def job(prompts: list[str], updates: int) -> dict[str, Any]:
        sizes = [f"actor.updates_per_step={updates}", f"rollout.rollouts_per_step={len(prompts)}"]
        overrides = [*sizes, "actor.kl_probe_fraction=1.0"]
        return {"batch": make_batch(workspace, prompts), "overrides": overrides}

    on_one = run_ranks(None, 1, [job(*case) for case in UNEVEN])
    on_two = run_ranks(None, 2, [job(*case) for case in UNEVEN])
    for case, (one, metrics_one), (two, metrics_two) in zip(UNEVEN, on_one, on_two, strict=True):
        assert relative_difference(one, two) < 1e-4, case
        for key in ("policy/entropy", "policy/loss", "policy/kl_update", "rollout/mismatch_max"):
            assert metrics_one[key] == pytest.approx(metrics_two[key], rel=1e-3, abs=1e-6), (case, key)


def test_a_non_finite_gradient_is_skipped_on_all_ranks(
    workspace: Workspace, run_ranks: RunRanks, tmp_path: Path
) -> None:
    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])
    batch.advantages[0] = np.nan  # in one of the two updates, on one rank
    job = {"overrides": [f"trainer.run_dir={tmp_path}"]}
    (untouched, _), (weights, metrics) = run_ranks(batch, 2, [{"steps": 0}, job])
    assert metrics["policy/skipped_updates"] == 1 and np.isfinite(metrics["policy/entropy"])
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert relative_difference(untouched, weights) > 0  # the other update was made
    # Dumped by the rank that ran it, and by that one alone, with the names of what it holds shards of.
    [dump] = (tmp_path / "nonfinite").glob("*.json")
    report = json.loads(dump.read_text())
    assert [x["prompt_id"] for x in report["sequences"]] == ["t0"]
    assert any("language_model" in name for name in report["parameters"])


def test_a_checkpoint_loads_on_another_number_of_ranks(
    workspace: Workspace, run_ranks: RunRanks, tmp_path: Path
) -> None:
    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])
    directory, from_one = str(tmp_path / "checkpoint"), str(tmp_path / "from-one")
    (saved, _), (next_two, _), (other_optimizer, _) = run_ranks(
        batch, 2, [{"save": directory}, {"load": directory}, {"load": directory, "steps": 2}]
    )
    (loaded, _), (next_one, _) = run_ranks(
        batch, 1, [{"load": directory, "steps": 0, "save": from_one}, {"load": directory}]
    )
    assert all(torch.equal(saved[k], loaded[k]) for k in saved)
    [(back, _)] = run_ranks(batch, 2, [{"load": from_one, "steps": 0}])
    assert all(torch.equal(saved[k], back[k]) for k in saved)
    # With the optimizer's moments, so that the next step is the same too.
    assert relative_difference(next_one, next_two) < 1e-4
    assert relative_difference(next_two, other_optimizer) > 1e-4


# Those of the algorithm are in tests/unit/test_live_options.py.
OPTIONS = [
    "actor.lr=0.02",
    "actor.lr_schedule=linear",
    "actor.lr_schedule=cosine",
    "actor.warmup_steps=5",
    "actor.betas=[0.5,0.9]",
    "actor.weight_decay=5.0",
    "actor.max_grad_norm=0.01",
    "actor.updates_per_step=4",
    "rollout.temperature=0.5",
    "model.freeze_vision=true",
    "model.dtype=bfloat16",
    "seed=1",
]


def test_every_option_of_the_update_reaches_the_parameters(workspace: Workspace, run_ranks: RunRanks) -> None:
    batch = make_batch(workspace, [f"t{i}" for i in range(8)] * 2)
    basis = ["actor.lr=0.01", "actor.max_grad_norm=10"]
    jobs = [{"overrides": [*basis, *option], "steps": 2} for option in ([], *([o] for o in OPTIONS))]
    (plain, _), *results = run_ranks(batch, 1, jobs)
    differences = {o: relative_difference(plain, w) for o, (w, _) in zip(OPTIONS, results, strict=True)}
    assert not [option for option, difference in differences.items() if difference < 1e-6]


def test_keeping_parameters_gathered_changes_nothing(workspace: Workspace, run_ranks: RunRanks) -> None:
    """But the communication, and that over several steps: a parameter that stays gathered past an update
    would be stale."""
    batch = make_batch(workspace, [f"t{i}" for i in range(8)])

    def jobs(kept: str) -> list[dict[str, Any]]:
        option = f"actor.keep_gathered={kept}"
        counted = {"gradient": True, "overrides": [option, "actor.micro_batch_tokens=40"]}
        return [{"steps": 3, "overrides": [option]}, counted]

    found = run_ranks(batch, 2, jobs("false") + jobs("true"))
    (gathered, metrics), (_, often), (kept, metrics_kept), (_, once) = found
    assert relative_difference(gathered, kept) < 1e-4
    for key in ("policy/kl_update", "policy/kl_ref", "rollout/mismatch_max", "policy/grad_norm"):
        assert metrics[key] == pytest.approx(metrics_kept[key], rel=1e-3), key
    # Three vision blocks, four layers and the root: once an update, or in every pass, and the layers again in
    # its backward pass.
    passes = often["passes"]
    assert passes == once["passes"] > 1
    assert (once["gathers"], once["scatters"]) == (8, 8)
    assert often["gathers"] >= 15 * passes - 8 and often["scatters"] == 8 * passes


def test_a_frozen_vision_tower_does_not_move(workspace: Workspace, run_ranks: RunRanks) -> None:
    batch = make_batch(workspace, ["t0", "t1", "t3", "t0"])
    (base, _), (trained, _), (frozen, _) = run_ranks(
        batch, 2, [{"steps": 0}, {}, {"overrides": ["model.freeze_vision=true"]}]
    )
    vision = [name for name in base if ".visual." in name]
    assert all(torch.equal(base[n], frozen[n]) for n in vision)
    assert any(not torch.equal(base[n], trained[n]) for n in vision)
    assert any(not torch.equal(base[n], frozen[n]) for n in base)


def test_a_frozen_tower_is_run_alone_and_its_features_are_kept(
    workspace: Workspace, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """One rank has images and the other has none; with and without memory for features; saved and loaded."""
    batch = make_batch(workspace, ["t1", "t2", "t2", "t2"])
    frozen = ["model.freeze_vision=true", "actor.updates_per_step=1", "rollout.rollouts_per_step=4"]
    directory = str(tmp_path / "checkpoint")
    (computed, _), (kept, _) = run_ranks(
        batch,
        2,
        [
            {"steps": 2, "overrides": [*frozen, "actor.vision_cache_gib=0"]},
            {"steps": 2, "overrides": frozen, "save": directory},
        ],
    )
    (alone, _), (loaded, _) = run_ranks(
        batch,
        1,
        [{"steps": 2, "overrides": frozen}, {"load": directory, "steps": 0, "overrides": frozen}],
    )
    assert relative_difference(computed, kept) < 1e-6
    assert relative_difference(kept, alone) < 1e-4
    assert all(torch.equal(kept[name], loaded[name]) for name in kept)


# What saves memory: the same training, and checkpoints for any number of ranks.

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


# Several copies of the policy, each shared by some ranks (HSDP): the training of one copy.

TWO = ["actor.shard_size=2"]


def test_two_copies_on_four_ranks_train_like_one(
    workspace: Workspace, run_ranks: RunRanks, tmp_path: Path
) -> None:
    batch = make_batch(workspace, [f"t{i}" for i in range(8)])
    # Four passes, of which the second and third have no image, and no gradient of the merger in the root.
    mixed = make_batch(workspace, ["t0", "t1", "t3", "t4"] + ["t2", "t6"] * 6)

    def gradient(*overrides: str) -> dict[str, Any]:
        sizes = ["actor.updates_per_step=1", "rollout.rollouts_per_step=16"]
        return {"gradient": True, "batch": mixed, "overrides": [*sizes, *overrides]}

    of_one, of_two = str(tmp_path / "one"), str(tmp_path / "two")
    passes = "actor.micro_batch_tokens=40"
    (expected, _), (one, metrics) = run_ranks(batch, 1, [gradient(), {"save": of_one}])
    [(whole, _)] = run_ranks(batch, 2, [gradient(passes, "actor.shard_size=1")])  # on every rank
    jobs = [
        gradient(passes, *TWO),
        gradient(passes, *TWO, "actor.keep_gathered=true"),
        {"overrides": TWO, "save": of_two},
        {"overrides": TWO, "load": of_one},
    ]
    (found, counts), (kept, kept_counts), (two, metrics_two), (next_two, after_two) = run_ranks(
        batch, 4, jobs
    )
    (two_in_one, _), (next_one, after_one) = run_ranks(
        batch, 1, [{"load": of_two, "steps": 0}, {"load": of_one}]
    )
    for gradients in (whole, found, kept):
        assert relative_difference(expected, gradients) < 1e-5
    # The 4 layers once an update, the root in every pass, the 3 vision blocks in those with images.
    assert (counts["passes"], counts["all_reduces"], kept_counts["all_reduces"]) == (4, 4 + 4 + 3 * 2, 8)
    assert relative_difference(one, two) < 1e-5
    assert metrics["policy/grad_norm"] == pytest.approx(metrics_two["policy/grad_norm"], rel=1e-5)
    assert metrics_two["distinct_states"] == 2
    assert all(torch.equal(two[name], two_in_one[name]) for name in two)
    assert relative_difference(next_one, next_two) < 1e-4
    assert relative_difference(one, next_two) > 1e-3
    assert after_one["policy/grad_norm"] == pytest.approx(after_two["policy/grad_norm"], rel=1e-4)


def test_copies_stay_equal_whatever_saves_memory(
    workspace: Workspace, run_ranks: RunRanks, tmp_path: Path
) -> None:
    """And each is what it would be alone, on as many ranks."""
    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])
    base = load_model(load_config(workspace.config).model, torch.float32).state_dict()
    kinds = {"lora": [*LORA, *STOCHASTIC], "eight": [*EIGHT, "model.freeze_vision=true"]}
    copies = [{"overrides": [*o, *TWO], "save": str(tmp_path / k)} for k, o in kinds.items()]
    loads = [{"overrides": o, "load": str(tmp_path / k), "steps": 0} for k, o in kinds.items()]
    found = run_ranks(batch, 4, copies)
    alone = run_ranks(batch, 2, [{"overrides": options} for options in kinds.values()])
    loaded = run_ranks(batch, 1, loads)
    for kind, (two, metrics), (one, _), (same, _) in zip(kinds, found, alone, loaded, strict=True):
        moved = relative_difference(base, one)
        # Rounded at random, by shard, or in 8 bits, they differ by less than a step.
        assert moved > 1e-4 and relative_difference(one, two) < 0.25 * moved, kind
        assert metrics["distinct_states"] == 2, kind
        assert all(torch.equal(two[name], same[name]) for name in two), kind
