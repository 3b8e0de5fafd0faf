"""The advantage functions against values worked out by hand, and their degenerate cases."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit import formulas as advantages

pytestmark = pytest.mark.unit

GROUP_METHODS = [advantages.grpo, advantages.dr_grpo, advantages.rloo, advantages.lite_ppo]


def repeated(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(x, np.float64), counts)


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


def test_dr_grpo_by_hand() -> None:
    got = advantages.dr_grpo([1, 0, 0, 0, 0.1, 0.1, 0.1, 5, -3], [0, 0, 0, 0, 7, 7, 7, 2, 2])
    np.testing.assert_allclose(got, [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 4, -4], rtol=1e-6)
    assert (got[4:7] == 0).all() and got.dtype == np.float32


def test_lite_ppo_by_hand() -> None:
    # The batch 1, 0, 1, 1: mean 3/4, unbiased variance 1/4. The second prompt has no signal.
    got = advantages.lite_ppo([1, 0, 1, 1], [0, 0, 1, 1], eps=1e-6)
    np.testing.assert_allclose(got, np.array([0.5, -0.5, 0, 0]) / (0.5 + 1e-6), rtol=1e-6)
    large = advantages.lite_ppo([1, 0, 1, 1], [0, 0, 1, 1], eps=0.5)
    np.testing.assert_allclose(large, [0.5, -0.5, 0, 0])
    # Tokens 1, 0, 0, 0, 1, 1: mean 1/2, unbiased variance 6/4/5; the groups' means stay as they are.
    tokens = advantages.lite_ppo([1, 0, 1, 1], [0, 0, 1, 1], 1e-6, [1, 3, 1, 1])
    np.testing.assert_allclose(tokens, np.array([0.5, -0.5, 0, 0]) / math.sqrt(0.3), rtol=1e-5)
    # Whatever has a token scores the same: no spread to measure the signal in.
    assert not advantages.lite_ppo([1, 0, 1, 1], [0, 0, 1, 1], 1e-6, [4, 0, 2, 3]).any()


def test_reinforce_pp_baseline_by_hand() -> None:
    # r - mean_g = .5, -.5, 0, 0 on 1, 2, 1, 1 tokens: mean -.1, unbiased variance (.36+.32+.02)/4
    got = advantages.reinforce_pp_baseline([1, 0, 1, 1], [0, 0, 1, 1], [1, 2, 1, 1])
    np.testing.assert_allclose(got, np.array([0.6, -0.4, 0.1, 0.1]) / math.sqrt(0.175), rtol=1e-6)
    large = advantages.reinforce_pp_baseline([1, 0, 1, 1], [0, 0, 1, 1], [1, 2, 1, 1], eps=1 - 0.175)
    np.testing.assert_allclose(large, [0.6, -0.4, 0.1, 0.1], rtol=1e-6)
    empty = advantages.reinforce_pp_baseline([1, 0, 1, 1], [0, 0, 1, 1], [1, 2, 0, 1])
    assert empty[2] == 0 != empty[3]


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
    for method in GROUP_METHODS:
        plain = method(rewards, groups)
        np.testing.assert_allclose(np.bincount(groups, plain), 0, atol=1e-5)
        np.testing.assert_allclose(method(rewards[order], groups[order]), plain[order], atol=1e-6)


@pytest.mark.parametrize("labels", [[0, 0, 1], [2, 2, 7], [-1, -1, 7], ["a", "a", "7"], [1.0, 1.0, 7.5]])
@pytest.mark.parametrize("method", GROUP_METHODS)
def test_a_group_of_one_is_refused(method: Callable, labels: list) -> None:
    with pytest.raises(ValueError, match=f"group {labels[2]} has only one"):
        method([1, 0, 1], labels)
    with pytest.raises(ValueError, match="only one"):
        advantages.reinforce_pp_baseline([1, 0, 1], labels, [1, 1, 1])


@pytest.mark.parametrize("method", GROUP_METHODS)
def test_any_labels_will_do(method: Callable) -> None:
    rewards = [1, 0, 0.5, 1, 0, 0]
    plain = method(rewards, [0, 1, 0, 2, 1, 2])
    for labels in (
        [5, 2, 5, 4, 2, 4],
        [-7, 10**12, -7, 0, 10**12, 0],
        [*"xyxzyz"],
        [0.5, 0.1, 0.5, 2, 0.1, 2],
    ):
        np.testing.assert_array_equal(method(rewards, labels), plain)
        groups = advantages.constant_groups(rewards, labels)
        assert groups.tolist() == [False, True, False, False, True, False]


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


def test_token_weights_count_each_token_once() -> None:
    rng = np.random.default_rng(6)
    for _ in range(10):
        rewards, values, lengths = rng.random(12), rng.random(12), rng.integers(1, 9, 12)
        tokens = repeated(rewards - values, lengths)
        expected = (rewards - values - tokens.mean()) / (tokens.std() + 1e-6)
        got = advantages.single_rollout(rewards, values, 1e-6, lengths)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        groups = np.repeat([0, 1, 2], 4)
        std = repeated(rewards, lengths).std(ddof=1)
        got = advantages.lite_ppo(rewards, groups, 1e-6, lengths)
        np.testing.assert_allclose(got, advantages.dr_grpo(rewards, groups) / (std + 1e-6), rtol=1e-5)
    same = advantages.single_rollout([1, 0, 1], [0.2, 0.5, 0.4], 1e-6, [7, 7, 7])
    np.testing.assert_allclose(same, advantages.single_rollout([1, 0, 1], [0.2, 0.5, 0.4]), rtol=1e-6)


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
            *(method(rewards, [0, 0, 0]) for method in GROUP_METHODS),
            advantages.reinforce_pp(rewards, [1, 5, 2]),
            advantages.reinforce_pp_baseline(rewards, [0, 0, 0], [1, 5, 2]),
            advantages.single_rollout(rewards, [0.3, 0.3, 0.3]),
            advantages.single_rollout(rewards, [0.3, 0.3, 0.3], weights=[1, 5, 2]),
        ):
            assert got.dtype == np.float32 and (got == 0).all()
    assert advantages.single_rollout([1], [0.2]).tolist() == [0]
    assert advantages.single_rollout([1, 0], [0.2, 0.2], weights=[0, 0]).tolist() == [0, 0]
    assert advantages.single_rollout([1, 0], [0.2, 0.2], weights=[3, 0]).tolist() == [0, 0]
    assert advantages.lite_ppo([1, 0], [0, 0], weights=[1, 0]).tolist() == [0, 0]
    assert advantages.reinforce_pp([1], [4]).tolist() == [0]
    assert advantages.reinforce_pp([1, 0], [1, 0]).tolist() == [0, 0]  # one token
    assert advantages.reinforce_pp([1, 0], [0, 0]).tolist() == [0, 0]  # none
    assert advantages.reinforce_pp([1, 0, 1], [2, 0, 3]).tolist() == [0, 0, 0]  # non-empty ones agree


def test_returns_to_go_by_hand() -> None:
    got = advantages.returns_to_go([1, 5, 0], [3, 0, 2], [0.5, 0.25, 0.125, -1, 2])
    assert got.tolist() == [1 - 0.875, 1 - 0.375, 1 - 0.125, -1, -2]
    assert advantages.returns_to_go([1, 2], [0, 0], []).shape == (0,)


def test_whiten_by_hand() -> None:
    # Over tokens: mean 2, unbiased variance (4+4+0)/2. Over responses: mean (1+4)/2, each token of the
    # first weighing 1/2: variance (2.5^2/2 + .5^2/2 + 1.5^2)/(2-1) = 5.5
    got = advantages.whiten([0, 2, 4], [2, 0, 1], 1e-9, "token")
    np.testing.assert_allclose(got, [-1, 0, 1])
    got = advantages.whiten([0, 2, 4], [2, 0, 1], 1e-9, "sequence")
    np.testing.assert_allclose(got, np.array([-2.5, -0.5, 1.5]) / math.sqrt(5.5), rtol=1e-6)
    assert got.dtype == np.float32
    assert not advantages.whiten([1, 1, 1], [2, 0, 1], 1e-9, "token").any()
    assert not advantages.whiten([1, 2, 3], [0, 3, 0], 1e-9, "sequence").any()  # one response
    assert advantages.whiten([], [0, 0], 1e-9, "token").shape == (0,)


_SCORE = st.sampled_from([0.0, 1.0, 0.1, -2.0, 5.0]) | st.floats(-100, 100, width=32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """(B,) groups of two or more in some order, rewards, values, lengths."""
    sizes = draw(st.lists(st.integers(2, 4), min_size=1, max_size=5))
    groups = np.array(draw(st.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist())))
    b = len(groups)
    rewards = draw(st.lists(_SCORE, min_size=b, max_size=b))
    values = draw(st.lists(st.floats(0, 1, width=32), min_size=b, max_size=b))
    lengths = draw(st.lists(st.integers(0, 5), min_size=b, max_size=b))
    return groups, np.array(rewards), np.array(values), np.array(lengths)


def every_form(
    groups: np.ndarray, r: np.ndarray, v: np.ndarray, lengths: np.ndarray
) -> dict[str, np.ndarray]:
    # eps of 0.1: no rounding error is blown up.
    return {
        "grpo": advantages.grpo(r, groups, 0.1),
        "dr_grpo": advantages.dr_grpo(r, groups),
        "rloo": advantages.rloo(r, groups),
        "lite_ppo": advantages.lite_ppo(r, groups, 0.1),
        "lite_ppo tokens": advantages.lite_ppo(r, groups, 0.1, lengths),
        "reinforce_pp": advantages.reinforce_pp(r, lengths, 0.1),
        "reinforce_pp_baseline": advantages.reinforce_pp_baseline(r, groups, lengths, 0.1),
        "single_rollout": advantages.single_rollout(r, v, 0.1),
        "single_rollout tokens": advantages.single_rollout(r, v, 0.1, lengths),
    }


@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_a_batch_does_not_matter(batch: tuple[np.ndarray, ...], random) -> None:
    order = np.array(random.sample(range(len(batch[0])), len(batch[0])))
    plain, permuted = every_form(*batch), every_form(*(x[order] for x in batch))
    for name in plain:
        np.testing.assert_allclose(permuted[name], plain[name][order], rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.isfinite(plain[name]).all(), name


@given(batches(), st.lists(_SCORE, min_size=1, max_size=3))
def test_an_empty_response_changes_no_token_statistics(batch: tuple[np.ndarray, ...], added: list) -> None:
    groups, rewards, values, lengths = batch
    more = np.concatenate([rewards, added])
    none = np.concatenate([lengths, np.zeros(len(added), int)])
    for got, expected in (
        (advantages.reinforce_pp(more, none, 0.1), advantages.reinforce_pp(rewards, lengths, 0.1)),
        (
            advantages.single_rollout(more, np.append(values, [0.5] * len(added)), 0.1, none),
            advantages.single_rollout(rewards, values, 0.1, lengths),
        ),
        (
            # Two empty responses to a prompt of their own, which touches no other group's mean.
            advantages.lite_ppo([*rewards, 0, 9], [*groups, 99, 99], 0.1, [*lengths, 0, 0]),
            advantages.lite_ppo(rewards, groups, 0.1, lengths),
        ),
    ):
        np.testing.assert_allclose(got[: len(rewards)], expected, rtol=1e-5, atol=1e-5)
        assert not got[len(rewards) :].any()


@given(batches(), st.data())
def test_returns_to_go_equal_the_loop(batch: tuple[np.ndarray, ...], data: st.DataObject) -> None:
    _, rewards, _, lengths = batch
    n = int(lengths.sum())
    penalties = data.draw(st.lists(st.floats(-1, 1), min_size=n, max_size=n))
    expected, start = [], 0
    for r, length in zip(rewards, lengths, strict=True):
        own = penalties[start : start + length]
        expected += [r - sum(own[t:]) for t in range(length)]
        start += length
    got = advantages.returns_to_go(rewards, lengths, penalties)
    np.testing.assert_allclose(got, expected, atol=1e-11)


@given(batches())
def test_whitening_tokens_that_agree_is_whitening_responses(batch: tuple[np.ndarray, ...]) -> None:
    _, rewards, _, lengths = batch
    for weighting, counts in (("token", lengths), ("sequence", np.sign(lengths))):
        got = advantages.whiten(np.repeat(rewards, lengths), lengths, 0.1, weighting)
        expected = np.repeat(advantages.reinforce_pp(rewards, counts, 0.1), lengths)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: advantages.grpo([], []), "non-empty"),
        (lambda: advantages.grpo([1, math.nan], [0, 0]), "number 1 is nan"),
        (lambda: advantages.grpo([1, 0], [0, 0, 0]), "3 prompt ids need rewards of shape"),
        (lambda: advantages.grpo([1, 0], [0, 0], eps=0.0), "eps"),
        (lambda: advantages.grpo([1, -math.inf], [0, 0]), "number 1 is -inf"),
        (lambda: advantages.lite_ppo([1, 0], [0, 0], eps=math.nan), "eps"),
        (lambda: advantages.lite_ppo([1, 0], [0, 0], weights=[1, -1]), ">= 0"),
        (lambda: advantages.reinforce_pp_baseline([1, 0], [0, 0], [1, 1], eps=-1), "eps"),
        (lambda: advantages.single_rollout([1, 0], [0, 0], weights=[1]), "need lengths of shape"),
        (lambda: advantages.returns_to_go([1, 0], [1, 2], [0, 0]), "3 response tokens need as many"),
        (lambda: advantages.returns_to_go([1, 0], [1, 1], [0, math.nan]), "penalties must be finite"),
        (lambda: advantages.whiten([1, 0], [1, 2], 1e-8, "token"), "as many values"),
        (lambda: advantages.whiten([1, math.inf], [1, 1], 1e-8, "token"), "values must be finite"),
        (lambda: advantages.whiten([1, 0], [1, 1], 1e-8, "tokens"), "weighting must be"),
        (lambda: advantages.rloo([[1, 0]], [0, 0]), "need rewards of shape"),
        (lambda: advantages.reinforce_pp([1, 0], [1, -1]), ">= 0"),
        (lambda: advantages.reinforce_pp([1, 0], [1]), "need lengths of shape"),
    ],
)
def test_advantages_refuse_wrong_input(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
