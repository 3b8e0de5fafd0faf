"""The head of a policy: banned tokens, and digits of the entropy."""

from __future__ import annotations

import pytest
import torch

from mssr.models.head import Head, token_log_probs_and_entropy
from mssr.models.loading import load_model
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def policy(workspace: Workspace) -> PolicyModel:
    return PolicyModel(load_model(load_config(workspace.config).model, torch.float32), temperature=0.7)


def test_vision_placeholders_have_probability_zero(policy: PolicyModel) -> None:
    """Even when the head shouts for one."""
    image_pad = policy.model.config.image_token_id
    assert image_pad in policy.banned_ids and policy.model.config.video_token_id in policy.banned_ids
    hidden = torch.randn(5, 8)
    weight = torch.randn(600, 8)
    weight[image_pad] = 1000 * hidden[0]
    targets = torch.tensor([image_pad, 3, 4, 5, 6])
    head = Head(banned=policy.banned_ids)
    log_probs, entropy = token_log_probs_and_entropy(hidden, weight, targets, head)
    assert log_probs[0] < -1e20
    assert torch.isfinite(log_probs[1:]).all() and torch.isfinite(entropy).all()


def test_entropy_keeps_its_digits_where_logits_are_large() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 16, generator=generator), torch.randn(500, 16, generator=generator)
    hidden, weight = (
        torch.cat([hidden, torch.ones(8, 1)], 1),
        torch.cat([weight, torch.full((500, 1), 300.0)], 1),
    )
    _, entropy = token_log_probs_and_entropy(hidden, weight, torch.zeros(8, dtype=torch.int64))
    log_p = torch.log_softmax((hidden @ weight.T).double(), dim=-1)  # of the same rounded logits
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), atol=2e-5, rtol=0)
