"""The plan of a step: complete, balanced, the same for all ranks, within the budget."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from mssr.actor.planning import MicroBatch, Planner
from mssr.errors import UserError
from mssr.models.cost import SequenceWork

pytestmark = pytest.mark.unit


def make_work(seed: int, count: int, n: int = 1) -> SequenceWork:
    """Sequences of ``count / n`` prompts, a third of them with images, n responses each."""
    rng = np.random.default_rng(seed)
    prompts = np.arange(count) // n
    responses = rng.integers(1, 50, count)
    lengths = responses + rng.integers(5, 40, count)[prompts]
    images = np.where(rng.random(count) < 0.3, rng.integers(100, 2000, count), 0)
    cost = 10 * lengths + lengths**2 // 50 + 20 * responses
    return SequenceWork(lengths, cost, images[prompts], prompts, homes=7 * prompts)


def vision_like(seed: int, prompts: int, n: int) -> SequenceWork:
    """Long-tailed responses to prompts of 300 to 1500 tokens, most of them an image."""
    rng = np.random.default_rng(seed)
    prompt = np.repeat(rng.integers(300, 1500, prompts), n)
    responses = np.minimum(rng.lognormal(np.log(400), 0.7, prompts * n), 4096).astype(np.int64)
    lengths = prompt + responses
    cost = 20 * lengths + lengths**2 // 1500 + responses
    numbers = np.repeat(np.arange(prompts), n)
    return SequenceWork(lengths, cost, 30 * prompt, numbers, homes=numbers)


def elapsed(planner: Planner, ranks: tuple[tuple[MicroBatch, ...], ...]) -> int:
    """Ranks wait for the dearest in every pass."""
    return sum(max(planner.cost(m.sequences) for m in passes) for passes in zip(*ranks, strict=True))


@pytest.mark.parametrize("seed", range(30))
def test_every_sequence_once_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    count, ranks, updates = int(rng.integers(3, 40)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    budget = int(rng.integers(60, 400))
    work = make_work(seed, count, n=int(rng.integers(1, 6)))
    planner = Planner(work, ranks=ranks, token_budget=budget)
    images = work.image_cost > 0
    plans = planner.step(updates, (seed, 0)).updates
    assert sorted(s for plan in plans for s in plan.sequences) == list(range(count))
    for plan in plans:
        assert len(plan.ranks) == ranks
        assert len({len(passes) for passes in plan.ranks}) == 1
        real = [m for passes in plan.ranks for m in passes if m.weight]
        assert sorted(s for m in real for s in m.sequences) == sorted(plan.sequences)
        for micro in real:
            assert work.lengths[list(micro.sequences)].sum() <= budget or len(micro.sequences) == 1
        for passes in zip(*plan.ranks, strict=True):  # what runs at the same time
            assert len({m.any_rank_has_images for m in passes}) == 1
            if any(images[s] for m in passes for s in m.sequences):
                assert passes[0].any_rank_has_images
        assert plan.ranks[0][-1].any_rank_has_images == any(images[list(plan.sequences)])


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_are_balanced_in_cost_in_every_pass_and_in_all(ranks: int, n: int) -> None:
    work = vision_like(5, 512 // n, n)
    planner = Planner(work, ranks=ranks, token_budget=16384)
    [plan] = planner.step(1, (0, 0)).updates
    totals = [sum(planner.cost(m.sequences) for m in passes) for passes in plan.ranks]
    assert max(totals) < 1.02 * np.mean(totals)
    assert elapsed(planner, plan.ranks) < 1.05 * np.mean(totals)
    # Not by filling passes badly; whole prompts fill them less well and save images.
    full = work.lengths.sum() / 16384 / ranks
    assert len(plan.ranks[0]) <= 1 + np.ceil(full if n == 1 else 1.3 * full)


@pytest.mark.parametrize(("ranks", "share"), [(2, 0.8), (8, 0.7)])
def test_prompts_keep_their_ranks_where_that_costs_next_to_nothing(ranks: int, share: float) -> None:
    """By chance, 1 of ``ranks`` would be there."""
    work = vision_like(5, 512, 1)
    nowhere = dataclasses.replace(work, homes=0 * work.homes)
    planner, other = (Planner(w, ranks=ranks, token_budget=16384) for w in (work, nowhere))
    plans = planner.everything()
    at_home = [
        work.homes[s] % ranks == rank for rank in range(ranks) for m in plans[rank] for s in m.sequences
    ]
    assert np.mean(at_home) > share
    assert elapsed(planner, plans) <= 1.02 * elapsed(other, other.everything())


def test_cost_decides_and_not_tokens() -> None:
    """Four sequences as long as each other, one as dear as the three others."""
    lengths, prompts = np.full(4, 100), np.arange(4)
    cost = np.array([300, 100, 100, 100])
    planner = Planner(SequenceWork(lengths, cost, 0 * cost, prompts, prompts), ranks=2, token_budget=1000)
    shares = {passes[0].sequences for passes in planner.everything()}
    assert shares == {(0,), (1, 2, 3)}
    images = np.array([300, 0, 0, 0])
    planner = Planner(
        SequenceWork(lengths, cost // cost, images, prompts, prompts), ranks=2, token_budget=1000
    )
    assert {passes[0].sequences for passes in planner.everything()} == {(0,), (1, 2, 3)}


def test_responses_of_a_prompt_share_a_pass() -> None:
    work = vision_like(1, 32, 8)
    planner = Planner(work, ranks=2, token_budget=16384)
    for plan in planner.step(4, (0, 0)).updates:
        encoded = [{int(work.prompts[s]) for s in m.sequences} for passes in plan.ranks for m in passes]
        assert sum(map(len, encoded)) <= 1.3 * len(set.union(*encoded))
        assert len(set.union(*encoded)) == 8  # whole prompts in every update


def test_a_prompt_is_cut_where_balance_asks_for_it() -> None:
    """One prompt on two ranks: its image is encoded twice, so that neither rank stands still."""
    lengths = np.full(8, 100)
    work = SequenceWork(lengths, lengths * 10, lengths, 0 * lengths, 0 * lengths)
    passes = Planner(work, ranks=2, token_budget=10000).everything()
    assert [len(p[0].sequences) for p in passes] == [4, 4]
    two = SequenceWork(lengths, lengths * 10, lengths, *2 * [np.repeat([0, 1], 4)])
    passes = Planner(two, ranks=2, token_budget=10000).everything()
    assert {tuple(sorted(p[0].sequences)) for p in passes} == {(0, 1, 2, 3), (4, 5, 6, 7)}


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    def sequences(seed: int, ranks: int, budget: int) -> list[tuple[int, ...]]:
        planner = Planner(make_work(0, 24, n=2), ranks=ranks, token_budget=budget)
        plan = planner.step(4, (seed, 7))
        return [update.sequences for update in plan.updates]

    assert sequences(1, 1, 1000) == sequences(1, 3, 80)
    assert sequences(1, 1, 1000) != sequences(2, 1, 1000)


def test_processes_make_the_same_plan() -> None:
    """Whatever Python's hash seed is: ranks plan for themselves."""
    code = (
        "from tests.unit.test_planning import vision_like; from mssr.actor.planning import Planner;"
        "print(Planner(vision_like(0, 16, 4), ranks=3, token_budget=9000).step(2, (0, 0)))"
    )
    plans = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(plans) == 1


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1.0])
def test_the_probe_takes_a_share_where_it_was_trained(fraction: float) -> None:
    probed = []
    for ranks, budget in ((1, 1000), (2, 90), (3, 90)):
        planner = Planner(make_work(3, 32), ranks=ranks, token_budget=budget)
        plan = planner.step(4, (0, 0), probe_fraction=fraction, hold_out=False)
        plans, passes = plan.updates, plan.probe
        assert len({len(p) for p in passes}) == 1
        for rank, own in enumerate(passes):
            trained = {s for plan in plans for m in plan.ranks[rank] if m.weight for s in m.sequences}
            assert {s for m in own if m.weight for s in m.sequences} <= trained
        probed.append({s for own in passes for m in own if m.weight for s in m.sequences})
    assert probed[0] == probed[1] == probed[2]
    assert len(probed[0]) == pytest.approx(32 * fraction, abs=4)


def test_what_is_held_out_is_in_no_update() -> None:
    """Whole prompts, the same whatever the ranks and the budget are; every rank has as many passes."""
    held_out = []
    work = make_work(3, 64, n=2)
    for ranks, budget in ((1, 1000), (2, 90), (3, 90)):
        planner = Planner(work, ranks=ranks, token_budget=budget)
        plan = planner.step(4, (0, 0), probe_fraction=0.1, hold_out=True)
        probed = [s for own in plan.probe for m in own if m.weight for s in m.sequences]
        trained = [s for update in plan.updates for s in update.sequences]
        assert sorted(probed + trained) == list(range(64))
        assert not set(work.prompts[probed]) & set(work.prompts[trained])
        assert len({len(own) for own in plan.probe}) == 1
        held_out.append(set(probed))
    assert held_out[0] == held_out[1] == held_out[2]
    assert len(set(work.prompts[list(held_out[0])])) == 4  # a tenth of 32, rounded up


def test_a_single_prompt_cannot_be_held_out() -> None:
    planner = Planner(vision_like(0, 1, 4), ranks=1, token_budget=9000)
    with pytest.raises(UserError, match=r"actor\.kl_probe=held_out: the step has a single prompt"):
        planner.step(1, (0, 0), probe_fraction=0.1, hold_out=True)
