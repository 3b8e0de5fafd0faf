"""Shaping and losses: values worked out by hand, gradients against finite differences, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mssr.algorithms import losses, policy_losses, shaping
from mssr.errors import UserError

pytestmark = pytest.mark.unit


# --- shaping -------------------------------------------------------------------------------------


def test_entropy_bonus_by_hand() -> None:
    a = torch.tensor([1.0, -1.0, -1.0, 0.0, 0.2])
    h = torch.tensor([0.5, 0.5, 10.0, 2.0, 1.0])
    expected = torch.tensor([0.2, 0.2, 0.5, 0.0, 0.1])  # entropy, entropy, cap, cap, cap
    torch.testing.assert_close(shaping.entropy_bonus(a, h), expected)
    torch.testing.assert_close(
        shaping.entropy_bonus(a, h, coef=1.0, divisor=4.0), torch.tensor([0.25, 0.25, 0.25, 0.0, 0.05])
    )
    assert (shaping.entropy_bonus(a, h, coef=0.0) == 0).all()


def test_no_sign_flips_with_a_divisor_above_one() -> None:
    generator = torch.Generator().manual_seed(6)
    a = torch.randn(10_000, generator=generator)
    h = 12 * torch.rand(10_000, generator=generator)
    shaped = a + shaping.entropy_bonus(a, h, coef=5.0, divisor=1.01)
    assert (torch.sign(shaped) == torch.sign(a)).all()
    literal = a + shaping.entropy_bonus(a, h, coef=2.0, divisor=0.4)  # the paper's text, read literally
    assert (torch.sign(literal) != torch.sign(a)).any()


@settings(derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    coef=st.floats(0, 100),
    divisor=st.floats(0.01, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_bonus_is_between_zero_and_its_cap(
    seed: int, coef: float, divisor: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(50, generator=generator, dtype=dtype)
    h = 12 * torch.rand(50, generator=generator, dtype=dtype)
    psi = shaping.entropy_bonus(a, h, coef=coef, divisor=divisor)
    assert psi.dtype == dtype
    assert (psi >= 0).all() and (psi <= a.abs() / divisor).all() and (psi <= coef * h).all()
    if divisor > 1:
        assert (torch.sign(a + psi) == torch.sign(a)).all()


def test_sampled_entropy_by_hand() -> None:
    p = torch.tensor([1.0, 0.5, math.exp(-1), 1e-3], dtype=torch.float64)
    log_p = p.log().requires_grad_()
    h = shaping.sampled_entropy(log_p)
    torch.testing.assert_close(
        h, torch.tensor([0.0, 0.5 * math.log(2), math.exp(-1), 3e-3 * math.log(10)]).double()
    )
    assert not h.requires_grad
    # It is the token's own term of the exact entropy.
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(shaping.sampled_entropy(q.log()).sum(), -(q * q.log()).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_entropy_stays_in_its_range(dtype: torch.dtype) -> None:
    edges = torch.tensor([-math.inf, -1e30, -1000.0, -1e-30, 0.0, 1e-7], dtype=dtype)
    h = shaping.sampled_entropy(torch.cat([edges, -10 * torch.rand(1000, dtype=dtype)]))
    assert h.dtype == dtype and (h >= 0).all() and (h <= math.exp(-1) + 1e-7).all()
    assert (h[[0, 1, 2, 4, 5]] == 0).all()


def test_entropy_bonus_has_no_gradient() -> None:
    h = torch.ones(3, requires_grad=True)
    a = torch.ones(3, requires_grad=True)
    assert not shaping.entropy_bonus(a, h).requires_grad


def test_entropy_bonus_refuses_wrong_input() -> None:
    one = torch.ones(2)
    with pytest.raises(ValueError, match="shape"):
        shaping.entropy_bonus(torch.ones(3), one)
    with pytest.raises(ValueError, match="coef"):
        shaping.entropy_bonus(one, one, coef=-1.0)
    for divisor in (0.0, -2.0):
        with pytest.raises(ValueError, match="divisor"):
            shaping.entropy_bonus(one, one, divisor=divisor)


# --- losses --------------------------------------------------------------------------------------


def test_policy_loss_by_hand() -> None:
    ratio = torch.tensor([1.0, 2.0, 0.5, 2.0, 0.5, 4.0], dtype=torch.float64)
    a = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    loss, info = losses.policy_loss(ratio.log(), torch.zeros(6, dtype=torch.float64), a)
    # unclipped, clipped at 1.3, lower ratio kept, higher ratio kept, clipped at .8, dual clip at 3
    expected = torch.tensor([-1.0, -1.3, -0.5, 2.0, 0.8, 3.0], dtype=torch.float64)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(info["ratio"], ratio)
    assert info["clip_fraction"].tolist() == [0, 1, 0, 0, 1, 0]
    assert info["dual_clip_fraction"].tolist() == [0, 0, 0, 0, 0, 1]
    without, info = losses.policy_loss(ratio.log(), torch.zeros_like(a), a, dual_clip=None)
    assert without[-1] == pytest.approx(4.0) and info["dual_clip_fraction"].sum() == 0
    wider, _ = losses.policy_loss(ratio.log(), torch.zeros_like(a), a, clip_low=0.4, clip_high=0.5)
    assert wider[1] == pytest.approx(-1.5) and wider[4] == pytest.approx(0.6)


def test_policy_loss_gradient_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(7)
    n, h = 200, 1e-6
    new = -3 * torch.rand(n, generator=generator, dtype=torch.float64)
    old = new + torch.randn(n, generator=generator, dtype=torch.float64)
    a = torch.randn(n, generator=generator, dtype=torch.float64)
    x = new.clone().requires_grad_()
    loss, info = losses.policy_loss(x, old, a)
    loss.sum().backward()
    difference = losses.policy_loss(new + h, old, a)[0] - losses.policy_loss(new - h, old, a)[0]
    assert x.grad is not None
    torch.testing.assert_close(x.grad, difference / (2 * h), rtol=1e-6, atol=1e-8)
    stopped = (info["clip_fraction"] + info["dual_clip_fraction"]) > 0
    assert stopped.any() and (x.grad[stopped] == 0).all()
    free = ~stopped
    torch.testing.assert_close(x.grad[free], (-info["ratio"] * a)[free])


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    x = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = losses.policy_loss(x, x, torch.tensor([2.0, -3.0]))  # no gradient into the old side
    loss.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [-2.0, 3.0]


def test_an_absurd_ratio_stays_finite() -> None:
    x = torch.tensor([0.0, 0.0], requires_grad=True)
    loss, _ = losses.policy_loss(x, torch.tensor([-1e4, 1e4]), torch.tensor([-1.0, 1.0]), dual_clip=None)
    loss.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(loss).all() and torch.isfinite(x.grad).all()
    assert torch.isfinite(losses.kl_penalty(x, torch.tensor([-1e4, 1e4]))).all()


def test_a_loss_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def loss(log_probs, old_log_probs, advantages, lengths, *, scale=1.0):\n"
        "    return -scale * advantages.detach() * log_probs, {'half': log_probs.detach() / 2}\n"
        "loss.aggregation = 'sequence_mean'\n"
        "def reduced(log_probs, old_log_probs, advantages, lengths):\n"
        "    return log_probs.mean(), {}\n"
        "def odd(log_probs, old_log_probs, advantages, lengths):\n"
        "    return log_probs, {}\n"
        "odd.aggregation = 'sum'\n"
        "number = 3\n"
    )
    x = torch.tensor([-1.0, -2.0])
    loss, info = losses.policy_loss(x, x, x, name=f"{file}:loss", scale=3.0)
    assert loss.tolist() == [-3.0, -12.0] and info["half"].tolist() == [-0.5, -1.0]
    assert policy_losses.loss_options(f"{file}:loss") == {"scale": 1.0}
    assert policy_losses.loss_aggregation(f"{file}:loss") == "sequence_mean"
    assert policy_losses.loss_aggregation(f"{file}:reduced") is None
    with pytest.raises(ValueError, match=r"one shape.*loss \(\)"):
        losses.policy_loss(x, x, x, name=f"{file}:reduced")
    with pytest.raises(ValueError, match="aggregation 'sum'"):
        policy_losses.loss_aggregation(f"{file}:odd")
    with pytest.raises(ValueError, match="not a function"):
        policy_losses.get_loss(f"{file}:number")
    for missing in (f"{file}:los", f"{tmp_path}/no.py:loss", f"{file}"):
        with pytest.raises(UserError):
            policy_losses.get_loss(missing)


def test_kl_estimators_by_hand() -> None:
    log_p = torch.tensor([-1.0], dtype=torch.float64)
    ref = torch.tensor([-0.5], dtype=torch.float64)  # d = .5
    assert losses.kl_penalty(log_p, ref, "k1").item() == pytest.approx(-0.5)
    assert losses.kl_penalty(log_p, ref, "k2").item() == pytest.approx(0.125)
    assert losses.kl_penalty(log_p, ref).item() == pytest.approx(math.exp(0.5) - 1.5)
    with pytest.raises(ValueError, match="k4"):
        losses.kl_penalty(log_p, ref, "k4")  # type: ignore[arg-type]


def test_k1_and_k3_are_unbiased() -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        estimate = (p * losses.kl_penalty(p.log(), q.log(), kind)).sum()  # type: ignore[arg-type]
        torch.testing.assert_close(estimate, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_never_negative_and_accurate_when_close(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    for scale in (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 100.0):
        d = scale * torch.randn(10_000, generator=generator, dtype=dtype)
        k3 = losses.kl_penalty(torch.zeros_like(d), d)
        assert (k3 >= 0).all()
    small = losses.kl_penalty(torch.zeros(1, dtype=dtype), torch.full((1,), 1e-3, dtype=dtype))
    assert small.item() == pytest.approx(5.0017e-7, rel=1e-3)  # exp(d) - d - 1 in float32 gives 4.8e-7


def test_kl_pulls_towards_the_reference() -> None:
    x = torch.tensor([-1.0, -1.0], requires_grad=True)
    ref = torch.tensor([-0.5, -2.0], requires_grad=True)
    losses.kl_penalty(x, ref).sum().backward()
    assert x.grad is not None
    assert x.grad[0] < 0 < x.grad[1]  # a descent step raises the first and lowers the second
    assert ref.grad is None


def test_aggregate_does_not_depend_on_the_split() -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(17, generator=generator, dtype=torch.float64)
    whole = losses.aggregate(x, 17)
    torch.testing.assert_close(whole, x.mean())
    parts = [losses.aggregate(part, 17) for part in x.split([3, 0, 14])]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    weighted = losses.aggregate(x[:2], 4, torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(weighted, (x[0] + 3 * x[1]) / 4)
    empty = torch.zeros(0, requires_grad=True)
    losses.aggregate(empty * 2, 5).backward()  # a rank without tokens still takes part
    for wrong in (0, -1, math.nan):
        with pytest.raises(ValueError, match="denominator"):
            losses.aggregate(x, wrong)


@settings(derandomize=True, deadline=None)
@given(d=st.floats(-1e4, 1e4), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_k2_and_k3_are_never_negative(d: float, dtype: torch.dtype) -> None:
    ratio = torch.tensor([d], dtype=dtype)
    for kind in ("k2", "k3"):
        kl = losses.kl_penalty(torch.zeros_like(ratio), ratio, kind)  # type: ignore[arg-type]
        assert kl >= 0 and torch.isfinite(kl)


# Sequences of 2, 0, 1 and 5 tokens, and what the mean of 0..7 over them is in each mode.
LENGTHS = torch.tensor([2, 0, 1, 5])


@pytest.mark.parametrize(
    ("mode", "constant", "denominator", "mean"),
    [
        ("token_mean", None, 8.0, 3.5),
        ("sequence_mean", None, 3.0, (0.5 + 2 + 5) / 3),
        ("constant_length", 10, 40.0, 28 / 40),
    ],
)
def test_aggregations_by_hand(mode: str, constant: int | None, denominator: float, mean: float) -> None:
    assert losses.aggregation_denominator(LENGTHS, mode, constant) == denominator
    assert losses.aggregation_denominator(LENGTHS.tolist(), mode, constant) == denominator
    assert losses.aggregation_denominator(np.array([2, 0, 1, 5]), mode, constant) == denominator
    weights = losses.aggregation_weights(LENGTHS, mode)
    for dtype in (torch.float32, torch.float64):
        x = torch.arange(8, dtype=dtype)
        result = losses.aggregate(x, denominator, weights)
        assert result.dtype == dtype
        assert result.item() == pytest.approx(mean, rel=torch.finfo(dtype).eps * 4)


@pytest.mark.parametrize("mode", losses.AGGREGATIONS)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_mini_batch_without_tokens_still_has_a_denominator(mode: str, lengths: list[int]) -> None:
    denominator = losses.aggregation_denominator(lengths, mode, 10)
    assert denominator == 1.0
    weights = losses.aggregation_weights(torch.tensor(lengths, dtype=torch.int64), mode)
    empty = torch.zeros(0, requires_grad=True)
    loss = losses.aggregate(empty * 2, denominator, weights)
    loss.backward()
    assert loss.item() == 0.0


def test_a_longer_response_counts_as_its_aggregation_says() -> None:
    """How much a response weighs, and how much each of its tokens."""
    short, long = torch.tensor([10]), torch.tensor([1000])
    for mode, of_response, of_token in (
        ("token_mean", 100, 1),
        ("sequence_mean", 1, 0.01),
        ("constant_length", 100, 1),
    ):
        weights = [losses.aggregation_weights(length, mode) for length in (short, long)]
        a, b = (torch.ones(int(n)) if w is None else w for n, w in zip((short, long), weights, strict=True))
        assert (b.sum() / a.sum()).item() == pytest.approx(of_response)
        assert (b[0] / a[0]).item() == pytest.approx(of_token)
    # In token_mean another, long response takes weight from this one's tokens; not in constant_length.
    alone, joined = [10], [10, 1000]
    assert losses.aggregation_denominator(joined, "token_mean") == 101 * losses.aggregation_denominator(
        alone, "token_mean"
    )
    assert losses.aggregation_denominator(joined, "constant_length", 1000) == 2 * 1000


def test_aggregations_that_are_refused() -> None:
    for function in (losses.aggregation_weights, losses.aggregation_denominator):
        with pytest.raises(ValueError, match="token_mean, sequence_mean, constant_length"):
            function(LENGTHS, "mean")
    with pytest.raises(ValueError, match="constant_length must be > 0"):
        losses.aggregation_denominator(LENGTHS, "constant_length", 0)
    with pytest.raises(ValueError, match="needs the length"):
        losses.aggregation_denominator(LENGTHS, "constant_length")
    with pytest.raises(ValueError, match="lengths"):
        losses.aggregation_denominator([3, -1], "token_mean")
    with pytest.raises(ValueError, match="lengths"):
        losses.aggregation_weights(torch.tensor([3, -1]), "sequence_mean")


def test_losses_refuse_broadcasting() -> None:
    with pytest.raises(ValueError, match="one shape"):
        losses.policy_loss(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="one shape"):
        losses.kl_penalty(torch.zeros(3), torch.zeros(1))
    with pytest.raises(ValueError, match="one shape"):
        losses.aggregate(torch.zeros(3), 3, torch.zeros(1))
    out_of_range: list[dict[str, Any]] = [{"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}]
    for wrong in out_of_range:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            losses.policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), **wrong)
