"""Shaping and losses: values worked out by hand, gradients against finite differences, errors."""

from __future__ import annotations

import math

import pytest
import torch

from mssr.algorithms import losses, shaping

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
    with pytest.raises(ValueError, match="divisor"):
        shaping.entropy_bonus(one, one, divisor=0.0)


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


def test_losses_refuse_broadcasting() -> None:
    with pytest.raises(ValueError, match="one shape"):
        losses.policy_loss(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="one shape"):
        losses.kl_penalty(torch.zeros(3), torch.zeros(1))
    with pytest.raises(ValueError, match="one shape"):
        losses.aggregate(torch.zeros(3), 3, torch.zeros(1))
    for wrong in ({"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            losses.policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(3), **wrong)
