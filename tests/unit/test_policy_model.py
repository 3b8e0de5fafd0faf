"""Packed forward pass, fused head, banned tokens: numbers against the plain computation."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mssr.data.prompt_source import PromptSource
from mssr.models.head import Head, token_log_probs_and_entropy
from mssr.models.loading import load_model
from mssr.models.packing import PackedBatch, PackItem, pack, split_images
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
from tests.conftest import Workspace

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def policy(workspace: Workspace) -> PolicyModel:
    return PolicyModel(load_model(load_config(workspace.config).model, torch.float32), temperature=0.7)


@pytest.fixture(scope="module")
def items(workspace: Workspace, policy: PolicyModel) -> list[PackItem]:
    """Prompts with one, two and no image of different sizes, one prompt twice, with random responses."""
    source = PromptSource(load_config(workspace.config))
    generator = torch.Generator().manual_seed(0)
    result = []
    for k, prompt_id in enumerate(["t0", "t1", "t2", "t3", "t1", "t5"]):
        prompt = source.encoder.encode(source.row(prompt_id))
        response = torch.randint(0, 250, (3 + 2 * k,), generator=generator)
        result.append(PackItem(prompt, policy.rope_positions(prompt), response))
    return result


def plain_log_probs(policy: PolicyModel, item: PackItem) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers computes for one sequence by itself, with its own position ids and no packing."""
    types = torch.cat([item.prompt.token_types, torch.zeros(len(item.response), dtype=torch.int32)])
    out = policy.model(
        input_ids=torch.cat([item.prompt.token_ids, item.response])[None],
        pixel_values=item.prompt.pixel_values,
        image_grid_thw=item.prompt.image_grid_thw,
        mm_token_type_ids=types[None],
        use_cache=False,
    )
    policy.model.model.rope_deltas = None
    logits = out.logits[0, len(item.prompt.token_ids) - 1 : -1] / policy.temperature
    logits[:, policy.banned_ids] = float("-inf")
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0)).sum(-1)
    return log_p.gather(1, item.response[:, None])[:, 0], entropy


def test_linear_patch_embed_is_the_convolution(policy: PolicyModel, items: list[PackItem]) -> None:
    embed = copy.deepcopy(policy.model.model.visual.patch_embed).double()
    batch = pack(items, policy.merge_size)
    assert batch.normalizer is not None and batch.pixels is not None
    pixels = batch.normalizer(batch.pixels)
    results = []
    for forward in (embed, lambda x: type(embed).forward(embed, x)):
        out = forward(pixels)
        (gradient,) = torch.autograd.grad(out.square().sum(), embed.proj.weight)
        results.append((out, gradient))
    for linear, convolution in zip(*results, strict=True):
        assert linear.dtype == torch.float64
        torch.testing.assert_close(linear, convolution)


def test_packed_equals_one_by_one(policy: PolicyModel, items: list[PackItem]) -> None:
    with torch.no_grad():
        log_probs, entropy = policy(pack(items, policy.merge_size))
        expected = [plain_log_probs(policy, item) for item in items]
    torch.testing.assert_close(log_probs, torch.cat([e[0] for e in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, torch.cat([e[1] for e in expected]), atol=1e-5, rtol=0)


def test_the_image_matters(policy: PolicyModel, items: list[PackItem]) -> None:
    """Otherwise the test above would pass with images mixed up."""
    batch = pack(items, policy.merge_size)
    assert batch.pixels is not None
    changed = PackedBatch(
        **{
            name: (batch.pixels.flip(0) if name == "pixels" else getattr(batch, name))
            for name in PackedBatch.__slots__
        }
    )
    with torch.no_grad():
        assert (policy(batch)[0] - policy(changed)[0]).abs().max() > 1e-2


def test_positions_of_images_are_those_that_transformers_works_out(policy: PolicyModel) -> None:
    """Windows whole and cut, several frames, sizes that come again."""
    from transformers import vision_utils

    visual = policy.model.model.visual
    grids = [(1, 8, 4), (1, 4, 4), (1, 6, 10), (2, 14, 2), (1, 8, 4), (1, 2, 2)]
    for some in (grids, grids[::-1], grids[2:3]):
        thw = torch.tensor(some)
        ours = policy.family.tower_positions(visual, some, torch.device("cpu"))
        merge = visual.spatial_merge_size
        index, windows = vision_utils.get_vision_window_index(
            thw, merge, visual.window_size, visual.patch_size
        )
        expected = {
            "position_ids": vision_utils.get_vision_position_ids(thw, merge),
            "window_index": index,
            "cu_window_seqlens": windows,
            "cu_seqlens": vision_utils.get_vision_cu_seqlens(thw),
        }
        for name, tensor in expected.items():
            assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
        assert ours["max_seqlen"] == expected["cu_seqlens"].diff().max()
        assert ours["max_window_seqlen"] == windows.diff().max()
        assert ours.keys() - expected.keys() == {"max_seqlen", "max_window_seqlen"}


def test_nothing_of_an_image_is_worked_out_in_a_pass(
    policy: PolicyModel, items: list[PackItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names of the arguments are those that transformers looks for."""
    from transformers import vision_utils

    batch = pack(items, policy.merge_size)
    with torch.no_grad():
        before = policy(batch)[0]
        for name in ("F", "torch"):  # what its functions work with
            monkeypatch.setattr(vision_utils, name, None)
        assert torch.equal(policy(batch)[0], before)


def test_each_distinct_image_reaches_the_tower_once(policy: PolicyModel, items: list[PackItem]) -> None:
    """In two responses to a prompt, in two prompts, and twice in one prompt."""
    batch = pack(items, policy.merge_size)
    patches: list[int] = []
    handle = policy.model.model.visual.register_forward_pre_hook(lambda _, args: patches.append(len(args[0])))
    with torch.no_grad():
        once = policy(batch)[0]
        apart = torch.cat([policy(pack([item], policy.merge_size))[0] for item in items])
    handle.remove()
    distinct = {
        k: len(x) for i in items for k, x in zip(i.prompt.image_keys, split_images(i.prompt), strict=True)
    }
    # t0 and t3 have one image, t1 (twice in the batch) and t5 two, t2 none.
    assert len(distinct) == 1 + 2 + 1 + 2
    assert patches[0] == sum(distinct.values()) < sum(patches[1:])
    assert len(batch.feature_index) == sum(patches[1:]) // policy.merge_size**2
    torch.testing.assert_close(once, apart, atol=1e-5, rtol=0)

    first = items[0]
    other_question = replace(first, prompt=replace(first.prompt, token_ids=first.prompt.token_ids.flip(0)))
    both, alone = (pack(x, policy.merge_size) for x in ([first, other_question], [first]))
    assert both.pixels is not None and alone.pixels is not None
    assert torch.equal(both.pixels, alone.pixels)


def test_touching_vision_changes_nothing_but_gives_it_a_gradient(
    policy: PolicyModel, items: list[PackItem]
) -> None:
    text_only = pack([items[2]], policy.merge_size)
    assert text_only.pixels is None
    with torch.no_grad():
        expected = policy(text_only)[0]
    touched = policy(text_only, touch_vision=True)[0]
    assert torch.equal(touched, expected)
    touched.sum().backward()
    grads = [p.grad for p in policy.model.model.visual.parameters()]
    assert all(g is not None and not g.any() for g in grads)
    policy.zero_grad()


def test_vision_placeholders_have_probability_zero(policy: PolicyModel, items: list[PackItem]) -> None:
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
