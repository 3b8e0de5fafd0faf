"""The policy losses: values by hand, gradients against autograd and finite differences, invariants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from mssr.algorithms import policy_losses
from mssr.algorithms.losses import (
    AGGREGATIONS,
    aggregate,
    aggregation_denominator,
    aggregation_weights,
    policy_loss,
)

pytestmark = pytest.mark.unit

NAMES = ("cispo", "dis", "flash_reinforce", "gspo", "ppo", "sapo")


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    x = at.clone().requires_grad_()
    function(x).sum().backward()
    assert x.grad is not None
    return x.grad


# --- by hand -------------------------------------------------------------------------------------


def test_gspo_by_hand() -> None:
    # Two tokens with log-ratios .3 and .1 (mean .2), none, and one with -.5
    old, lengths = torch.zeros(3, dtype=torch.float64), torch.tensor([2, 0, 1])
    new, up, down = column(0.3, 0.1, -0.5), math.exp(0.2), math.exp(-0.5)
    a = column(1.0, -2.0, 1.0)
    loss, info = policy_losses.gspo(new, old, a, lengths, clip_low=0.1, clip_high=0.1)
    torch.testing.assert_close(info["ratio"], column(up, up, down))
    torch.testing.assert_close(loss, column(-1.1, 2 * up, -down))
    assert info["clip_fraction"].tolist() == [1, 0, 0]
    loss, info = policy_losses.gspo(new, old, -a, lengths, clip_low=0.1, clip_high=0.1)
    torch.testing.assert_close(loss, column(up, -2 * 1.1, 0.9))
    assert info["clip_fraction"].tolist() == [0, 1, 1]
    # The paper's bounds: a mean log-ratio of 5e-4 is already too far.
    _, info = policy_losses.gspo(old + 5e-4, old, torch.ones_like(old), lengths)
    assert info["clip_fraction"].all()
    _, info = policy_losses.gspo(old + 3e-4, old, torch.ones_like(old), lengths)
    assert not info["clip_fraction"].any()


def test_dis_by_hand() -> None:
    # rho is .5, .7 (on the edge, so outside), .71, 2, 5.99 and 6.
    new = column(0.5, 0.7, 0.71, 2.0, 5.99, 6.0 * (1 + 1e-12)).log()
    a = column(1.0, 1.0, -2.0, 1.0, -1.0, 1.0)
    loss, info = policy_losses.dis(new, torch.zeros_like(new), a)
    weight = column(0, 0, 0.71, 2.0, 5.99, 0)
    torch.testing.assert_close(loss, -weight * a * new)
    assert info["clip_fraction"].tolist() == [1, 1, 0, 0, 0, 1]
    slope = gradient(lambda x: policy_losses.dis(x, torch.zeros_like(new), a)[0], new)
    torch.testing.assert_close(slope, -weight * a)  # rho is a weight: no gradient through it


def test_flash_reinforce_by_hand() -> None:
    # Engine .5 and policy .6: .5 log(.5/.6) + .5 log(.5/.4) = -.5 log .96, for one of two tokens. Then a
    # sequence without tokens, and one of engine .9 and policy .1, which is dropped.
    engine, policy = column(0.5, 0.3, 0.9).log(), column(0.6, 0.3, 0.1).log()
    lengths, a = torch.tensor([2, 0, 1]), column(1.0, -2.0, 3.0)
    kl = -0.5 * math.log(0.96)
    far = 0.9 * math.log(9) + 0.1 * math.log(1 / 9)
    for max_kl, kept in ((kl / 2 * 1.01, 1.0), (kl / 2 * 0.99, 0.0)):
        loss, info = policy_losses.flash_reinforce(policy, engine, a, lengths, max_kl=max_kl)
        weight = column(1.2 * kept, 1.0 * kept, 0.0)
        torch.testing.assert_close(loss, -weight * a * policy)
        torch.testing.assert_close(info["binary_kl"], column(kl, 0.0, far))
        assert info["dropped_fraction"].tolist() == [1 - kept, 1 - kept, 1]
    loss, _ = policy_losses.flash_reinforce(policy, engine, a, lengths, max_kl=math.inf)
    torch.testing.assert_close(loss[2], -3 / 9 * policy[2])
    nan, _ = policy_losses.flash_reinforce(policy, engine.clone().fill_(math.nan), a, lengths)
    assert (nan == 0).all()


def test_cispo_by_hand() -> None:
    ratio = column(1.0, 3.0, 8.0, 0.01)
    new = column(-1.0, -0.5, -0.1, -6.0)
    a = column(2.0, -1.0, 1.0, 1.0)
    loss, info = policy_losses.cispo(new, new - ratio.log(), a)
    torch.testing.assert_close(loss, column(2.0, -1.5, 0.5, 0.06))  # the weight 8 becomes 5
    torch.testing.assert_close(info["ratio"], ratio)
    assert info["clip_fraction"].tolist() == [0, 0, 1, 0]
    loss, info = policy_losses.cispo(new, new - ratio.log(), a, clip_low=0.5, clip_high=1.0)
    torch.testing.assert_close(loss, column(2.0, -1.0, 0.2, 3.0))
    assert info["clip_fraction"].tolist() == [0, 1, 1, 1]
    without, _ = policy_losses.cispo(new, new - ratio.log(), a, clip_low=10.0, clip_high=math.inf)
    torch.testing.assert_close(without, -ratio * a * new)


def test_sapo_by_hand() -> None:
    ratio, a = column(1.0, 2.0, 1.0, 0.5, 1.0), column(1.0, 1.0, -1.0, -2.0, 0.0)
    loss, info = policy_losses.sapo(ratio.log(), torch.zeros_like(a), a, tau_positive=2.0, tau_negative=4.0)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = column(-1.0, -2 * sigmoid(2.0), 0.5, 2 * sigmoid(-2.0), 0.0)
    torch.testing.assert_close(loss, expected)
    assert set(info) == {"ratio"}
    # The paper's temperatures, of which 1.05 has no exact float32.
    default, _ = policy_losses.sapo(column(0.0), column(0.0), column(-1.0))
    assert default.item() == pytest.approx(2 / 1.05, rel=1e-15)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_the_gradient_is_minus_the_advantage(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1.0, -2.0, -0.3], dtype=dtype)
    a = torch.tensor([2.0, -3.0, 0.0], dtype=dtype)
    lengths = torch.tensor([3])
    grad = gradient(lambda x: policy_loss(x, x, a, lengths, name=name)[0], x)  # none into the old side
    assert grad.dtype == dtype
    torch.testing.assert_close(grad, -a)


def test_gspo_has_the_gradient_and_value_of_the_sequence_form() -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([4, 1, 0, 3])
    new = -3 * torch.rand(8, generator=generator, dtype=torch.float64)
    old = new - column(0.3, 0.1, 0.2, 0.2, -0.5, 0.1, 0.2, -0.33)
    advantages = column(1.0, -2.0, 5.0, 0.5)  # clipped, clipped, empty, free
    options = {"clip_low": 0.05, "clip_high": 0.05}

    def sequence_form(x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for part, old_part, a in zip(
            x.split(lengths.tolist()), old.split(lengths.tolist()), advantages, strict=True
        ):
            if len(part):
                s = torch.exp((part - old_part).mean())
                total = total - torch.minimum(s * a, s.clamp(0.95, 1.05) * a)
        return total / 3

    def token_form(x: torch.Tensor) -> torch.Tensor:
        per_token, _ = policy_loss(
            x, old, advantages.repeat_interleave(lengths), lengths, name="gspo", **options
        )
        weights = aggregation_weights(lengths, "sequence_mean")
        return aggregate(per_token, aggregation_denominator(lengths, "sequence_mean"), weights)

    torch.testing.assert_close(token_form(new), sequence_form(new))
    grad = gradient(token_form, new)
    torch.testing.assert_close(grad, gradient(sequence_form, new))
    assert (grad != 0).tolist() == 5 * [False] + 3 * [True]
    assert gradcheck(token_form, new.clone().requires_grad_())


def test_gspo_takes_an_advantage_for_each_token() -> None:
    new, old, a = column(-1.0, -1.2), column(-1.1, -1.0), column(2.0, -0.5)
    s = math.exp(-0.05)
    grad = gradient(
        lambda x: policy_loss(x, old, a, torch.tensor([2]), name="gspo", clip_low=0.5, clip_high=0.5)[0], new
    )
    torch.testing.assert_close(grad, -s * a)


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    new, ratio, a = column(-1.0, -2.0, -0.5), column(0.2, 1.2, 9.0), column(1.0, -2.0, 3.0)
    grad = gradient(
        lambda x: policy_losses.cispo(x, new - ratio.log(), a, clip_low=0.5, clip_high=1.0)[0], new
    )
    torch.testing.assert_close(grad, -column(0.5, 1.2, 2.0) * a)


def test_sapo_gradient_falls_off_on_both_sides() -> None:
    ratio, one = column(0.01, 0.5, 1.0, 2.0, 20.0), torch.ones(5, dtype=torch.float64)
    for a in (one, -one):
        by_ratio = -gradient(lambda r: policy_losses.sapo(r.log(), 0 * one, a)[0], ratio) * a  # noqa: B023
        assert by_ratio[2] == pytest.approx(1.0)
        assert (by_ratio.diff()[:2] > 0).all() and (by_ratio.diff()[2:] < 0).all()
    far = column(3.0)
    positive, negative = (
        gradient(lambda x: policy_losses.sapo(x, 0 * far, a)[0], far.log()).abs()  # noqa: B023
        for a in (column(1.0), column(-1.0))
    )
    assert negative < positive  # its temperature is the larger one


@pytest.mark.parametrize(
    ("name", "ratios", "options"),
    [
        ("ppo", (1.1, 0.9, 2.0, 0.5, 2.0, 0.5, 4.0), {}),
        ("ppo", (1.1, 0.9, 2.0, 0.5, 2.0, 0.5, 4.0), {"dual_clip": None, "clip_low": 0.01}),
        ("sapo", (1.1, 0.9, 2.0, 0.5, 2.0, 0.5, 4.0), {"tau_negative": 3.0}),
        # Where the weight is clipped it is constant, as its stopped gradient says.
        ("cispo", (2.0, 0.2, 2.0, 0.5, 2.0, 0.5, 4.0), {"clip_low": 0.3, "clip_high": 0.3}),
    ],
)
def test_gradients_agree_with_finite_differences(
    name: str, ratios: tuple[float, ...], options: dict[str, Any]
) -> None:
    new = column(-1.0, -0.2, -3.0, -0.7, -1.5, -2.0, -0.1)
    a = column(1.0, 1.0, 1.0, 0.5, -1.0, -1.0, -2.0)
    old, lengths = new - column(*ratios).log(), torch.tensor([3, 4])
    assert gradcheck(
        lambda x: policy_loss(x, old, a, lengths, name=name, **options)[0], new.clone().requires_grad_()
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_but_into_the_policy(name: str) -> None:
    new, old, a = (torch.full((2,), value, requires_grad=True) for value in (-1.0, -1.1, 2.0))
    loss, info = policy_loss(new, old, a, torch.tensor([1, 1]), name=name)
    loss.sum().backward()
    assert new.grad is not None and old.grad is None and a.grad is None
    assert not any(value.requires_grad for value in info.values())


@pytest.mark.parametrize("name", NAMES)
def test_absurd_ratios_stay_finite(name: str) -> None:
    x = torch.tensor([0.0, 0.0, -1.0], requires_grad=True)
    old = torch.tensor([-1e4, 1e4, -1.0])
    for sign in (1.0, -1.0):
        loss, info = policy_loss(x, old, torch.full((3,), sign), torch.tensor([1, 1, 1]), name=name)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert torch.isfinite(loss).all() and torch.isfinite(grad).all()
        assert all(torch.isfinite(value).all() for value in info.values())


# --- invariants ----------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Sequences of 0 to 5 tokens, from on policy to far off it."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = sum(lengths)
    new = -3 * torch.rand(n, generator=generator, dtype=torch.float64)
    scale = draw(st.sampled_from([0.0, 1e-4, 0.1, 1.0, 10.0]))
    return {
        "lengths": lengths,
        "new": new,
        "old": new + scale * torch.randn(n, generator=generator, dtype=torch.float64),
        "a": torch.randn(n, generator=generator, dtype=torch.float64),
        "order": torch.randperm(len(lengths), generator=generator).tolist(),
        "cut": draw(st.integers(0, len(lengths))),
    }


def of_sequences(batch: dict[str, Any], which: list[int]) -> tuple[torch.Tensor, ...]:
    """new, old, advantages and lengths of some sequences, in that order."""
    parts = [torch.split(batch[key], batch["lengths"]) for key in ("new", "old", "a")]
    tensors = [torch.cat([part[i] for i in which] or [part[0][:0]]) for part in parts]
    return (*tensors, torch.tensor([batch["lengths"][i] for i in which], dtype=torch.int64))


@settings(derandomize=True, deadline=None)
@given(batch=batches(), name=st.sampled_from(NAMES))
def test_permuted_sequences_give_permuted_losses(batch: dict[str, Any], name: str) -> None:
    straight, info = policy_loss(*of_sequences(batch, list(range(len(batch["lengths"])))), name=name)
    permuted, permuted_info = policy_loss(*of_sequences(batch, batch["order"]), name=name)
    for before, after in [(straight, permuted), *((info[key], permuted_info[key]) for key in info)]:
        parts = torch.split(before, batch["lengths"])
        assert torch.equal(after, torch.cat([parts[i] for i in batch["order"]]))


@settings(derandomize=True, deadline=None)
@given(batch=batches(), name=st.sampled_from(NAMES), mode=st.sampled_from(AGGREGATIONS))
def test_splitting_into_micro_batches_changes_nothing(batch: dict[str, Any], name: str, mode: str) -> None:
    denominator = aggregation_denominator(batch["lengths"], mode, 7)

    def loss_and_gradient(which: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        new, old, a, lengths = of_sequences(batch, which)
        new.requires_grad_()
        per_token, _ = policy_loss(new, old, a, lengths, name=name)
        loss = aggregate(per_token, denominator, aggregation_weights(lengths, mode))
        return loss.detach(), torch.autograd.grad(loss, new)[0]

    everything = list(range(len(batch["lengths"])))
    loss, grad = loss_and_gradient(everything)
    parts = [loss_and_gradient(everything[: batch["cut"]]), loss_and_gradient(everything[batch["cut"] :])]
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad, rtol=1e-12, atol=0)


@settings(derandomize=True, deadline=None)
@given(batch=batches(), dual_clip=st.sampled_from([1.5, 3.0]))
def test_ppo_is_pessimistic_and_bounded_by_the_dual_clip(batch: dict[str, Any], dual_clip: float) -> None:
    new, old, a, lengths = of_sequences(batch, list(range(len(batch["lengths"]))))
    plain, _ = policy_losses.ppo(new, old, a, lengths, dual_clip=None)
    loss, info = policy_losses.ppo(new, old, a, lengths, dual_clip=dual_clip)
    assert (plain >= -info["ratio"] * a).all()
    negative = a < 0
    assert (loss[negative] <= -dual_clip * a[negative]).all()
    assert torch.equal(loss[~negative], plain[~negative])
    assert torch.equal(loss < plain, info["dual_clip_fraction"] == 1)


@settings(derandomize=True, deadline=None)
@given(batch=batches(), name=st.sampled_from(["ppo", "gspo"]))
def test_a_clipped_token_has_no_gradient_and_any_other_has(batch: dict[str, Any], name: str) -> None:
    new, old, a, lengths = of_sequences(batch, list(range(len(batch["lengths"]))))
    loss, info = policy_loss(new.requires_grad_(), old, a, lengths, name=name)
    (grad,) = torch.autograd.grad(loss.sum(), new)
    stopped = info["clip_fraction"] + info.get("dual_clip_fraction", 0) > 0
    within = (new - old).abs() < 20
    assert torch.equal(grad[within] == 0, (stopped | (a == 0))[within])
    torch.testing.assert_close(grad[~stopped & within], (-info["ratio"] * a)[~stopped & within])


# --- names and signatures ------------------------------------------------------------------------


def test_names_options_and_aggregations() -> None:
    assert policy_losses.LOSSES.names() == list(NAMES)
    assert policy_losses.loss_options("ppo") == {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}
    assert policy_losses.loss_options("gspo") == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert policy_losses.loss_options("cispo") == {"clip_low": 1.0, "clip_high": 4.0}
    assert policy_losses.loss_options("sapo") == {"tau_positive": 1.0, "tau_negative": 1.05}
    by_sequence = {name for name in NAMES if policy_losses.loss_aggregation(name) == "sequence_mean"}
    assert by_sequence == {"gspo", "flash_reinforce"}
    with pytest.raises(ValueError, match=r"'gpso', did you mean 'gspo'\?.*cispo"):
        policy_losses.get_loss("gpso")
    with pytest.raises(ValueError, match=r"'clip_hi', did you mean 'clip_high'\?"):
        policy_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), clip_hi=0.3)
    with pytest.raises(ValueError, match="it takes"):
        policy_losses.bind_loss("sapo", {"dual_clip": 3.0})


def test_a_loss_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_losses.LOSSES, "known", dict(policy_losses.LOSSES.known))

    @policy_losses.register_loss("reinforce", aggregation="constant_length")
    def reinforce(log_probs: Any, old: Any, advantages: Any, lengths: Any, *, scale: float = 1.0) -> Any:
        return -scale * advantages * log_probs, {}

    loss, _ = policy_loss(column(-1.0), column(-1.0), column(3.0), name="reinforce", scale=2.0)
    assert loss.item() == 6.0
    assert policy_losses.loss_aggregation("reinforce") == "constant_length"
    policy_losses.register_loss("reinforce")(reinforce)  # a notebook cell that is run again
    with pytest.raises(ValueError, match="'ppo' is taken"):
        policy_losses.register_loss("ppo")(reinforce)
    with pytest.raises(ValueError, match="'mean': choose one of token_mean"):
        policy_losses.register_loss("other", aggregation="mean")(reinforce)
    for wrong in (
        lambda log_probs, old, advantages: None,
        lambda log_probs, old, advantages, lengths, clip=0.2: None,
        lambda log_probs, old, advantages, lengths, *, clip: None,
        lambda log_probs, old, advantages, lengths, **options: None,
        lambda *tensors: None,
        3.0,
    ):
        with pytest.raises(ValueError, match="policy loss 'wrong'"):
            policy_losses.register_loss("wrong")(wrong)  # type: ignore[type-var]


@pytest.mark.parametrize("name", NAMES)
def test_broadcasting_is_refused(name: str) -> None:
    x, lengths = torch.zeros(3), torch.tensor([3])
    for inputs in ((x, x[:, None], x), (x, x, x[:, None]), (x[:, None], x, x), (x, x[:1], x)):
        with pytest.raises(ValueError, match="one shape"):
            policy_loss(*inputs, lengths, name=name)


def test_gspo_needs_the_lengths() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="needs lengths"):
        policy_loss(x, x, x, name="gspo")
    for lengths in (torch.tensor([2]), torch.tensor([4, -1]), torch.tensor([3.0]), torch.tensor(3), [3]):
        with pytest.raises(ValueError, match="lengths"):
            policy_loss(x, x, x, lengths, name="gspo")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("ppo", "clip_low", 1.5),
        ("ppo", "clip_low", math.nan),
        ("ppo", "clip_high", -0.1),
        ("ppo", "dual_clip", 1.0),
        ("gspo", "clip_low", -1e-4),
        ("gspo", "clip_low", 1.5),
        ("gspo", "clip_high", math.nan),
        ("cispo", "clip_low", -0.1),
        ("cispo", "clip_high", -0.1),
        ("sapo", "tau_positive", 0.0),
        ("sapo", "tau_negative", math.inf),
    ],
)
def test_options_out_of_range_are_refused(name: str, option: str, value: float) -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=option):
        policy_loss(x, x, x, torch.tensor([2]), name=name, **{option: value})
