"""KL in the reward: advantages of the tokens, where a method has them and where it has not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mssr import algorithms

pytestmark = pytest.mark.unit

BOUNDED = [name for name in algorithms.names() if algorithms.get(name).bounded_rewards]
OTHERS = [name for name in algorithms.names() if name not in BOUNDED]
IDS = ["a", "b", "a", "b"]


@pytest.mark.parametrize("weighting", ["token", "sequence"])
def test_reinforce_pp_by_the_token(weighting: str) -> None:
    rewards, lengths = [1.0, 0.0, 0.5, 1.0], [2, 3, 0, 1]
    penalties = [0.1, 0.2, 0.3, -0.1, 0.2, 0.4]
    returns = np.array([1 - 0.3, 1 - 0.2, -0.4, -0.1, -0.2, 1 - 0.4])
    expected = {"reinforce_pp": returns}
    # a: 1 and .5, mean .75; b: 0 and 1, mean .5
    means = np.array([0.75, 0.75, 0.5, 0.5, 0.5, 0.5])
    expected["reinforce_pp_baseline"] = returns - means
    for name, values in expected.items():
        algorithm = algorithms.create(name, weighting=weighting, eps=1e-8)
        got, metrics = algorithm.token_advantages(IDS, rewards, lengths, np.array(penalties, np.float32))
        weights = np.ones(6) if weighting == "token" else np.repeat([1 / 2, 1 / 3, 1], [2, 3, 1])
        total = weights.sum()
        mean = (weights * values).sum() / total
        variance = (weights * (values - mean) ** 2).sum() / (total - 1)
        np.testing.assert_allclose(got, (values - mean) / np.sqrt(variance + 1e-8), rtol=1e-5)
        assert got.dtype == np.float32
        assert metrics["advantage/std"] == pytest.approx(float(np.std(got.astype(np.float64))))
        assert metrics["advantage/degenerate_fraction"] == 0.25  # the empty one


@pytest.mark.parametrize("name", sorted(set(OTHERS) - {"reinforce_pp", "reinforce_pp_baseline"}))
def test_others_subtract_the_sum_from_the_reward(name: str) -> None:
    algorithm = algorithms.create(name)
    rewards, lengths = np.array([1.0, 0.0, 0.5, 1.0]), [2, 3, 0, 1]
    got, metrics = algorithm.token_advantages(IDS, rewards, lengths, [0.1, 0.2, 0.3, -0.1, 0.2, 0.4])
    expected, same = algorithm.advantages(IDS, rewards - [0.3, 0.4, 0, 0.4], lengths)
    np.testing.assert_allclose(got, np.repeat(expected, lengths), rtol=1e-6)
    assert metrics == pytest.approx(same)
    assert got[0] != algorithm.advantages(IDS, rewards, lengths)[0][0]


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[str], list[float], list[int]]:
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=4))
    ids = draw(st.permutations([f"p{g}" for g, n in enumerate(sizes) for _ in range(n)]))
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, 0.1, -3.0]), min_size=len(ids), max_size=len(ids)))
    lengths = draw(st.lists(st.integers(0, 4), min_size=len(ids), max_size=len(ids)))
    return ids, rewards, lengths


@pytest.mark.parametrize("weighting", ["token", "sequence", None])
@pytest.mark.parametrize("name", OTHERS)
@given(batches())
def test_without_penalties_it_is_the_advantage_of_each_token(
    name: str, weighting: str | None, batch: tuple[list[str], list[float], list[int]]
) -> None:
    if weighting is not None and "weighting" not in algorithms.options(name):
        return
    algorithm = algorithms.create(name, **({} if weighting is None else {"weighting": weighting}))
    plain, metrics = algorithm.advantages(*batch)
    tokens, of_tokens = algorithm.token_advantages(*batch, np.zeros(sum(batch[2]), np.float32))
    np.testing.assert_allclose(tokens, np.repeat(plain, batch[2]), rtol=1e-5, atol=1e-5)
    key = "advantage/degenerate_fraction"
    assert of_tokens[key] == metrics[key]


@pytest.mark.parametrize("name", OTHERS)
def test_penalties_must_fit_the_tokens(name: str) -> None:
    algorithm = algorithms.create(name)
    for penalties, message in (
        ([0.1] * 5, "6 response tokens need as many penalties"),
        ([0.1] * 5 + [math.nan], "number 5 is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            algorithm.token_advantages(IDS, [1.0, 0.0, 0.5, 1.0], [2, 3, 0, 1], penalties)


@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_rewards_take_no_penalties(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} takes rewards in .* so KL cannot be in the reward"):
        algorithms.create(name).token_advantages(["a"], [1.0], [1], [0.1])
