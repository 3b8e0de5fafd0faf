"""Weights are read on one rank, and handed out part by part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mssr.actor.initial_weights import InitialWeights
from mssr.errors import UserError
from mssr.models.loading import load_model
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_without_memory_becomes_the_one_that_was_loaded(workspace: Workspace) -> None:
    """Buffers that no file holds included, tied weights tied, and every part in its turn."""
    config = load_config(workspace.config).model
    loaded = load_model(config, torch.float32)
    weights = InitialWeights(lambda: loaded, 0, CPU)
    for last in (False, True):
        model = load_model(config, torch.float32, empty=True)
        assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
        model.model.language_model.norm.to(torch.bfloat16)
        model.lm_head.requires_grad_(False)
        fill = weights.filler(model, last)
        layer = model.model.language_model.layers[0]
        fill(layer)
        assert not any(p.is_meta for p in layer.parameters()) and model.lm_head.weight.is_meta
        fill(model)
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        assert not model.lm_head.weight.requires_grad and layer.mlp.up_proj.weight.requires_grad
        assert model.model.language_model.norm.weight.dtype == torch.bfloat16
        buffers, expected = dict(model.named_buffers()), dict(loaded.named_buffers())
        assert buffers.keys() == expected.keys() and buffers
        assert all(torch.equal(buffers[n], expected[n]) for n in buffers)
        for name, value in loaded.state_dict().items():
            assert torch.equal(model.state_dict()[name].float(), value)
        assert not model.training
        assert bool(weights._tensors) is not last  # nothing is kept that no one needs


def test_other_ranks_read_nothing_and_hear_of_what_is_wrong() -> None:
    def load() -> nn.Module:
        raise UserError("model.path: damaged")

    InitialWeights(load, 1, CPU)
    with pytest.raises(UserError, match="damaged"):
        InitialWeights(load, 0, CPU)
