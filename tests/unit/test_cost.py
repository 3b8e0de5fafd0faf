"""The cost of a sequence, against torch's own count of operations in the real model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mssr.data.prompt_source import PromptSource
from mssr.models.cost import UNIT, CostModel
from mssr.models.families import FAMILIES
from mssr.models.loading import import_transformers
from mssr.models.published import read_shape, shape_of
from mssr.models.tiny import TinySize, train_tokenizer
from mssr.runs.config import load_config
from mssr.types import TrainBatch
from tests.conftest import CORPUS, Workspace

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def vocabulary() -> dict[str, int]:
    return train_tokenizer(CORPUS).get_vocab()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_formula_counts_what_torch_counts(model_type: str, vocabulary: dict[str, int]) -> None:
    family = FAMILIES[model_type]
    config = family.tiny_config(vocabulary, TinySize())
    kind = getattr(import_transformers(), family.auto_class)
    # torch counts no products of groups.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = kind.from_config(config, **plain).eval()
    shape = shape_of(model.config.to_dict())
    cost, length = CostModel(shape), 320

    def count(run: torch.nn.Module, **inputs: torch.Tensor) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(**inputs)
        return counter.get_total_flops()

    text, width = family.language_model(model), shape.text_config.hidden_size
    once, twice = (count(text, inputs_embeds=torch.zeros(1, n, width)) for n in (length, 2 * length))
    # What grows with the square of the length is attention, of which torch counts all pairs of tokens.
    attention = (twice - 2 * once) / 2
    assert length**2 * cost.per_square == pytest.approx(attention / 2, rel=0.01)
    assert length * cost.per_token == pytest.approx(once - attention, rel=0.01)
    actual = cost.text(np.array([length]), np.array([0]))[0] * UNIT / 3
    assert actual == pytest.approx(once - attention / 2, rel=0.01)
    assert cost.per_response_token == 2 * model.lm_head.weight.numel()
    with_head = cost.text(np.array([length]), np.array([length]))[0] * UNIT / 3
    assert with_head - actual == pytest.approx(length * cost.per_response_token, abs=2 * UNIT)

    if (vision := shape.vision_config) is None:
        assert cost.images_forward(np.array([64])) == 0
        return
    for side in (4, 16, 24):  # an image of one window, and of several
        pixels = torch.zeros(side * side, vision.patch_values)
        operations = count(
            family.tower(model), hidden_states=pixels, grid_thw=torch.tensor([[1, side, side]])
        )
        actual = cost.images_forward(np.array([side * side]))[0]
        assert actual == pytest.approx(operations, rel=0.01)
    trained, frozen = (CostModel(shape, train).images(np.array([side * side]))[0] for train in (True, False))
    assert trained * UNIT == pytest.approx(3 * actual, rel=0.01)
    assert frozen * UNIT == pytest.approx(actual, rel=0.01)


def test_images_are_found_in_the_tokens(workspace: Workspace) -> None:
    config = load_config(workspace.config)
    source = PromptSource(config)
    ids = ("t0", "t1", "t2", "t1")  # one image, two, none, two
    prompts = [source.encoder.encode(source.row(i)) for i in ids]
    tokens = [np.concatenate([p.token_ids.numpy(), np.arange(3)]).astype(np.int32) for p in prompts]
    batch = TrainBatch(
        prompt_ids=ids,
        tokens=np.concatenate(tokens),
        offsets=np.concatenate([[0], np.cumsum([len(t) for t in tokens])]),
        prompt_lengths=np.array([len(t) - 3 for t in tokens]),
        advantages=np.zeros(4, np.float32),
        engine_log_probs=np.zeros(12, np.float32),
    )
    cost = CostModel(read_shape(config.model))
    work = cost.work(batch)
    for prompt, image_cost in zip(prompts, work.image_cost, strict=True):
        grids = prompt.image_grid_thw
        sizes = np.zeros(0, np.int64) if grids is None else grids.prod(-1).numpy()
        assert image_cost == cost.images(sizes).sum()
    assert work.image_cost[2] == 0 < work.image_cost[0]
    assert work.prompts.tolist() == [0, 1, 2, 1]
