"""`PolicyUpdater.step` against a naive loop over unpacked sequences: parameters and every metric by value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mssr.actor.operations import model_operations
from mssr.actor.update import PolicyUpdater
from mssr.cluster.base import join_log_probs
from mssr.types import TrainBatch
from tests.conftest import Workspace
from tests.unit.naive_step import Recipe
from tests.unit.step_lab import IDS, StepLab, open_lab

pytestmark = pytest.mark.unit


@dataclasses.dataclass(frozen=True)
class Case:
    """A recipe of the oracle, which is also the config; the batch brings the ``known`` arrays along."""

    recipe: Recipe
    updates: int = 1
    known: tuple[str, ...] = ()
    held_out: bool = False
    """Whether a third of the prompts is only probed."""
    empty: tuple[int, ...] = ()
    """Sequences whose response is empty."""
    alive: tuple[str, ...] = ()
    """Metrics between 0 and 1, and neither: the case would show less if they were."""


CLIPS = ("policy/clip_fraction", "policy/dual_clip_fraction")
MASKED = ("correction/masked",)
LEFT_OUT = "shaping/left_out_fraction"
BRANCH = ("shaping/entropy_branch_fraction",)
CASES = {
    "as published": Case(Recipe(shaping="exact", kl_coef=0.01), updates=2),
    "every term, by sequences": Case(
        Recipe(
            aggregation="sequence_mean",
            shaping="exact",
            shaping_coef=0.05,
            kl="k2",
            kl_coef=0.5,
            anchor_coef=0.3,
            entropy_coef=0.2,
            weight="token",
            max_weight=1.1,
            temperature=0.7,
            max_grad_norm=0.05,
        ),
        updates=3,
        alive=BRANCH,
    ),
    "clips, constant length": Case(
        Recipe(
            aggregation="constant_length",
            constant_length=9,
            clip_low=0.05,
            clip_high=0.08,
            dual_clip=1.2,
            mask="geometric",
            mask_low=0.9,
            mask_high=1.1,
            max_grad_norm=100.0,
            weight_decay=0.3,
            betas=(0.5, 0.9),
        ),
        updates=2,
        known=("old_log_probs",),
        alive=(*CLIPS, *MASKED),
    ),
    "weights of sequences, on policy": Case(
        Recipe(
            shaping="sampled",
            shaping_coef=40.0,
            shaping_divisor=0.4,
            weight="sequence",
            mask="token",
            mask_low=0.8,
            mask_high=1.3,
        ),
        alive=(*BRANCH, "shaping/sign_flip_fraction", *MASKED),
    ),
    "scored before": Case(
        Recipe(kl="k1", kl_coef=0.4, entropy_coef=0.1, mask="sequence", temperature=1.3),
        updates=2,
        known=("old_log_probs", "reference_log_probs"),
        alive=MASKED,
    ),
    "token advantages": Case(Recipe(dual_clip=None), updates=3, known=("token_advantages",), alive=CLIPS[:1]),
    "gspo": Case(
        Recipe(loss="gspo", clip_low=0.02, clip_high=0.03, aggregation="sequence_mean", entropy_coef=0.1),
        updates=2,
        known=("old_log_probs",),
        alive=CLIPS[:1],
    ),
    "cispo": Case(
        Recipe(loss="cispo", clip_low=0.1, clip_high=0.1, anchor_coef=0.5), updates=2, alive=CLIPS[:1]
    ),
    "held out": Case(
        Recipe(aggregation="sequence_mean", shaping="exact", kl_coef=0.2), updates=2, held_out=True
    ),
    "empty responses": Case(
        Recipe(aggregation="sequence_mean", kl_coef=0.2, mask="geometric", anchor_coef=0.1), empty=(1, 2)
    ),
    "dis, vppo": Case(
        Recipe(loss="dis", clip_low=0.15, clip_high=0.35, visual="vppo", shaping="exact"),
        updates=2,
        known=("old_log_probs",),
        empty=(1,),
        alive=(*CLIPS[:1], LEFT_OUT),
    ),
    "flash_reinforce, negative tokens": Case(
        Recipe(
            loss="flash_reinforce",
            aggregation="sequence_mean",
            max_kl=1e-4,
            negative_fraction=0.3,
            kl_coef=0.1,
        ),
        alive=("policy/dropped_fraction", LEFT_OUT),
    ),
    "vepo, negative tokens, control of entropy": Case(
        Recipe(visual="vepo", negative_fraction=0.6, entropy_alpha=-0.7, confident=0.004),
        updates=2,
        alive=(LEFT_OUT,),
    ),
    "sapo": Case(Recipe(loss="sapo", tau_positive=2.0, tau_negative=3.0), updates=2),
}
SECTIONS = {
    "algorithm.loss": "clip_low clip_high dual_clip tau_positive tau_negative max_kl aggregation "
    "constant_length entropy_coef",
    "algorithm.shaping": "visual visual_fraction negative_fraction",
    "algorithm.entropy_control": "confident",
    "algorithm.correction": "weight max_weight mask mask_low mask_high",
    "actor": "max_grad_norm lr betas weight_decay",
    "rollout": "temperature",
}
KEYS = {name: f"{section}.{name}" for section, names in SECTIONS.items() for name in names.split()} | {
    "loss": "algorithm.loss.name",
    "shaping": "algorithm.shaping.entropy",
    "shaping_coef": "algorithm.shaping.coef",
    "shaping_divisor": "algorithm.shaping.divisor",
    "kl": "algorithm.kl.estimator",
    "kl_coef": "algorithm.kl.coef",
    "anchor_coef": "algorithm.loss.text_anchor_coef",
}
"""Field of a recipe -> option of a config."""


def overrides(case: Case) -> list[str]:
    """Of the config: what differs from a plain recipe, so that nothing is set that is not read."""
    given = dataclasses.asdict(case.recipe)
    plain = dataclasses.asdict(Recipe())
    alpha = given.pop("entropy_alpha")  # which the trainer puts into the batch
    changed = {KEYS[name]: value for name, value in given.items() if value != plain[name]}
    if alpha:
        changed["algorithm.entropy_control.target"] = 1.0
    changed = {key: "null" if value is None else value for key, value in changed.items()}
    if case.recipe.betas != plain["betas"]:
        changed[KEYS["betas"]] = str(list(case.recipe.betas))
    if case.recipe.kl == "k1":  # which a config refuses in the loss, and the objective takes
        del changed[KEYS["kl"]]
    changed["algorithm.name"] = "mvsr" if case.recipe.shaping is None else "mssr"
    changed["actor.updates_per_step"] = case.updates
    if case.held_out:
        changed |= {"actor.kl_probe": "held_out", "actor.kl_probe_fraction": 0.3}
    return [f"{key}={value}" for key, value in changed.items()]


@pytest.fixture(scope="module")
def lab(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepLab]:
    with open_lab(workspace, tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_that_of_a_naive_loop(lab: StepLab, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    updater = lab.updater(tmp_path, *overrides(case))
    updater.objective = dataclasses.replace(updater.objective, kl_estimator=case.recipe.kl)
    batch = batch_of(lab, updater, case)
    number = list(CASES).index(name)  # of the step, on which the order of the sequences depends
    plan = updater.plan(batch, number)
    parts = [update.sequences for update in plan.updates]
    probed = tuple(s for micro in plan.probe[0] for s in micro.sequences)
    trained = {s for part in parts for s in part}
    assert len(parts) == case.updates and sum(map(len, parts)) == len(trained)
    assert trained | set(probed) == set(range(len(IDS)))
    assert (trained.isdisjoint(probed), len(probed)) == ((True, 2) if case.held_out else (False, len(IDS)))
    metrics = updater.step(batch, number)
    naive = lab.naive(case.recipe)
    expected = naive.step(batch, parts, probed)
    expected |= {"policy/lr": 1e-3, "policy/skipped_updates": 0.0, "perf/prompts_encoded_by_ranks": 5.0}
    work = model_operations(updater.config, updater.cost_model, batch, plan)
    expected["perf/update_tera_operations"] = work / 1e12  # test_update_passes.py has it by value
    assert metrics.keys() == expected.keys()
    close = {k: pytest.approx(v, rel=1e-6, abs=1e-6) for k, v in expected.items()}
    assert {k: (v, close[k]) for k, v in metrics.items() if v != close[k]} == {}
    assert all(0 < metrics[key] < 1 for key in case.alive), {key: metrics[key] for key in case.alive}
    ours = dict(lab.policy.model.named_parameters())
    for key, p in naive.model.named_parameters():
        torch.testing.assert_close(
            ours[key], p, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    moved = [float((p.detach() - lab.start[key]).abs().max()) for key, p in naive.model.named_parameters()]
    assert min(moved) > 5e-4  # the tolerance is far below what a step changes


def test_both_models_are_scored_as_one_sequence_at_a_time(lab: StepLab, tmp_path: Path) -> None:
    updater = lab.updater(tmp_path, "rollout.temperature=0.7", "algorithm.kl.coef=0.1")
    scored = join_log_probs([updater.log_probs(lab.batch, reference=True)], lab.batch)
    naive = lab.naive(Recipe(temperature=0.7))
    with torch.no_grad():
        for found, model in ((scored.policy, naive.model), (scored.reference, naive.reference)):
            one_by_one = [naive.score(model, lab.batch, s)[0] for s in range(len(IDS))]
            np.testing.assert_allclose(found, torch.cat(one_by_one), atol=1e-5)
    assert np.abs(scored.policy - scored.reference).max() > 0.1
    assert updater.log_probs(lab.batch, reference=False).reference is None


def batch_of(lab: StepLab, updater: PolicyUpdater, case: Case) -> TrainBatch:
    """Engine, old policy and reference differ from the policy by some tenths: clips and masks take part."""
    rng, batch = np.random.default_rng(1), lab.batch
    for s in case.empty:
        batch = without_response(batch, s)
    policy = join_log_probs([updater.log_probs(batch, reference=False)], batch).policy
    noise = [rng.normal(scale=0.3, size=len(policy)).astype(np.float32) for _ in range(3)]
    given = {
        "old_log_probs": policy + noise[1],
        "reference_log_probs": policy + noise[2],
        "token_advantages": rng.normal(size=len(policy)).astype(np.float32),
    }
    return dataclasses.replace(
        batch,
        engine_log_probs=policy + noise[0],
        kl_coef=case.recipe.kl_coef,
        entropy_alpha=case.recipe.entropy_alpha,
        **{name: given[name] for name in case.known},
    )


def without_response(batch: TrainBatch, s: int) -> TrainBatch:
    start, end = batch.offsets[s] + batch.prompt_lengths[s], batch.offsets[s + 1]
    return dataclasses.replace(
        batch,
        tokens=np.delete(batch.tokens, np.arange(start, end)),
        offsets=batch.offsets - (end - start) * (np.arange(len(batch) + 1) > s),
        engine_log_probs=np.delete(batch.engine_log_probs, np.arange(*batch.response_offsets[s : s + 2])),
    )
