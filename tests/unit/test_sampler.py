"""The sampler by uncertainty: frequencies, exact resume, and the states that samplers refuse."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from mssr.algorithms import BetaBaseline
from mssr.data.sampler import EpochSampler, UncertaintySampler

pytestmark = pytest.mark.unit

IDS = [f"p{i}" for i in range(10)]
VALUES = np.array([0.0, 0.02, 0.1, 0.3, 0.5, 0.5, 0.7, 0.9, 0.98, 1.0])


def sampler(values: Any = VALUES, seed: int = 0, eps: float = 0.05, ids: Any = IDS) -> UncertaintySampler:
    return UncertaintySampler(ids, seed, lambda: values, eps)


@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_prompts_are_drawn_in_proportion_to_their_uncertainty(eps: float) -> None:
    drawing = sampler(eps=eps)
    counts = Counter(i for _ in range(20_000) for i in drawing.next(1))
    weights = np.sqrt(VALUES * (1 - VALUES)) + eps
    frequencies = np.array([counts[i] for i in IDS]) / 20_000
    np.testing.assert_allclose(frequencies, weights / weights.sum(), atol=0.015)


def test_the_second_of_a_draw_is_in_proportion_among_those_left() -> None:
    drawing, weights = sampler(), np.sqrt(VALUES * (1 - VALUES)) + 0.05
    pairs = Counter(tuple(drawing.next(2)) for _ in range(20_000))
    share = weights / weights.sum()
    for first, second in ((4, 5), (4, 2), (2, 4), (7, 0)):
        expected = share[first] * weights[second] / (weights.sum() - weights[first])
        assert pairs[IDS[first], IDS[second]] / 20_000 == pytest.approx(expected, abs=0.006)


def test_a_draw_has_no_prompt_twice_and_a_larger_one_takes_whole_rounds() -> None:
    drawing = sampler()
    for _ in range(50):
        assert len(set(drawing.next(7))) == 7
    many = drawing.next(25)
    assert sorted(many[:10]) == sorted(many[10:20]) == sorted(IDS)
    assert many[:10] != many[10:20]
    assert len(set(many[20:])) == 5
    assert drawing.epoch == (50 * 7 + 25) / 10
    assert drawing.next(0) == []


def test_without_eps_certain_prompts_come_last_and_in_any_order() -> None:
    drawing = sampler(eps=0.0)
    last = [tuple(drawing.next(10)[-2:]) for _ in range(50)]
    assert set(last) == {("p0", "p9"), ("p9", "p0")}


def test_the_values_are_those_of_the_moment() -> None:
    baseline = BetaBaseline(prior_mean=0.5)
    keys = baseline.keys(IDS)
    drawing = UncertaintySampler(IDS, 0, lambda: baseline.values(keys), eps=0.0)
    assert any("p3" in drawing.next(5) for _ in range(20))
    baseline.initialize(["p3"], [0], [1], strength=1.0, smoothing=0.0)
    assert not any("p3" in drawing.next(9) for _ in range(20))


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    one, same, other = sampler(seed=3), sampler(seed=3), sampler(seed=4)
    draws = [one.next(4) for _ in range(5)]
    assert draws == [same.next(4) for _ in range(5)]
    assert draws != [other.next(4) for _ in range(5)]
    assert len({tuple(d) for d in draws}) == 5
    ids = [f"p{i}" for i in range(500)]
    many = [sampler(np.full(500, 0.5), ids=ids).next(count) for count in (40, 400)]
    assert many[0] == many[1][:40]  # a larger draw begins like a smaller one


def test_the_sampler_goes_on_where_it_stopped() -> None:
    straight, stopped, resumed = sampler(seed=3), sampler(seed=3), sampler(seed=3)
    straight.next(4), straight.next(23), stopped.next(4), stopped.next(23)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.epoch == straight.epoch == 2.7
    assert [resumed.next(4) for _ in range(5)] == [straight.next(4) for _ in range(5)]


def test_a_state_of_another_sampler_or_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match="10 prompts, this has 2"):
        sampler([0.5, 0.5], ids=["a", "b"]).load_state_dict(sampler().state_dict())
    epochs = EpochSampler(IDS, seed=0)
    with pytest.raises(ValueError, match="is epochs, this run's is uncertainty"):
        sampler().load_state_dict(epochs.state_dict())
    with pytest.raises(ValueError, match="is uncertainty, this run's is epochs"):
        epochs.load_state_dict(sampler().state_dict())
    # States of before there was a second sampler have no kind.
    old = {"epoch": 1, "position": 4, "prompts": 10}
    epochs.load_state_dict(old)
    assert epochs.epoch == 1.4
    with pytest.raises(ValueError, match="uncertainty"):
        sampler().load_state_dict(old)


def test_wrong_arguments_are_refused() -> None:
    for kind in (EpochSampler, lambda ids, seed: sampler(ids=ids, seed=seed)):
        with pytest.raises(ValueError, match="no prompts"):
            kind([], 0)
    for eps in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="eps"):
            sampler(eps=eps)
    for values in (np.array([0.5]), np.full(10, 1.5), np.full(10, np.nan)):
        with pytest.raises(ValueError, match="values"):
            sampler(values).next(1)
