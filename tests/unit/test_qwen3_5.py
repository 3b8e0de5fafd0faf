"""Qwen3.5: a state that stays within its sequence, in the pass and in the gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mssr.data.prompt_source import PromptSource
from mssr.errors import UserError
from mssr.models.families import qwen3_5 as family
from mssr.models.loading import load_model
from mssr.models.packing import PackItem, pack
from mssr.models.policy import PolicyModel
from mssr.rollout.vllm_engine import vllm_options
from mssr.runs.config import load_config
from mssr.trainer.session import _introduce
from tests.conftest import Workspace

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def qwen3_5(workspace_of: Callable[[str], Workspace]) -> Workspace:
    return workspace_of("qwen3_5")


def items(workspace: Workspace, policy: PolicyModel) -> list[PackItem]:
    """With one image, two and none; of lengths below and above the 64 tokens of a chunk."""
    source = PromptSource(load_config(workspace.config))
    generator = torch.Generator().manual_seed(0)
    found = []
    for prompt_id, length in (("t0", 3), ("t1", 90), ("t2", 17), ("t1", 1)):
        prompt = source.encoder.encode(source.row(prompt_id))
        response = torch.randint(0, 250, (length,), generator=generator)
        found.append(PackItem(prompt, policy.rope_positions(prompt), response))
    return found


def plain_log_probs(model: torch.nn.Module, item: PackItem, banned: list[int]) -> torch.Tensor:
    """What transformers computes of a sequence by itself, in a model without anything of ours."""
    types = torch.cat([item.prompt.token_types, torch.zeros(len(item.response), dtype=torch.int32)])
    out = model(
        input_ids=torch.cat([item.prompt.token_ids, item.response])[None],
        pixel_values=item.prompt.pixel_values,
        image_grid_thw=item.prompt.image_grid_thw,
        mm_token_type_ids=types[None],
        use_cache=False,
    )
    model.model.rope_deltas = None
    logits = out.logits[0, len(item.prompt.token_ids) - 1 : -1]
    logits = logits.index_fill(1, torch.tensor(banned), float("-inf"))
    return torch.log_softmax(logits, dim=-1).gather(1, item.response[:, None])[:, 0]


def test_a_state_stays_in_its_sequence(qwen3_5: Workspace) -> None:
    """Packed, log-probs are those of a plain model that gets one at a time, and gradients are its sum."""
    section = load_config(qwen3_5.config).model
    plain = load_model(section, torch.float32, packed=False)
    policy = PolicyModel(load_model(section, torch.float32))
    sequences = items(qwen3_5, policy)

    def run(*packs: list[PackItem]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        policy.zero_grad()
        log_probs = torch.cat([policy(pack(some, policy.merge_size))[0] for some in packs])
        log_probs.square().sum().backward()
        return log_probs.detach(), {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}

    log_probs, gradients = run(sequences)
    with torch.no_grad():
        expected = [plain_log_probs(plain, item, policy.banned_ids) for item in sequences]
    torch.testing.assert_close(log_probs, torch.cat(expected), atol=1e-5, rtol=0)
    _, apart = run(*([item] for item in sequences))
    assert gradients.keys() == apart.keys() == dict(policy.named_parameters()).keys()
    for name, gradient in gradients.items():
        # That of a decay is a small sum of large parts.
        scale = apart[name].abs().max()
        torch.testing.assert_close(gradient / scale, apart[name] / scale, atol=1e-3, rtol=0, msg=name)


def test_native_kernels_would_be_told_the_sequences(
    qwen3_5: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins with the arguments of those packages, of which none is here: nothing shows that they work."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    torch_conv, torch_rule = modeling.causal_conv1d_fn, modeling.torch_chunk_gated_delta_rule
    calls = {"conv": 0, "rule": 0}

    def causal_conv1d_fn(
        x: torch.Tensor, weight: torch.Tensor, bias: None = None, seq_idx: Any = None, activation: str = ""
    ) -> torch.Tensor:
        assert x.stride(1) == 1 and seq_idx.dtype == torch.int32 and seq_idx.shape == (1, x.shape[2])
        calls["conv"] += 1
        _, lengths = seq_idx[0].unique_consecutive(return_counts=True)
        parts = x.split(lengths.tolist(), dim=2)
        return torch.cat([torch_conv(part, weight, bias, activation=activation) for part in parts], dim=2)

    def chunk_gated_delta_rule(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: None = None,
        output_final_state: bool = True,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Any = None,
    ) -> tuple[torch.Tensor, None]:
        assert len(q) == 1 and cu_seqlens.dtype == torch.int64 and not output_final_state
        calls["rule"] += 1
        lengths = cu_seqlens.diff().tolist()
        split = zip(*(x.split(lengths, dim=1) for x in (q, k, v, g, beta)), strict=True)
        outs = [torch_rule(*part, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)[0] for part in split]
        return torch.cat(outs, dim=1), None

    policy = PolicyModel(load_model(load_config(qwen3_5.config).model, torch.float32))
    batch = pack(items(qwen3_5, policy), policy.merge_size)
    with torch.no_grad():
        expected = policy(batch)[0]
        for name, kernel in (
            ("causal_conv1d_fn", causal_conv1d_fn),
            ("torch_chunk_gated_delta_rule", chunk_gated_delta_rule),
        ):
            taken = inspect.signature(kernel).parameters
            # As transformers calls what it has found: without the arguments that it does not take.
            monkeypatch.setattr(
                modeling, name, lambda *x, k=kernel, t=taken, **o: k(*x, **{n: o[n] for n in o if n in t})
            )
        monkeypatch.setattr(family, "_kernels_on", lambda device: True)
        torch.testing.assert_close(policy(batch)[0], expected, atol=1e-5, rtol=0)
    assert calls == {"conv": 3, "rule": 3}


def test_vllm_gets_what_it_needs_or_is_refused(qwen3_5: Workspace, workspace: Workspace) -> None:
    def options(device: str, *overrides: str, of: Workspace = qwen3_5) -> dict[str, Any]:
        return vllm_options(load_config(of.config, list(overrides)), device, colocated=False)

    for device in ("cpu", "cuda"):
        assert options(device, "model.dtype=bfloat16")["enable_prefix_caching"] is False
        assert "enable_prefix_caching" not in options(device, of=workspace)
    own = "rollout.engine_options={enable_prefix_caching: true}"
    assert options("cuda", own)["enable_prefix_caching"] is True
    with pytest.raises(UserError, match=r"^model\.dtype: .*bfloat16.*rollout\.engine=hf$"):
        options("cpu")


def test_a_run_says_once_that_it_is_experimental(qwen3_5: Workspace, workspace: Workspace) -> None:
    for made, expected in ((qwen3_5, True), (workspace, False)):
        encoder = PromptSource(load_config(made.config)).encoder
        said: list[str] = []
        console = SimpleNamespace(announce=said.append, note=lambda line: None)
        data = SimpleNamespace(encoder=encoder, notes=[], item_notes=[], config=load_config(made.config))
        data.train, data.val = SimpleNamespace(summary=str), []
        _introduce(data, console)  # type: ignore[arg-type]
        assert ["experimental" in line for line in said] == [True] * expected
