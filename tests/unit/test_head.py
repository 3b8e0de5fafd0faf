"""The fused head, both ways through it, against all logits, log_softmax and autograd."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mssr.models import head
from mssr.models.head import Head, token_log_probs_and_entropy, token_loss
from tests.unit.stand_in_device import OnDevice, StandIn

pytestmark = pytest.mark.unit

Result = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """Random inputs: N tokens, V = 157, D = 24."""

    n: int = 37
    chunk: int = 10
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    banned: tuple[int, ...] = ()
    entropy_coef: float = 0.7
    offset: float = 0.0
    """Added to all logits."""
    scale: float = 1.0
    """Of the logits' spread."""

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden, weight, targets and the advantage of every token."""
        g = torch.Generator().manual_seed(self.n)
        hidden = torch.randn(self.n, 24, generator=g)
        hidden[:, 0] = 1.0
        weight = torch.randn(157, 24, generator=g) * self.scale / 24**0.5
        weight[:, 0] = self.offset
        targets = torch.randint(10, 157, (self.n,), generator=g)
        return hidden.to(self.dtype), weight.to(self.dtype), targets, torch.randn(self.n, generator=g)


def objective(case: Case, advantages: torch.Tensor) -> Callable[..., torch.Tensor]:
    def part_of_loss(log_probs: torch.Tensor, entropy: torch.Tensor, part: slice) -> torch.Tensor:
        # Not linear, so that a slope taken at the wrong place shows.
        surrogate = torch.exp(0.3 * log_probs) * advantages[part].to(log_probs)
        loss = -surrogate.sum()
        return loss - case.entropy_coef * (entropy**2).sum() if case.entropy_coef else loss

    return part_of_loss


def straightforward(case: Case) -> Result:
    """In float64, from the inputs as they were rounded: log-probs, entropy, loss, both gradients."""
    hidden, weight, targets, advantages = case.inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight.T / case.temperature
    logits[:, list(case.banned)] = float("-inf")
    log_p = torch.log_softmax(logits, dim=-1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0)).sum(-1)
    loss = objective(case, advantages)(log_probs, entropy, slice(None))
    return log_probs, entropy, loss, *torch.autograd.grad(loss, [hidden, weight])


def two_pass(case: Case, put: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Result:
    hidden, weight, targets, advantages = map(put, case.inputs())
    hidden.requires_grad_(), weight.requires_grad_()
    asked = Head(case.temperature, case.banned, case.chunk)
    log_probs, entropy = token_log_probs_and_entropy(hidden, weight, targets, asked)
    loss = objective(case, advantages)(log_probs, entropy, slice(None))
    return log_probs, entropy, loss, *torch.autograd.grad(loss, [hidden, weight])


def in_forward(case: Case, put: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> Result:
    hidden, weight, targets, advantages = map(put, case.inputs())
    hidden.requires_grad_(), weight.requires_grad_()
    asked = Head(case.temperature, case.banned, case.chunk)
    loss, log_probs, entropy = token_loss(hidden, weight, targets, objective(case, advantages), asked)
    assert not log_probs.requires_grad and not entropy.requires_grad
    # The backward pass has to pass on what comes in.
    of_hidden, of_weight = torch.autograd.grad(2.0 * loss, [hidden, weight])
    return log_probs, entropy, loss, of_hidden / 2, of_weight / 2


CASES = {
    "plain": Case(),
    "temperature": Case(temperature=0.6),
    "banned": Case(banned=(0, 3, 9), temperature=1.3),
    "no_entropy": Case(entropy_coef=0.0),
    "sharp": Case(scale=20.0),
    "large_logits": Case(offset=64.0),
    "large_negative_logits": Case(offset=-64.0, scale=4.0),
    "one_token_a_chunk": Case(chunk=1, banned=(0, 9)),
    "more_tokens_than_rows": Case(n=200, chunk=1),
    "a_chunk_of_all": Case(chunk=37),
    "a_chunk_of_more": Case(chunk=1000),
    "one_token": Case(n=1),
    "no_token": Case(n=0),
    "float64": Case(dtype=torch.float64, banned=(0, 9), temperature=0.6),
    "bfloat16": Case(dtype=torch.bfloat16, banned=(0, 9), temperature=0.6),
}


@pytest.mark.parametrize("way", [two_pass, in_forward])
@pytest.mark.parametrize("name", CASES)
def test_it_equals_the_straightforward_computation(way: Callable[[Case], Result], name: str) -> None:
    case = CASES[name]
    actual, expected = way(case), straightforward(case)
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    assert [x.dtype for x in actual] == [exact] * 3 + [case.dtype] * 2
    tolerance = 1e-12 if case.dtype == torch.float64 else 1e-5
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        # A bfloat16 gradient is the exact one, rounded once: half a unit in the last of 8 bits.
        rounding = 2**-8 if a.dtype == torch.bfloat16 else tolerance
        size = float(e.detach().abs().max()) if k > 1 and e.numel() else 1.0
        if k == 3:  # a sum over the vocabulary in which the offsets cancel
            size *= max(1.0, abs(case.offset))
        torch.testing.assert_close(a.double(), e, atol=tolerance * max(1.0, size), rtol=rounding)


@pytest.mark.parametrize("way", [two_pass, in_forward])
def test_a_bfloat16_weight_is_converted_piece_by_piece(
    way: Callable[[Case], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    product = head._product

    def spy(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows.extend(len(t) if t.shape[1] == 24 else t.shape[1] for t in (a, b) if 24 in t.shape)
        return product(a, b, dtype)

    monkeypatch.setattr(head, "_product", spy)
    monkeypatch.setattr(head, "_CONVERTED_ROWS", 40)
    case = CASES["bfloat16"]
    actual, expected = way(case), straightforward(case)
    assert max(rows) == 40
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            a.double(), e, atol=1e-5 * max(1.0, float(e.detach().abs().max())), rtol=2**-8
        )


@pytest.mark.parametrize("way", [two_pass, in_forward])
def test_no_more_logits_at_a_time_than_a_chunk_of_tokens_has(
    way: Callable[[Case], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    logits = head.Head.logits

    def spy(*args) -> torch.Tensor:
        sizes.append(logits(*args).numel())
        return logits(*args)

    monkeypatch.setattr(head.Head, "logits", spy)
    way(Case(n=37, chunk=10))
    assert 10 * 157 * 0.8 <= max(sizes) <= 10 * 157


@pytest.mark.parametrize("entropy_coef", [0.0, 0.7])
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_keeps_its_own(
    frozen: str, entropy_coef: float
) -> None:
    case = Case(entropy_coef=entropy_coef)
    expected = dict(zip(("hidden", "weight"), straightforward(case)[3:], strict=True))
    for fused in (False, True):
        hidden, weight, targets, advantages = case.inputs()
        inputs = {"hidden": hidden, "weight": weight}
        trained = next(name for name in inputs if name != frozen)
        inputs[trained].requires_grad_()
        loss_of = objective(case, advantages)
        if fused:
            loss = token_loss(hidden, weight, targets, loss_of, Head(chunk=10))[0]
        else:
            loss = loss_of(*token_log_probs_and_entropy(hidden, weight, targets, Head(chunk=10)), slice(None))
        loss.backward()
        assert inputs[frozen].grad is None
        torch.testing.assert_close(inputs[trained].grad.double(), expected[trained], atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_token_loss_can_be_taken_once() -> None:
    """It is scaled in place: a second time it would be scaled twice."""
    hidden, weight, targets, advantages = Case().inputs()
    loss = token_loss(hidden.requires_grad_(), weight, targets, objective(Case(), advantages))[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_there_is_no_second_derivative() -> None:
    """It would lack the part that goes through the first, and be wrong without a word."""
    hidden, weight, targets, advantages = Case().inputs()
    hidden.requires_grad_()
    for value in (
        token_log_probs_and_entropy(hidden, weight, targets)[0].sum(),
        token_loss(hidden, weight, targets, objective(Case(), advantages))[0],
    ):
        (gradient,) = torch.autograd.grad(value.square(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()


@pytest.mark.parametrize("way", ["two passes", "loss"])
def test_a_banned_logit_is_a_constant_even_where_it_is_the_target(way: str) -> None:
    case = Case(banned=(3, 150), entropy_coef=0.0)
    hidden, weight, targets, _ = case.inputs()
    targets[::2] = 150
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    asked = Head(banned=case.banned, chunk=4)
    if way == "loss":
        loss = token_loss(*inputs, targets, lambda log_probs, *_: log_probs.sum(), asked)[0]
    else:
        loss = token_log_probs_and_entropy(*inputs, targets, asked)[0].sum()
    loss.backward()
    assert not weight.grad[[3, 150]].any() and weight.grad.any()


class Spy(TorchDispatchMode):
    """What computes a tensor, and the tensor's shape and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and func not in (aten.slice.Tensor, aten.detach.default):
            self.calls.append((str(func), tuple(out.shape), out.dtype))
        return out

    def of_shape(self, *shape: int) -> Counter[tuple[str, torch.dtype]]:
        return Counter((name, dtype) for name, found, dtype in self.calls if found == shape)


V, D, N, CHUNK = 152_064, 3584, 5000, 2048
aten = torch.ops.aten
HALF, SINGLE = torch.bfloat16, torch.float32


def test_on_a_gpu_no_product_of_the_size_of_the_weight_is_written() -> None:
    """At the size of the 7B model: the gradient is filled with zeros, added to by chunks, and converted."""
    hidden = torch.empty(N, D, dtype=HALF, device="meta", requires_grad=True)
    weight = torch.empty(V, D, dtype=HALF, device="meta", requires_grad=True)
    targets = torch.empty(N, dtype=torch.int64, device="meta")
    with Spy() as spy:
        loss, *_ = token_loss(
            hidden,
            weight,
            targets,
            lambda log_prob, entropy, _: (log_prob + entropy).sum(),
            Head(0.7, [5], CHUNK),
        )
        loss.backward()
    found = spy.of_shape(V, D)
    assert found.pop(("aten.addmm.dtype_out", SINGLE)) == 3
    assert found == {
        ("aten.zeros_like.default", SINGLE): 1,
        ("aten._to_copy.default", HALF): 1,
        ("aten.mul_.Tensor", HALF): 1,
    }
    wide = spy.of_shape(CHUNK, V)
    assert wide["aten.mm.dtype", SINGLE] == wide["aten._to_copy.default", HALF] == 2
    assert ("aten.cat.default", SINGLE) not in wide
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == HALF


@pytest.mark.parametrize("way", [two_pass, in_forward])
@pytest.mark.parametrize("name", ["bfloat16", "float64"])
def test_on_a_gpu_it_is_the_same_but_for_the_gradient_by_logits_that_is_rounded(
    way: Callable[[Case], Result], name: str
) -> None:
    case = CASES[name]
    expected = straightforward(case)
    with StandIn() as mode:
        actual = way(case, OnDevice)
    assert not mode.waits
    for k, (a, e) in enumerate(zip(actual, expected, strict=True)):
        rounding = (1e-5 if k < 3 else 2**-8) if name == "bfloat16" else 1e-12
        assert (a.value.double() - e).norm() <= rounding * e.norm()
