"""Qwen3.5: a state that stays within its sequence, in the pass and in the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mssr.data.prompt_source import PromptSource
from mssr.models.loading import load_model
from mssr.models.packing import PackItem, pack
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
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


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_state_stays_in_its_sequence(qwen3_5: Workspace, attention: str) -> None:
    """Packed, log-probs are those of a plain model that gets one at a time, and gradients are its sum."""
    section = replace(load_config(qwen3_5.config).model, attn_implementation=attention)
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
