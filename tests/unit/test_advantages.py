"""The advantage functions against values worked out by hand, and their degenerate cases."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from mssr.algorithms import advantages

pytestmark = pytest.mark.unit


def test_grpo_by_hand() -> None:
    # Group 5: mean 1/4, unbiased variance (3/16 * 4)/3 = 1/4. Group 9: all equal.
    got = advantages.grpo([1, 0, 0.1, 0, 0, 0.1, 0.1], [5, 5, 9, 5, 5, 9, 9], eps=1e-6)
    expected = np.array([0.75, -0.25, 0, -0.25, -0.25, 0, 0]) / (0.5 + 1e-6)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert got.dtype == np.float32
    assert (got[[2, 5, 6]] == 0).all()  # exactly, although the mean of three 0.1 is not 0.1
    large = advantages.grpo([1, 0], [0, 0], eps=1.0)
    np.testing.assert_allclose(large, np.array([0.5, -0.5]) / (math.sqrt(0.5) + 1), rtol=1e-6)


def test_rloo_by_hand() -> None:
    got = advantages.rloo([1, 0, 0.5, 0.1, 0.1, 0.1], [3, 3, 3, 1, 1, 1])
    np.testing.assert_allclose(got, [0.75, -0.75, 0, 0, 0, 0], atol=1e-7)
    assert (got[3:] == 0).all()


def test_rloo_is_the_mean_of_the_others() -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        groups = rng.permutation(np.repeat(np.arange(5), 4))
        rewards = rng.random(20)
        expected = [
            rewards[i] - np.mean([rewards[j] for j in range(20) if groups[j] == groups[i] and j != i])
            for i in range(20)
        ]
        np.testing.assert_allclose(advantages.rloo(rewards, groups), expected, atol=1e-6)


def test_group_methods_centre_each_group_whatever_the_order() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(6), [2, 3, 4, 8, 2, 5])
    rewards = rng.integers(0, 2, len(groups)).astype(np.float32)
    order = rng.permutation(len(groups))
    for method in (advantages.grpo, advantages.rloo):
        plain = method(rewards, groups)
        np.testing.assert_allclose(np.bincount(groups, plain), 0, atol=1e-5)
        np.testing.assert_allclose(method(rewards[order], groups[order]), plain[order], atol=1e-6)


@pytest.mark.parametrize("method", [advantages.grpo, advantages.rloo])
def test_a_group_of_one_is_refused(method: Callable) -> None:
    with pytest.raises(ValueError, match="group 7 has only one"):
        method([1, 0, 1], [2, 2, 7])


def test_reinforce_pp_equals_whitening_of_every_token() -> None:
    rng = np.random.default_rng(4)
    for _ in range(10):
        rewards = rng.random(12)
        lengths = rng.integers(0, 9, 12)
        lengths[0] = 0
        tokens = np.repeat(rewards, lengths)
        expected = (rewards - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
        got = advantages.reinforce_pp(rewards, lengths)
        np.testing.assert_allclose(got, np.where(lengths > 0, expected, 0), rtol=1e-5, atol=1e-6)
        assert got[0] == 0


def test_reinforce_pp_by_hand() -> None:
    # Tokens 1, 0, 0, 0: mean 1/4, unbiased variance 1/4.
    np.testing.assert_allclose(advantages.reinforce_pp([1, 0], [1, 3]), [1.5, -0.5], rtol=1e-6)


def test_single_rollout_by_hand() -> None:
    # r - v = .5, -.5, .5, -.5, 1: mean .2, population variance 1.8/5 = .36
    got = advantages.single_rollout([1, 0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5, 0.0], eps=1e-6)
    np.testing.assert_allclose(got, np.array([0.3, -0.7, 0.3, -0.7, 0.8]) / 0.6, rtol=1e-5)
    np.testing.assert_allclose(advantages.single_rollout([1, 0], [0, 0], eps=0.5), [0.5, -0.5])


def test_single_rollout_is_normalised_and_uses_the_values() -> None:
    rng = np.random.default_rng(5)
    rewards, values = rng.integers(0, 2, 256), rng.random(256)
    got = advantages.single_rollout(rewards, values).astype(np.float64)
    assert abs(got.mean()) < 1e-6 and abs(got.std() - 1) < 1e-5
    # All rewards equal is no degenerate case: an expected success says less than a surprising one.
    surprise = advantages.single_rollout([1, 1], [0.9, 0.1])
    assert surprise[0] < 0 < surprise[1]


def test_no_signal_gives_exact_zeros() -> None:
    for rewards in (np.zeros(3), np.ones(3), np.full(3, 0.1)):
        for got in (
            advantages.grpo(rewards, [0, 0, 0]),
            advantages.rloo(rewards, [0, 0, 0]),
            advantages.reinforce_pp(rewards, [1, 5, 2]),
            advantages.single_rollout(rewards, [0.3, 0.3, 0.3]),
        ):
            assert got.dtype == np.float32 and (got == 0).all()
    assert advantages.single_rollout([1], [0.2]).tolist() == [0]
    assert advantages.reinforce_pp([1], [4]).tolist() == [0]
    assert advantages.reinforce_pp([1, 0], [1, 0]).tolist() == [0, 0]  # one token
    assert advantages.reinforce_pp([1, 0], [0, 0]).tolist() == [0, 0]  # none
    assert advantages.reinforce_pp([1, 0, 1], [2, 0, 3]).tolist() == [0, 0, 0]  # non-empty ones agree


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantages.grpo([], []), "non-empty"),
        (lambda: advantages.grpo([1, math.nan], [0, 0]), "number 1 is nan"),
        (lambda: advantages.grpo([1, 0], [0, 0, 0]), "as many groups"),
        (lambda: advantages.grpo([1, 0], [0, 0], eps=0.0), "eps"),
        (lambda: advantages.rloo([[1, 0]], [0, 0]), "vector"),
        (lambda: advantages.reinforce_pp([1, 0], [1, -1]), ">= 0"),
        (lambda: advantages.reinforce_pp([1, 0], [1]), "as many lengths"),
        (lambda: advantages.single_rollout([1, 0], [0.5]), "as many values, not 1"),
    ],
)
def test_advantages_refuse_wrong_input(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
