"""The plan of a step: complete, balanced, the same for all ranks, within the budget."""

from __future__ import annotations

import numpy as np
import pytest

from mssr.actor.planning import Planner

pytestmark = pytest.mark.unit


def make_planner(seed: int, count: int, ranks: int, budget: int) -> tuple[Planner, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    responses = rng.integers(1, 50, count)
    lengths = responses + rng.integers(5, 40, count)
    images = rng.random(count) < 0.3
    return Planner(lengths, responses, images, ranks=ranks, token_budget=budget), lengths, images


@pytest.mark.parametrize("seed", range(30))
def test_every_sequence_once_within_the_budget(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    count, ranks, updates = int(rng.integers(3, 40)), int(rng.integers(1, 5)), int(rng.integers(1, 4))
    budget = int(rng.integers(60, 400))
    planner, lengths, images = make_planner(seed, count, ranks, budget)
    plans = planner.updates(updates, (seed, 0))
    assert sorted(s for plan in plans for s in plan.sequences) == list(range(count))
    for plan in plans:
        assert len(plan.ranks) == ranks
        assert len({len(passes) for passes in plan.ranks}) == 1
        real = [m for passes in plan.ranks for m in passes if m.weight]
        assert sorted(s for m in real for s in m.sequences) == sorted(plan.sequences)
        for micro in real:
            assert lengths[list(micro.sequences)].sum() <= budget or len(micro.sequences) == 1
        for passes in zip(*plan.ranks, strict=True):  # what runs at the same time
            assert len({m.any_rank_has_images for m in passes}) == 1
            if any(images[s] for m in passes for s in m.sequences):
                assert passes[0].any_rank_has_images
        assert plan.ranks[0][-1].any_rank_has_images == any(images[list(plan.sequences)])
        totals = [sum(lengths[s] for m in r if m.weight for s in m.sequences) for r in plan.ranks]
        assert max(totals) - min(totals) <= lengths.max()


def test_the_split_depends_on_the_seed_and_on_nothing_else() -> None:
    def sequences(seed: int, ranks: int, budget: int) -> list[tuple[int, ...]]:
        planner, _, _ = make_planner(0, 24, ranks, budget)
        return [plan.sequences for plan in planner.updates(4, (seed, 7))]

    assert sequences(1, 1, 1000) == sequences(1, 3, 80)
    assert sequences(1, 1, 1000) != sequences(2, 1, 1000)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 1.0])
def test_the_probe_takes_a_share_where_it_was_trained(fraction: float) -> None:
    probed = []
    for ranks, budget in ((1, 1000), (2, 90)):
        planner, _, _ = make_planner(3, 32, ranks, budget)
        plans = planner.updates(4, (0, 0))
        passes = planner.probe(plans, fraction)
        assert len({len(p) for p in passes}) == 1
        for rank, own in enumerate(passes):
            trained = {s for plan in plans for m in plan.ranks[rank] if m.weight for s in m.sequences}
            assert {s for m in own if m.weight for s in m.sequences} <= trained
        probed.append({s for own in passes for m in own if m.weight for s in m.sequences})
    assert probed[0] == probed[1]
    assert len(probed[0]) == pytest.approx(32 * fraction, abs=4)
