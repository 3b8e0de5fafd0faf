"""Paths that only a GPU takes, each against one that is slow and plain. On a CPU what stands in for them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from mssr.actor.distributed import full_tensors
from mssr.actor.optimizers import make_optimizer
from mssr.actor.worker import PolicyWorker
from mssr.config import Config
from mssr.models.attention import _kernel_takes, varlen_attention
from mssr.models.lora import full_weights
from scripts.acceptance.parts import Place, Told

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import fused_head
import gpu_update
from workload import draw_lengths

BF16 = 0.02
"""Largest relative error of what is computed in bfloat16, which has 8 bits: 2**-8 = 0.004 an operation."""


def error(actual: Any, expected: Any) -> float:
    """Of a tensor as a whole, relative."""
    assert torch.isfinite(actual).all()
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def bounded(errors: dict[str, float], bound: float = BF16) -> Told:
    assert max(errors.values()) < bound, f"relative errors above {bound}: {errors}"
    return {f"error of {name}": f"{value:.1e}" for name, value in errors.items()}


def attention(place: Place) -> Told:
    """Attention of sequences laid end to end in bfloat16, against float32 with a dense mask: in the shapes of
    the language model of 3B (grouped keys, causal) and of the vision tower (windows)."""
    errors = {}
    for name, heads, kv_heads, width, lengths in (
        ("text", 16, 2, 128, [700, 1, 333, 64]),
        ("tower", 16, 16, 80, [64] * 20 + [49]),
    ):
        total, causal = sum(lengths), name == "text"
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, count, total, width) for count in (heads, kv_heads, kv_heads)]
        exact = [torch.randn(s, generator=generator).bfloat16().float().to(place.device) for s in shapes]
        narrow = [x.bfloat16().requires_grad_() for x in exact]
        exact = [x.requires_grad_() for x in exact]
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=place.device).cumsum(0).int()
        assert _kernel_takes(narrow[0]) == bool(place.gpus)
        out, _ = varlen_attention(
            SimpleNamespace(is_causal=causal), *narrow, None, cu_seq_lens_q=bounds, max_length_q=max(lengths)
        )
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(place.device)
        mask = owner[:, None] == owner[None]
        if causal:
            mask = mask.tril()
        plain = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=heads != kv_heads)
        plain = plain.transpose(1, 2)
        slope = torch.randn(plain.shape, generator=generator).to(place.device)
        gradients = torch.autograd.grad((out.float() * slope).sum(), narrow)
        expected = torch.autograd.grad((plain * slope).sum(), exact)
        errors[f"{name} forward"] = error(out, plain)
        errors[f"{name} backward"] = max(map(error, gradients, expected))
    return bounded(errors)


def head(place: Place) -> Told:
    """Gradients of both ways through the fused head in bfloat16, against all logits in float32."""
    tokens, width, vocabulary = (3000, 2048, 151936) if place.gpus else (300, 64, 2048)
    args = argparse.Namespace(device=place.device, dtype="bfloat16", hidden=width, entropy_coef=0.1)
    inputs = fused_head.make_inputs(args, tokens, vocabulary)
    hidden, weight = (x.detach().float().requires_grad_() for x in inputs[:2])
    fused_head.run("straightforward", (hidden, weight, *inputs[2:]))
    errors = {}
    for name in ("mssr, two passes", "mssr, gradient in forward"):
        fused_head.run(name, inputs)
        pairs = (inputs[0].grad, hidden.grad), (inputs[1].grad, weight.grad)
        errors[name] = max(error(ours, exact) for ours, exact in pairs)
    return bounded(errors)


OPTIMIZERS = {
    "float32": ([], 1e-4),
    "bfloat16, Kahan": (["actor.master_dtype=bfloat16", "actor.rounding=kahan"], 0.02),
    "bfloat16, stochastic": (["actor.master_dtype=bfloat16"], 0.1),
    "8 bits": (["actor.optimizer=adamw_8bit"], 0.1),
}
"""Overrides, and how far from the exact way a parameter may end, as a share of that way."""


def optimizers(place: Place) -> Told:
    """A hundred steps of each, on the device, against torch's plain AdamW in float64 on the host."""
    told = {}
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(256, 512, generator=generator).bfloat16()
    noise = [torch.randn(start.shape, generator=generator) for _ in range(10)]
    for name, (overrides, bound) in OPTIMIZERS.items():
        config = Config()
        config.actor.lr = 1e-2
        for override in overrides:
            gpu_update.set_option(config, override)
        dtype = getattr(torch, config.actor.master_dtype)
        ours = torch.nn.Parameter(start.clone().to(place.device, dtype))
        exact = torch.nn.Parameter(start.double())
        mine = make_optimizer(config, [ours], 0)
        theirs = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.01, foreach=False)
        for step in range(100):
            gradient = (noise[step % 10] + 0.5).to(dtype)
            ours.grad, exact.grad = gradient.to(place.device), gradient.double()
            mine.step(), theirs.step()
        way = exact.detach() - start.double()
        told[name] = float((ours.detach().cpu().double() - exact.detach()).norm() / way.norm())
        assert told[name] < bound, f"{name}: {told[name]:.3f} of the way off"
    return {f"{name}, off": f"{value:.1e}" for name, value in told.items()}


OFFLOADS = ("actor.offload=optimizer", "actor.offload=all", "actor.offload_reference=true")


def offload(place: Place) -> Told:
    """Two steps of a small model in float32, with each kind of offload and without: the same parameters."""
    config, batch = small(place)
    config.model.dtype = "float32"
    ways: dict[str, torch.Tensor] = {}
    for number, option in enumerate(("actor.offload=none", *OFFLOADS)):
        config.actor.offload, config.actor.offload_reference = "none", False
        gpu_update.set_option(config, option)
        worker = PolicyWorker(config, 0, f"file://{place.scratch}/offload-{number}", place.device)
        before = parameters(worker)
        for step in range(2):
            assert not worker.update(batch, step)["policy/skipped_updates"]
        ways[option] = parameters(worker) - before
        worker.close()
    plain = ways.pop("actor.offload=none")
    # Adam divides by the size of a gradient: rounding of one near 0 may turn its step around.
    return bounded({option: error(way, plain) for option, way in ways.items()}, 0.05)


def parameters(worker: PolicyWorker) -> torch.Tensor:
    """All of them, end to end."""
    named = full_weights(worker.policy.model, full_tensors)
    return torch.cat([tensor.detach().double().cpu().flatten() for _, tensor in named])


def small(place: Place) -> tuple[Config, Any]:
    """A tiny model with rows, and a batch of them."""
    options = [f"trainer.run_dir={place.scratch}/small-run", "actor.lr=1.0e-4"]
    args = argparse.Namespace(size="tiny", device=place.device, threads=1, lora=0, options=options, scale=0.2)
    prompts, responses = draw_lengths(4, 1, args.scale)
    config = gpu_update.make_config(args, place.scratch / "small", prompts)
    [batch] = gpu_update.make_batches(config, 4, 512, responses)
    return config, batch
