"""Optimizers that keep less beside a parameter: what they must not lose, and where they wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from mssr.actor import adamw, distributed
from mssr.actor.adamw import (
    AdamW8bit,
    KahanAdamW,
    StochasticAdamW,
    block_size,
    join,
    round_stochastically,
    split,
)
from mssr.actor.optimizers import OffloadedOptimizer, with_offload
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit

STOCHASTIC = {"seed": 0, "shard": 0}


def options(lr: float, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"lr": lr, "betas": (0.9, 0.99), "weight_decay": weight_decay, "eps": 1e-8}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def descend(kind: Any, dtype: torch.dtype, steps: int, **given: Any) -> tuple[list[float], torch.Tensor]:
    """Least squares; returns the losses and the solution that was found."""
    problem = torch.randn(256, 64, generator=generator(1))
    target = problem @ torch.randn(64, 64, generator=generator(2))
    weight = nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = kind([weight], **given)
    losses = []
    for _ in range(steps):
        loss = (problem @ weight.float() - target).square().mean()
        weight.grad = torch.autograd.grad(loss, weight)[0]
        optimizer.step()
        losses.append(loss.item())
    return losses, weight.detach().float()


def test_tiny_updates_are_not_lost() -> None:
    """A thousand steps of a hundredth of what bfloat16 can tell at 1 add up to ten times that."""
    resolution, steps = 2**-8, 1000
    moved = {}
    for name, kind, extra in (
        ("plain", torch.optim.AdamW, {}),
        ("stochastic", StochasticAdamW, STOCHASTIC),
        ("kahan", KahanAdamW, {}),
    ):
        parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = kind([parameter], **options(resolution / 100), **extra)
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)  # AdamW then moves by the learning rate
            optimizer.step()
        moved[name] = float(1 - parameter.detach().float().mean())
    assert moved["plain"] == 0
    expected = steps * resolution / 100
    assert moved["stochastic"] == pytest.approx(expected, rel=0.02)
    assert moved["kahan"] == pytest.approx(expected, rel=0.02)


def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour() -> None:
    values = torch.randn(64, generator=generator()) * torch.logspace(-30, 30, 64)
    many = round_stochastically(values.expand(40000, 64).contiguous(), generator(1)).double()
    lower = (values.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    upper = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double()
    assert ((many == lower) | (many == upper)).all()
    gap = (upper - lower).abs()
    # A mean of 40,000: its error is at most half a gap over 200.
    assert ((many.mean(0) - values.double()).abs() < 4 * gap * 0.5 / 200).all()
    exact = values.bfloat16()
    assert torch.equal(round_stochastically(exact.float(), generator(2)), exact)


def test_what_rounding_takes_away_is_kept_bit_for_bit() -> None:
    values = torch.randn(10000, generator=generator()) * torch.logspace(-35, 35, 10000)
    rounded, rest = split(values)
    assert torch.equal(join(rounded, rest), values)
    assert ((rounded.float() - values).abs() <= 2**-8 * values.abs()).all()


def test_kahan_follows_float32_exactly() -> None:
    """Given the same gradients, parameters with their compensation are those of float32."""
    start = torch.randn(300, 7, generator=generator()).bfloat16()
    whole, narrow = nn.Parameter(start.float()), nn.Parameter(start.clone())
    reference = torch.optim.AdamW([whole], **options(1e-4, 0.1))
    kahan = KahanAdamW([narrow], **options(1e-4, 0.1))
    for step in range(50):
        narrow.grad = torch.randn(300, 7, generator=generator(step)).bfloat16()
        whole.grad = narrow.grad.float()
        reference.step()
        kahan.step()
    found = join(narrow.detach(), kahan.state[narrow]["compensation"])
    # The first moment alone is rounded, to 8 bits.
    assert (found - whole.detach()).norm() < 0.005 * (whole.detach() - start.float()).norm()


@pytest.mark.parametrize(
    ("kind", "extra", "dtype", "near"),
    [
        (StochasticAdamW, STOCHASTIC, torch.bfloat16, 0.05),
        (KahanAdamW, {}, torch.bfloat16, 0.05),
        (AdamW8bit, {}, torch.float32, 0.5),  # as torchao's, see below
    ],
)
def test_training_goes_like_that_of_float32(
    kind: Any, extra: dict[str, Any], dtype: torch.dtype, near: float
) -> None:
    exact, solution = descend(torch.optim.AdamW, torch.float32, 300, **options(0.03))
    found, other = descend(kind, dtype, 300, **options(0.03), **extra)
    assert exact[-1] < 0.01 * exact[0]  # there was something to learn
    assert found[150] == pytest.approx(exact[150], rel=near)
    assert found[-1] < 0.01 * exact[0]
    assert (other - solution).norm() < 0.05 * solution.norm()


def test_the_noise_depends_on_seed_shard_and_step_and_on_nothing_else() -> None:
    def run(steps: int, resume_at: int | None = None, **noise: int) -> torch.Tensor:
        parameter = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
        kept = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
        optimizer = StochasticAdamW([kept, parameter], **options(1e-4), **(STOCHASTIC | noise))
        for step in range(steps):
            if step == resume_at:
                state = optimizer.state
                optimizer = StochasticAdamW([kept, parameter], **options(1e-4), **(STOCHASTIC | noise))
                optimizer.state = state
                torch.rand(step + 3)  # what else is random is of no matter
            for p in (parameter, kept):
                p.grad = torch.ones_like(p)
            optimizer.step()
        return parameter.detach()

    plain = run(6)
    assert torch.equal(plain, run(6, resume_at=3))
    assert not torch.equal(plain, run(6, seed=1))
    assert not torch.equal(plain, run(6, shard=1))


def test_rows_are_stepped_in_parts_without_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = descend(KahanAdamW, torch.bfloat16, 5, **options(0.03))
    eight = descend(AdamW8bit, torch.float32, 5, **options(0.03))
    monkeypatch.setattr(adamw, "_CHUNK", 7 * 64)
    assert torch.equal(whole[1], descend(KahanAdamW, torch.bfloat16, 5, **options(0.03))[1])
    assert torch.equal(eight[1], descend(AdamW8bit, torch.float32, 5, **options(0.03))[1])


def test_eight_bits_are_those_of_torchao() -> None:
    """Where a row is a whole number of its blocks of 256; and they take an eighth of float32's memory."""
    import torchao.optim

    start = torch.randn(64, 512, generator=generator())
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own, library = (
        kind([p], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1, eps=1e-8)
        for kind, p in ((AdamW8bit, ours), (torchao.optim.AdamW8bit, theirs))
    )
    with torch.compiler.set_stance("force_eager"):
        for step in range(4):
            ours.grad = torch.randn(64, 512, generator=generator(step))
            theirs.grad = ours.grad.clone()
            own.step()
            library.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours.detach(), start)
    stored = sum(value.nbytes for name, value in own.state[ours].items() if name != "step")
    assert stored == 2 * (start.numel() + 4 * start.numel() // 256)


def test_blocks_lie_within_rows() -> None:
    shapes = {(1280, 3420): 228, (3584, 18944): 256, (1280, 3, 2, 14, 14): 196, (4096,): None}
    shapes |= {(18944, 16): None, (8, 8): None, (100, 521): None}
    assert {shape: block_size(torch.empty(shape, device="meta")) for shape in shapes} == shapes


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW8bit, KahanAdamW, StochasticAdamW])
def test_states_that_wait_on_the_host_change_nothing(kind: Any) -> None:
    """Stepped in several parts; between steps no state has memory on the device."""
    dtype = torch.bfloat16 if kind in (KahanAdamW, StochasticAdamW) else torch.float32
    extra = STOCHASTIC if kind is StochasticAdamW else {}

    def parameters() -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(64, 64, generator=generator(k)).to(dtype)) for k in range(4)]

    ours, plain = parameters(), parameters()
    inner = kind(ours, **options(0.01), **extra)
    offloaded = OffloadedOptimizer(inner, part_bytes=8 * 64 * 64 * 2)
    reference = kind(plain, **options(0.01), **extra)
    calls = []
    step = inner.step
    inner.step = lambda: (calls.append(len(inner.param_groups[0]["params"])), step())
    for number in range(3):
        for k, (a, b) in enumerate(zip(ours, plain, strict=True)):
            a.grad = torch.randn(64, 64, generator=generator(10 * number + k)).to(dtype)
            b.grad = a.grad.clone()
        offloaded.step()
        reference.step()
        states = [v for p in ours for name, v in inner.state[p].items() if name != "step"]
        assert states and not any(v.untyped_storage().nbytes() for v in states)
    assert calls == [2, 2] * 3 and inner.param_groups[0]["params"] == ours
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    with offloaded.on_device():
        for a, b in zip(ours, plain, strict=True):
            assert all(torch.equal(v, reference.state[b][name]) for name, v in inner.state[a].items())
    assert not any(v.untyped_storage().nbytes() for v in states)


def test_offload_is_for_a_gpu(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert isinstance(with_offload(optimizer, "optimizer", gpu), OffloadedOptimizer)
    for offload, device in (("optimizer", cpu), ("all", cpu), ("all", gpu), ("none", gpu)):
        assert with_offload(optimizer, offload, device) is optimizer
    # Every part of the model that is sharded.
    policies: list[Any] = []
    monkeypatch.setattr(
        distributed, "fully_shard", lambda *_, offload_policy=None, **__: policies.append(offload_policy)
    )
    from mssr.models.loading import load_model

    model = PolicyModel(load_model(load_config(workspace.config).model, torch.float32, empty=True))
    for device_type, offload, expected in (
        ("cuda", True, True),
        ("cuda", False, False),
        ("cpu", True, False),
    ):
        policies.clear()
        mesh: Any = SimpleNamespace(device_type=device_type)
        distributed.shard(model, mesh, torch.float32, keep_gathered=False, offload=offload)
        assert len(policies) == 4 + 3 + 1
        assert all(isinstance(p, CPUOffloadPolicy) is expected for p in policies)
