"""Attention without a mask equals attention with one; the kernel gets the right arguments.

The flash kernel itself runs on a GPU only. Here a function with its signature stands in for it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mssr.config import ModelConfig
from mssr.data.prompt_source import PromptSource
from mssr.errors import UserError
from mssr.models import attention
from mssr.models.loading import load_model
from mssr.models.packing import PackedBatch, PackItem, pack
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit


def make_policy(workspace: Workspace, implementation: str) -> PolicyModel:
    section = dataclasses.replace(load_config(workspace.config).model, attn_implementation=implementation)
    return PolicyModel(load_model(section, torch.float32))


@pytest.fixture(scope="module")
def masked(workspace: Workspace) -> PolicyModel:
    """transformers' own sdpa, with a dense mask."""
    return make_policy(workspace, "sdpa")


@pytest.fixture(scope="module")
def varlen(workspace: Workspace) -> PolicyModel:
    return make_policy(workspace, "auto")


@pytest.fixture(scope="module")
def batch(workspace: Workspace, masked: PolicyModel) -> PackedBatch:
    source = PromptSource(load_config(workspace.config))
    generator = torch.Generator().manual_seed(0)
    items = []
    for k, prompt_id in enumerate(["t0", "t1", "t2", "t3", "t1"]):
        prompt = source.encoder.encode(source.row(prompt_id))
        response = torch.randint(0, 250, (3 + 2 * k,), generator=generator)
        items.append(PackItem(prompt, masked.rope_positions(prompt), response))
    return pack(items, masked.merge_size)


class Kernel:
    """Written down token by token from the documentation of `torch.nn.attention.varlen.varlen_attn`."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        lengths = cu_seq_q.diff()
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query) == len(key)
        assert type(max_q) is type(max_k) is int and max_q == max_k == int(lengths.max())
        assert enable_gqa or query.shape[1] == key.shape[1]
        self.calls.append({"window_size": window_size, "segments": len(lengths), "scale": scale})
        group = query.shape[1] // key.shape[1]
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        allowed = owner[:, None] == owner[None]
        if window_size == (-1, 0):
            allowed = allowed.tril()
        keys, values = (x.repeat_interleave(group, dim=1) for x in (key, value))
        logits = torch.einsum("qhd,khd->hqk", query, keys) * (scale or query.shape[-1] ** -0.5)
        return torch.einsum("hqk,khd->qhd", logits.masked_fill(~allowed, float("-inf")).softmax(-1), values)


def run(policy: PolicyModel, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs and entropies, and the gradient of a mixture of them."""
    policy.zero_grad()
    log_probs, entropy = policy(batch)
    (log_probs * torch.linspace(-1, 1, len(log_probs)) + 0.3 * entropy).sum().backward()
    gradient = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    return torch.stack([log_probs, entropy]).detach(), gradient


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=0)
    assert actual[1].keys() == expected[1].keys()
    norm = torch.stack([g.norm() for g in expected[1].values()]).norm()
    for name, gradient in expected[1].items():
        assert (actual[1][name] - gradient).norm() < 1e-5 * norm, name


def test_sequence_by_sequence_equals_the_masked_attention(
    masked: PolicyModel, varlen: PolicyModel, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(masked, batch)
    masks = []

    def spied(*args: Any, attn_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        masks.append(attn_mask)
        return sdpa(*args, attn_mask=attn_mask, **kwargs)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spied)
    assert_same(run(varlen, batch), expected)
    assert masks and all(m is None for m in masks)
    run(masked, batch)
    assert any(m is not None for m in masks)


def test_the_kernel_gets_segments_flags_and_scale(
    masked: PolicyModel, varlen: PolicyModel, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(masked, batch)
    kernel = Kernel()
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_kernel_takes", lambda query: True)
    assert_same(run(varlen, batch), expected)
    config = varlen.model.config
    vision, text = config.vision_config, config.text_config
    images = len(batch.image_grids)
    assert text.num_attention_heads > text.num_key_value_heads  # grouped keys are in the test
    causal = [c for c in kernel.calls if c["window_size"] == (-1, 0)]
    both_ways = [c for c in kernel.calls if c["window_size"] == (-1, -1)]
    assert [c["segments"] for c in causal] == [5] * text.num_hidden_layers
    assert len(both_ways) == vision.depth
    for block, call in enumerate(both_ways):
        whole = block in vision.fullatt_block_indexes
        assert call["segments"] == images if whole else call["segments"] > images
    assert {c["scale"] for c in causal} == {(text.hidden_size // text.num_attention_heads) ** -0.5}


def test_the_kernel_is_for_half_precision_on_a_gpu() -> None:
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert not attention._kernel_takes(half)
    if torch.cuda.is_available():
        assert attention._kernel_takes(half.cuda()) and not attention._kernel_takes(half.cuda().float())


def test_recomputed_activations_change_nothing(
    workspace: Workspace, varlen: PolicyModel, batch: PackedBatch
) -> None:
    policy = make_policy(workspace, "varlen")
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    assert_same(run(policy, batch), run(varlen, batch))


def test_padding_is_refused(varlen: PolicyModel) -> None:
    with pytest.raises(ValueError, match="no padding"):
        varlen.model(input_ids=torch.ones(1, 4, dtype=torch.int64), attention_mask=torch.ones(1, 4))


def test_layers_with_a_sliding_window_keep_their_mask(workspace: Workspace, tmp_path: Path) -> None:
    model = shutil.copytree(workspace.path / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["text_config"]["layer_types"]  # as in files of older releases
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
    (model / "config.json").write_text(json.dumps(config))
    loaded = load_model(ModelConfig(path=str(model)), torch.float32)
    assert loaded.config.text_config._attn_implementation == "sdpa"
    with pytest.raises(UserError, match="sliding window"):
        load_model(ModelConfig(path=str(model), attn_implementation="varlen"), torch.float32)
