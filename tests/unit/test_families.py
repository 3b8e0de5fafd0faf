"""What every family must show, against transformers' own model of it, one sequence at a time."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mssr.config import LoraConfig
from mssr.data.encoder import PromptEncoder
from mssr.data.images import ImageSource
from mssr.data.rows import Row
from mssr.models import attention
from mssr.models.bounded_cache import BoundedCache
from mssr.models.families import FAMILIES
from mssr.models.loading import import_transformers, load_model, load_processor
from mssr.models.lora import adapted_layers, add_adapters, full_weights
from mssr.models.packing import PackedBatch, PackItem, pack, split_images
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
from tests.conftest import Workspace
from tests.unit.test_attention import Kernel, assert_same, run

pytestmark = pytest.mark.unit

SEEING = [name for name, family in FAMILIES.items() if family.tower_name]
TEMPERATURE = 0.7
Picture = tuple[int, int, int]
"""Width, height and which one of that size."""
PROMPTS: list[list[str | Picture]] = [
    [(112, 56, 0), "What is the sum of the two digits?"],
    ["Compare ", (56, 56, 0), " with ", (84, 140, 0), ", please."],
    ["Of text alone."],
    [(112, 112, 0), (56, 84, 0), "Next to each other."],
    ["First ", (56, 56, 1), ", and once more ", (56, 56, 1), ": the same?"],
    ["At the end: ", (56, 56, 0)],
    ["Of text alone, and longer than the other one."],
]


class Lab:
    """A tiny model of a family as transformers loads it and as it is trained, and prompts with responses."""

    def __init__(self, workspace: Workspace) -> None:
        self.config = load_config(workspace.config)
        processor = load_processor(self.config.model)
        self.family = processor.family
        self.encoder = PromptEncoder(processor, self.config.data)
        # float32 rounds more than 1e-5 off where a state adds it up: transformers' own model, too.
        self.dtype = torch.float64 if self.family.experimental else torch.float32
        path, transformers = self.config.model.path, import_transformers()
        kind = getattr(transformers, self.family.auto_class)
        self.plain = kind.from_pretrained(path, dtype=torch.float32).to(self.dtype).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(path)
        self.policy = self.load()
        sees = self.family.tower_name is not None
        self.prompts = [[part for part in prompt if sees or isinstance(part, str)] for prompt in PROMPTS]
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for k, prompt in enumerate(self.encoder.encode_all([row_of(prompt) for prompt in self.prompts])):
            response = torch.randint(0, 250, (3 + 2 * k,), generator=generator)
            self.items.append(PackItem(prompt, self.policy.rope_positions(prompt), response))
        self.batch = self.packed(range(len(self.items)))

    def load(self, implementation: str = "auto") -> PolicyModel:
        section = dataclasses.replace(self.config.model, attn_implementation=implementation)
        return PolicyModel(load_model(section, torch.float32).to(self.dtype), TEMPERATURE)

    def packed(self, which: Any) -> PackedBatch:
        return pack([self.items[k] for k in which], self.policy.merge_size)

    def run_plain(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As `run`, by transformers alone."""
        self.plain.zero_grad()
        parts = [self.score(k) for k in range(len(self.items))]
        log_probs, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
        (log_probs * torch.linspace(-1, 1, len(log_probs)) + 0.3 * entropy).sum().backward()
        named = self.plain.named_parameters()
        gradient = {f"model.{n}": p.grad for n, p in named if p.grad is not None}
        return torch.stack([log_probs, entropy]).detach(), gradient

    def score(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(T,) log-probs and entropies of a response."""
        prompt, response = self.prompts[k], self.items[k].response
        pictures = self.encoder.images(row_of(prompt))
        more: dict[str, Any] = {"images": pictures, "do_resize": False} if pictures else {}
        content: Any = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in prompt
        ]
        if self.family.tower_name is None:
            content = "".join(map(str, prompt))
        turns, options = [{"role": "user", "content": content}], {"add_generation_prompt": True}
        text = self.processor.apply_chat_template(turns, tokenize=False, **options)
        inputs = dict(self.processor(text=[text], return_tensors="pt", **more))
        del inputs["attention_mask"]
        types = inputs.get("mm_token_type_ids")
        if types is not None:
            inputs["mm_token_type_ids"] = torch.cat([types[0], torch.zeros_like(response)])[None]
        p = inputs["input_ids"].shape[1]
        assert torch.equal(inputs["input_ids"][0], self.items[k].prompt.token_ids)
        inputs["input_ids"] = torch.cat([inputs["input_ids"][0], response])[None]
        logits = self.plain(**inputs, use_cache=False).logits[0, p - 1 : -1] / TEMPERATURE
        if hasattr(self.plain.model, "rope_deltas"):
            self.plain.model.rope_deltas = None
        logits[:, self.policy.banned_ids] = float("-inf")
        log_p = torch.log_softmax(logits, dim=-1)
        entropy = -(log_p.exp() * log_p.masked_fill(log_p.isinf(), 0)).sum(-1)
        return log_p.gather(1, response[:, None])[:, 0], entropy


def row_of(prompt: list[str | Picture]) -> Row:
    problem = "".join(part if isinstance(part, str) else "<image>" for part in prompt)
    images = tuple(ImageSource(png(*part), None) for part in prompt if not isinstance(part, str))
    return Row("a", problem, "8", images, "row 0")


@functools.cache
def png(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def lab_of(workspace_of: Callable[[str], Workspace]) -> Callable[[str], Lab]:
    return functools.cache(lambda name: Lab(workspace_of(name)))


@pytest.fixture(params=FAMILIES)
def lab(request: pytest.FixtureRequest, lab_of: Callable[[str], Lab]) -> Lab:
    """Of every family."""
    return lab_of(request.param)


@pytest.fixture(params=SEEING)
def seeing(request: pytest.FixtureRequest, lab_of: Callable[[str], Lab]) -> Lab:
    """Of every family that sees images."""
    return lab_of(request.param)


@pytest.mark.parametrize("implementation", ["auto", "sdpa"])
def test_packed_equals_one_by_one(lab: Lab, implementation: str) -> None:
    """Log-probs, entropies and gradients: several images of several sizes, adjacent ones, one twice, none."""
    policy = lab.policy if implementation == "auto" else lab.load(implementation)
    assert_same(run(policy, lab.batch), lab.run_plain())


def test_the_kernel_of_a_gpu_is_told_the_sequences(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, kernel = run(lab.policy, lab.batch), Kernel()
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "_kernel_takes", lambda query: True)
    assert_same(run(lab.policy, lab.batch), expected)
    causal = [call for call in kernel.calls if call["window_size"] == (-1, 0)]
    assert causal and {call["segments"] for call in causal} == {len(lab.items)}


def test_recomputed_activations_give_the_same_gradients(lab: Lab) -> None:
    policy = lab.load()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    policy.model.train()
    again = []
    policy.layers[0].register_forward_pre_hook(lambda *_: again.append(1))
    (values, gradient), (expected, expected_gradient) = run(policy, lab.batch), run(lab.policy, lab.batch)
    assert len(again) == 2 and torch.equal(values, expected)
    assert gradient.keys() == expected_gradient.keys()
    assert all(torch.equal(g, expected_gradient[n]) for n, g in gradient.items())


def test_adapters_are_in_the_language_model_alone(lab: Lab) -> None:
    policy = lab.load()
    names = policy.model.state_dict().keys()
    add_adapters(policy.model, LoraConfig(rank=2), seed=0)
    layers = adapted_layers(policy.model)
    prefix = f"{lab.family.language_model_name}.layers."
    per_layer = {name.removeprefix(prefix).partition(".")[0] for name in layers}
    assert all(name.startswith(prefix) for name in layers) and len(per_layer) == len(policy.layers)
    assert {name.rpartition(".")[2] for name in layers} >= set("q_proj k_proj v_proj o_proj".split())
    values, gradient = run(policy, lab.batch)
    assert torch.equal(values, run(lab.policy, lab.batch)[0])  # every B is 0
    assert len(gradient) == 2 * len(layers)
    assert dict(full_weights(policy.model)).keys() == names


# --- images ------------------------------------------------------------------------------------------------


def test_all_that_an_image_gives_matters(seeing: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pixels, and what goes to deeper layers. Otherwise the above would pass with images mixed up."""
    policy, batch, family = seeing.policy, seeing.batch, seeing.family
    assert batch.pixels is not None
    features_of, width = family.features, family.text_config(policy.model.config).hidden_size
    widths: set[int] = set()

    def without(part: int, output: Any) -> torch.Tensor:
        features = features_of(output).clone()
        widths.add(features.shape[1])
        features[:, part * width : (part + 1) * width] = 0
        return features

    with torch.no_grad():
        expected = policy(batch)[0]
        changed = policy(dataclasses.replace(batch, pixels=batch.pixels.flip(0)))[0]
        assert (changed - expected).abs().max() > 1e-2
        vision = family.shape(policy.model.config.to_dict()).vision_config
        assert vision is not None
        for part in range(1 + vision.levels):
            monkeypatch.setattr(family, "features", functools.partial(without, part))
            assert (policy(batch)[0] - expected).abs().max() > 1e-2, part
    assert widths == {width * (1 + vision.levels)}


def test_each_distinct_image_reaches_the_tower_once(seeing: Lab) -> None:
    """In two responses to a prompt, in two prompts, and twice in one prompt."""
    which, seen = [0, 1, 2, 4, 1, 5], []
    handle = seeing.policy.tower.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = seeing.packed(which)
    with torch.no_grad():
        together = seeing.policy(batch)[0]
        apart = torch.cat([seeing.policy(seeing.packed([k]))[0] for k in which])
    handle.remove()
    prompts = [seeing.items[k].prompt for k in which]
    distinct = {
        key: len(pixels)
        for prompt in prompts
        for key, pixels in zip(prompt.image_keys, split_images(prompt), strict=True)
    }
    assert len(distinct) == 4 and seen[0] == sum(distinct.values()) < sum(seen[1:])
    shown = sum(len(prompt.pixels) for prompt in prompts if prompt.pixels is not None)
    assert len(batch.feature_index) == shown // seeing.policy.merge_size**2
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_linear_patch_embed_is_the_convolution(seeing: Lab) -> None:
    def embed(tower: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = tower.patch_embed.double()(pixels)
        (gradient,) = torch.autograd.grad(out.square().sum(), tower.patch_embed.proj.weight)
        return out, gradient

    assert seeing.batch.normalizer is not None and seeing.batch.pixels is not None
    pixels = seeing.batch.normalizer(seeing.batch.pixels)
    plain = seeing.family.tower(copy.deepcopy(seeing.plain))
    linear, convolution = embed(seeing.load().tower), embed(plain)
    for ours, theirs in zip(linear, convolution, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs)


GRIDS = [(1, 8, 4), (1, 4, 4), (1, 6, 10), (2, 14, 2), (1, 8, 4), (1, 2, 2)]
"""Windows whole and cut, several frames, sizes that come again."""


@pytest.mark.parametrize("grids", [GRIDS, GRIDS[::-1], GRIDS[2:3]], ids=["all", "reversed", "one"])
def test_positions_in_images_are_those_that_transformers_works_out(
    seeing: Lab, monkeypatch: pytest.MonkeyPatch, grids: list[Any]
) -> None:
    """All that its functions return where the tower calls them, given and not given to it."""
    tower = seeing.policy.tower
    module, found = sys.modules[type(tower).__module__], []

    def recorded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found.append(function(*args, **kwargs))
        return found[-1]

    for name in [name for name in vars(module) if name.startswith(("get_vision_", "get_max_seqlen"))]:
        monkeypatch.setattr(module, name, functools.partial(recorded, getattr(module, name)))
    thw = torch.tensor(grids)
    weight = tower.patch_embed.proj.weight
    pixels = torch.randn(int(thw.prod(-1).sum()), weight[0].numel(), dtype=weight.dtype)
    positions = seeing.family.tower_positions(tower, grids, torch.device("cpu"))
    results = []
    with torch.no_grad():
        for known in ({}, positions):
            output = tower(pixels, grid_thw=thw, **known)
            results.append([seeing.family.features(output), *flat(found)])
            found.clear()
    assert len(results[0]) == len(results[1]) >= 1 + len(positions)
    for theirs, ours in zip(*results, strict=True):
        assert type(theirs) is type(ours)
        same = torch.equal(theirs, ours) if isinstance(ours, torch.Tensor) else theirs == ours
        assert same and getattr(theirs, "dtype", None) == getattr(ours, "dtype", None)


def flat(values: Any) -> list[Any]:
    return [x for value in values for x in flat(value)] if isinstance(values, list | tuple) else [values]


def test_nothing_of_an_image_is_worked_out_in_a_pass(seeing: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the arguments are those that transformers looks for."""
    from transformers import vision_utils

    with torch.no_grad():
        before = seeing.policy(seeing.batch)[0]
        for name in ("F", "torch"):  # what its functions work with
            monkeypatch.setattr(vision_utils, name, None)
        assert torch.equal(seeing.policy(seeing.batch)[0], before)


def test_touching_vision_changes_nothing_but_gives_it_a_gradient(lab: Lab) -> None:
    """All of the tower, so that ranks with images and without have gradients of the same parameters."""
    text_only = lab.packed([2, 6])
    assert text_only.pixels is None
    policy, expected = lab.policy, run(lab.policy, text_only)[0]
    policy.zero_grad()
    log_probs, entropy = policy(text_only, touch_vision=True)
    assert torch.equal(torch.stack([log_probs, entropy]), expected)
    log_probs.sum().backward()
    gradients = [p.grad for p in policy.tower.parameters()] if policy.tower else []
    assert bool(gradients) == (lab.family.tower_name is not None)
    assert all(g is not None and not g.any() for g in gradients)
    policy.zero_grad()


def test_features_of_a_frozen_tower_are_kept(seeing: Lab) -> None:
    policy = seeing.load()
    policy.tower.requires_grad_(False)
    expected = run(policy, seeing.batch)
    policy.features = BoundedCache(2**24)
    assert_same(run(policy, seeing.batch), expected)
    assert all(policy.features.get(key) is not None for key in seeing.batch.image_keys)
    policy.tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    assert_same(run(policy, seeing.batch), expected)


def test_placeholders_have_probability_zero(seeing: Lab) -> None:
    tokenizer = seeing.encoder.processor.tokenizer
    tokens = list(seeing.encoder.processor.vision_tokens)
    assert len(tokens) == 4
    assert set(seeing.policy.banned_ids) == set(tokenizer.convert_tokens_to_ids(tokens))
