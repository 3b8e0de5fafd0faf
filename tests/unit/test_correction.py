"""Rollout correction: values by hand, invariants, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mssr.algorithms import sequences
from mssr.algorithms.correction import MASKS, WEIGHTS, rollout_correction

pytestmark = pytest.mark.unit

LENGTHS = torch.tensor([3, 0, 2])
RHO = torch.tensor([1.0, 4.0, 0.25, 0.6, 0.1], dtype=torch.float64)
"""pi_actor / pi_engine: product 1 and geometric mean 1, nothing, product .06 and geometric mean .245."""


def correct(rho: torch.Tensor = RHO, lengths: torch.Tensor = LENGTHS, **options: Any) -> Any:
    engine = torch.full_like(rho, -2.0)
    return rollout_correction(engine + rho.log(), engine, lengths, **options)


@pytest.mark.parametrize(
    ("options", "weight", "masked"),
    [
        ({}, [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
        ({"weight": "token"}, [1, 2, 0.25, 0.6, 0.1], [0, 0, 0, 0, 0]),
        ({"weight": "token", "max_weight": 0.3}, [0.3, 0.3, 0.25, 0.3, 0.1], [0, 0, 0, 0, 0]),
        ({"weight": "sequence"}, [1, 1, 1, 0.06, 0.06], [0, 0, 0, 0, 0]),
        ({"mask": "token"}, [1, 1, 1, 1, 1], [0, 0, 1, 0, 1]),
        ({"mask": "token", "mask_low": 0.2, "mask_high": 3.0}, [1, 1, 1, 1, 1], [0, 1, 0, 0, 1]),
        ({"mask": "sequence"}, [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]),
        ({"mask": "sequence", "mask_low": 0.04}, [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
        ({"mask": "geometric"}, [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]),
        ({"mask": "geometric", "mask_low": 0.2}, [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
        # IcePop: rho itself where it is in range, else 0
        ({"weight": "token", "max_weight": 5.0, "mask": "token"}, [1, 4, 0.25, 0.6, 0.1], [0, 0, 1, 0, 1]),
        ({"weight": "sequence", "mask": "token"}, [1, 1, 1, 0.06, 0.06], [0, 0, 1, 0, 1]),
    ],
)
def test_by_hand(options: dict[str, Any], weight: list[float], masked: list[float]) -> None:
    factor, info = correct(**options)
    torch.testing.assert_close(info["weight"], torch.tensor(weight, dtype=torch.float64))
    assert info["masked"].tolist() == masked
    torch.testing.assert_close(factor, info["weight"] * (1 - info["masked"]))
    assert set(info) == {"weight", "masked"}


def test_a_long_sequence_is_truncated_as_a_whole() -> None:
    rho = torch.full((100,), 1.01)
    factor, _ = correct(rho, torch.tensor([100]), weight="sequence")
    assert (factor == 2.0).all()  # 1.01^100 = 2.7
    factor, _ = correct(rho, torch.tensor([60, 40]), weight="sequence")
    torch.testing.assert_close(factor[:60], torch.full((60,), 1.01**60))
    torch.testing.assert_close(factor[60:], torch.full((40,), 1.01**40))


def test_the_product_of_a_very_long_sequence_is_bounded() -> None:
    for ratio, product in ((0.5, math.exp(-20)), (2.0, math.exp(20))):
        factor, _ = correct(torch.full((200,), ratio), torch.tensor([200]), weight="sequence", max_weight=1e9)
        torch.testing.assert_close(factor, torch.full((200,), product))  # not 2^-200, 0 in float32


def test_an_empty_sequence_has_sum_and_mean_zero() -> None:
    x = torch.tensor([1.0, 2.0])
    assert sequences.sequence_sums(x, torch.tensor([0, 2, 0])).tolist() == [0, 3, 0]
    assert sequences.sequence_means(x, torch.tensor([0, 2, 0])).tolist() == [0, 1.5, 0]
    assert sequences.sequence_means(x[:0], torch.tensor([], dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_without_disagreement_nothing_changes(weight: str, mask: str) -> None:
    factor, info = correct(torch.ones(5), weight=weight, mask=mask)
    assert (factor == 1).all() and (info["masked"] == 0).all()
    factor, _ = correct(torch.ones(0), torch.zeros(2, dtype=torch.int64), weight=weight, mask=mask)
    assert factor.shape == (0,)


def test_it_makes_token_weights_unbiased() -> None:
    """E_engine[w f] = E_actor[f] while nothing is truncated."""
    actor = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    engine = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
    f = torch.tensor([1.0, -2.0, 7.0], dtype=torch.float64)
    w, _ = rollout_correction(actor.log(), engine.log(), torch.tensor([1, 1, 1]), weight="token")
    torch.testing.assert_close((engine * w * f).sum(), (actor * f).sum())


@pytest.mark.parametrize("weight", ["token", "sequence"])
@pytest.mark.parametrize("mask", MASKS)
def test_absurd_and_missing_log_probs(weight: Any, mask: Any) -> None:
    old = torch.tensor([-1e4, 0.0, -1.0, -1.0])
    engine = torch.tensor([0.0, -1e4, -1.0, -math.inf])
    each = torch.tensor([1, 1, 1, 1])
    factor, info = rollout_correction(old, engine, each, weight=weight, mask=mask)
    assert torch.isfinite(factor).all()
    assert info["weight"][1] == 2 and info["weight"][2] == 1 and 0 < info["weight"][0] < 1e-8
    if mask != "none":
        assert info["masked"].tolist() == [1, 1, 0, 1]
        engine[2] = math.nan  # what cannot be compared leaves the loss
        factor, _ = rollout_correction(old, engine, each, weight=weight, mask=mask)
        assert (factor == 0).all()


def test_no_gradient_into_either_side() -> None:
    old, engine = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    factor, info = rollout_correction(old, engine, torch.tensor([2]), weight="token", mask="geometric")
    assert not factor.requires_grad and not any(value.requires_grad for value in info.values())


@settings(derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 0.3, 2.0, 30.0]),
    weight=st.sampled_from(WEIGHTS),
    mask=st.sampled_from(MASKS),
    max_weight=st.sampled_from([0.5, 1.0, 2.0, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_properties(
    lengths: list[int],
    seed: int,
    scale: float,
    weight: Any,
    mask: Any,
    max_weight: float,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = scale * torch.randn(sum(lengths), generator=generator, dtype=dtype)
    engine = scale * torch.randn(sum(lengths), generator=generator, dtype=dtype)
    options: dict[str, Any] = {"weight": weight, "mask": mask, "max_weight": max_weight}
    factor, info = rollout_correction(old, engine, torch.tensor(lengths), **options)
    assert factor.dtype == dtype
    assert (info["weight"] > 0).all()
    assert (info["weight"] <= (1.0 if weight == "none" else max_weight)).all()
    assert ((factor == 0) == (info["masked"] == 1)).all()

    per_sequence = torch.split(factor, lengths)
    for of_one, length in zip(per_sequence, lengths, strict=True):
        if weight != "token" and mask != "token" and length:
            assert (of_one == of_one[0]).all()

    # A sequence has bitwise the same factor alone as among others, in any order.
    order = torch.randperm(len(lengths), generator=generator).tolist()
    parts = [(torch.split(old, lengths)[i], torch.split(engine, lengths)[i]) for i in order]
    alone = [rollout_correction(a, b, torch.tensor([len(a)]), **options)[0] for a, b in parts]
    shuffled, _ = rollout_correction(
        torch.cat([a for a, _ in parts]),
        torch.cat([b for _, b in parts]),
        torch.tensor([lengths[i] for i in order]),
        **options,
    )
    assert torch.equal(shuffled, torch.cat([per_sequence[i] for i in order]))
    assert torch.equal(shuffled, torch.cat(alone))


def test_wrong_input_is_refused() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="one shape"):
        rollout_correction(x, torch.zeros(3, 1), torch.tensor([3]))
    for lengths in (torch.tensor([2]), torch.tensor([4, -1]), torch.tensor([3.0]), torch.tensor([[3]]), 3):
        with pytest.raises(ValueError, match="lengths"):
            rollout_correction(x, x, lengths)  # type: ignore[arg-type]
    for options, words in (
        ({"weight": "tokens"}, "token, sequence"),
        ({"mask": "geo"}, "geometric"),
        ({"max_weight": 0.0}, "max_weight"),
        ({"max_weight": math.nan}, "max_weight"),
        ({"mask_low": 1.5}, "mask_low"),
        ({"mask_low": -0.1}, "mask_low"),
        ({"mask_high": 0.9}, "mask_high"),
    ):
        with pytest.raises(ValueError, match=words):
            rollout_correction(x, x, torch.tensor([3]), **options)  # type: ignore[arg-type]


def test_the_bounds_of_a_mask_are_inside() -> None:
    """Where engine and actor agree rho is exactly 1, which stays whatever the bounds."""
    agreed = torch.ones(5, dtype=torch.float64)
    for mask in ("token", "sequence", "geometric"):
        _, info = correct(agreed, mask=mask, mask_low=1.0, mask_high=1.0)
        assert not info["masked"].any()
