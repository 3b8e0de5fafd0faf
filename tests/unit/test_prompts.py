"""How a row becomes the text that the model gets."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mssr.data import encoder as encoder_module
from mssr.data.encoder import PromptEncoder
from mssr.data.images import ImageSource
from mssr.data.rows import Row
from mssr.errors import UserError
from mssr.models.encoded import EncodedPrompt
from mssr.models.loading import load_processor
from mssr.models.packing import split_images
from mssr.runs.config import load_config
from tests.conftest import Workspace
from tests.unit.data_forms import encoded

pytestmark = pytest.mark.unit
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
MSSR_CODE_TEMPLATE = (
    "{% if '<image>' not in content %}<image>\n{% endif %}{{ content | trim }} Think in <think> </think>."
)


def encoder(workspace: Workspace, **data: Any) -> PromptEncoder:
    config = load_config(workspace.config)
    for key, value in data.items():
        setattr(config.data, key, value)
    return PromptEncoder(load_processor(config.model), config.data)


def row(problem: str, images: int = 1) -> Row:
    return Row("a", problem, "8", (ImageSource(b"", None),) * images, "rows.jsonl row 0")


def test_images_come_first_unless_marked(workspace: Workspace) -> None:
    plain = encoder(workspace)
    assert f"{IMAGE}{IMAGE}What?" in plain.chat_text(row("What?", 2))
    assert f"Left {IMAGE} right {IMAGE}?" in plain.chat_text(row("Left <image> right <image>?", 2))
    assert IMAGE not in plain.chat_text(row("What?", 0))


def test_the_instruction_follows_the_question(workspace: Workspace) -> None:
    assert "What?\nBox it.<|im_end|>" in encoder(workspace, instruction="Box it.").chat_text(row("What?"))


@pytest.mark.parametrize("inline", [True, False])
def test_a_prompt_template_takes_the_place_of_the_instruction(
    workspace: Workspace, tmp_path: Path, inline: bool
) -> None:
    path = tmp_path / "math.jinja"
    path.write_text(MSSR_CODE_TEMPLATE)
    template = encoder(
        workspace, prompt_template=MSSR_CODE_TEMPLATE if inline else str(path), instruction="unread"
    )
    text = template.chat_text(row("  What?  "))
    assert f"{IMAGE}  What? Think in <think> </think>.<|im_end|>" in text and "unread" not in text
    assert f"So {IMAGE}? Think" in template.chat_text(row("So <image>?"))
    with pytest.raises(ValueError, match="1 <image> marks but 0 images"):
        template.chat_text(row("What?", 0))  # this template adds a mark where there is none


def test_a_system_prompt_and_a_chat_template_from_files(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("You are careful.")
    system = encoder(workspace, system_prompt=str(tmp_path / "system.txt"))
    assert "system\nYou are careful.<|im_end|>" in system.chat_text(row("What?"))
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{% for c in m.content %}"
        "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %}[go]"
    )
    other = encoder(workspace, chat_template=str(tmp_path / "chat.jinja"))
    assert other.chat_text(row("What?")) == f"[user]{IMAGE}What?[go]"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("prompt_template", "nowhere.jinja", "data.prompt_template: there is no file nowhere.jinja"),
        ("system_prompt", "nowhere.txt", "data.system_prompt: there is no file"),
        ("chat_template", "nowhere.jinja", "data.chat_template: there is no file"),
        ("prompt_template", "{{ content", "data.prompt_template cannot be rendered"),
        ("prompt_template", "{{ question }}", "'question' is undefined"),
        ("prompt_template", "Think.", "leaves the question out"),
        ("prompt_template", "{{ content.__class__.__mro__ }}", "cannot be rendered"),
    ],
)
def test_a_wrong_template_is_refused(workspace: Workspace, option: str, value: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        encoder(workspace, **{option: value})


def test_placeholders_are_counted_after_every_template(workspace: Workspace) -> None:
    """A template or a system prompt that adds or drops one would make engine and actor count differently."""
    user = "{% for m in messages %}{% for c in m.content %}{{ c.text if c.type == 'text' else '' }}"
    blind = encoder(workspace, chat_template=user + "{% endfor %}{% endfor %}")
    assert blind.chat_text(row("What?", 0)) == "What?"
    with pytest.raises(ValueError, match=r"1 image, 0 placeholders after data\.chat_template"):
        blind.chat_text(row("What?"))
    system = encoder(workspace, system_prompt="See <|vision_start|><|image_pad|><|vision_end|>.")
    with pytest.raises(ValueError, match="2 images, 3 placeholders after the model's chat template"):
        system.chat_text(row("What?", 2))
    strict = encoder(
        workspace,
        chat_template=user + "{{ raise_exception('no') if c.text == 'bad' }}{% endfor %}{% endfor %}",
    )
    with pytest.raises(ValueError, match=r"data\.chat_template cannot be rendered: no"):
        strict.chat_text(row("bad", 0))
    moody = encoder(workspace, prompt_template="{{ content }}{{ 1 / (content | length - 3) }}")
    with pytest.raises(ValueError, match=r"data\.prompt_template cannot be rendered"):
        moody.chat_text(row("bad", 0))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "cannot be rendered.*list of parts"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "1 image, 0 placeholders"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", "1 image, 0 placeholders"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves the question out"),
        ("{{ messages", "cannot be rendered"),
    ],
)
def test_a_chat_template_that_cannot_be_meant(workspace: Workspace, template: str, words: str) -> None:
    with pytest.raises(UserError, match=f"data.chat_template .*{words}") as error:
        encoder(workspace, chat_template=template)
    assert "\n" not in str(error.value)


def test_what_of_the_prompt_belongs_to_the_response(workspace: Workspace) -> None:
    parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    opening = "{% if add_generation_prompt %}assistant\n<think>\n{% endif %}"
    assert encoder(workspace).response_prefix == ""  # the instruction may name the tag
    assert encoder(workspace, chat_template=parts + opening).response_prefix == "<think>\n"
    assert encoder(workspace, chat_template=parts + "<think>").response_prefix == "<think>"
    closed = "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
    assert encoder(workspace, chat_template=parts + closed).response_prefix == "<think>\n\n</think>\n\n"
    assert encoder(workspace, chat_template="<think>" + parts).response_prefix == ""


def test_every_size_is_one_that_a_model_sees(workspace: Workspace) -> None:
    """Strips, dots and whatever bounds: multiples of a patch, at least one; shrunk enough."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        width, height = (int(2 ** rng.uniform(0, 13)) for _ in range(2))
        low = int(2 ** rng.uniform(2, 18))
        bounds = {"min_pixels": low, "max_pixels": int(low * 2 ** rng.uniform(0, 8))}
        resizing = SimpleNamespace(_factor=28, config=SimpleNamespace(**bounds))
        if max(width, height) > 200 * min(width, height):
            with pytest.raises(ValueError, match="aspect ratio"):
                PromptEncoder.resized(resizing, width, height)  # type: ignore[arg-type]
            continue
        w, h = PromptEncoder.resized(resizing, width, height)  # type: ignore[arg-type]
        assert min(w, h) >= 28 and w % 28 == h % 28 == 0
        if width * height > bounds["max_pixels"]:
            assert w * h <= max(bounds["max_pixels"], 28 * 28), (width, height, bounds)


def test_strips_are_encoded_in_that_size(workspace: Workspace) -> None:
    plain = encoder(workspace)
    for width, height in ((1990, 10), (10, 1990), (8190, 41), (1, 1)):
        data = encoded("PNG", Image.new("RGB", (width, height)))
        strip = dataclasses.replace(row("What?"), images=(ImageSource(data, None),))
        (image,) = plain.images(strip)
        prompt = plain.encode(strip)
        assert prompt.image_grid_thw is not None
        assert prompt.image_grid_thw.tolist() == [[1, image.height // 14, image.width // 14]]
        assert len(prompt.token_ids) == plain.length(strip, [(width, height)])


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"])
def test_a_question_that_spells_a_vision_token_is_refused(workspace: Workspace, token: str) -> None:
    """Engine and actor would count one image more than there is."""
    with pytest.raises(ValueError, match="stands for pixels"):
        encoder(workspace).chat_text(row(f"What is {token}?"))


def test_lengths_from_sizes_equal_encoded_lengths(workspace: Workspace) -> None:
    from mssr.data.prompt_source import PromptSource

    source = PromptSource(load_config(workspace.config))
    for prompt_id in ("t0", "t1", "t2", "t3"):
        item = source.row(prompt_id)
        sizes = [image.size() for image in item.images]
        assert source.encoder.length(item, sizes) == len(source.encoder.encode(item).token_ids)


def test_encoded_prompts_are_what_the_processor_makes_of_them(workspace: Workspace) -> None:
    """Two, one and no image; equal images, and no others, have the same key."""
    from mssr.data.prompt_source import PromptSource

    source = PromptSource(load_config(workspace.config))
    encoder = source.encoder
    keys: dict[bytes, bytes] = {}
    for prompt_id in [f"t{k}" for k in range(8)]:
        item = source.row(prompt_id)
        images = encoder.images(item)
        expected = encoder.processor.loaded(
            text=[encoder.chat_text(item)], images=images or None, return_tensors="pt"
        )
        ours = encoder.encode(item)
        assert torch.equal(ours.token_ids, expected["input_ids"][0])
        assert torch.equal(ours.token_types, expected["mm_token_type_ids"][0].int())
        assert (ours.pixel_values is None) == (not images) == (ours.image_keys == ())
        if ours.pixel_values is not None and ours.image_grid_thw is not None:
            assert torch.equal(ours.pixel_values, expected["pixel_values"])
            assert torch.equal(ours.image_grid_thw, expected["image_grid_thw"])
            assert ours.normalizer is not None and ours.pixels is not None
            for_engine = ours.normalizer(ours.pixels, torch.bfloat16)
            assert torch.equal(for_engine, expected["pixel_values"].bfloat16())
        for image, key in zip(images, ours.image_keys, strict=True):
            assert keys.setdefault(key, image.tobytes()) == image.tobytes()
        assert encoder.encode(item).image_keys == ours.image_keys
    assert len(keys) == 8  # of t0, t1, t3, t4, t5 and t7; t2 and t6 have none


@pytest.mark.parametrize("chunk", [1, 20_000, 2**20])
def test_many_prompts_are_encoded_as_each_alone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """However many go together; and none holds the memory of others."""
    from mssr.data.prompt_source import PromptSource

    source = PromptSource(load_config(workspace.config))
    rows = [source.row(f"t{k}") for k in range(8)]
    alone = [source.encoder.encode(row) for row in rows]
    calls = []
    processor = source.encoder.processor.image_processor
    monkeypatch.setattr(encoder_module, "CHUNK_PIXELS", chunk)
    preprocess = type(processor).preprocess
    monkeypatch.setattr(type(processor), "preprocess", lambda *a, **k: calls.append(0) or preprocess(*a, **k))
    together = source.encoder.encode_all(rows)
    with_images = sum(bool(row.images) for row in rows)
    if chunk == 20_000:
        assert 1 < len(calls) < with_images
    else:
        assert len(calls) == {1: with_images, 2**20: 1}[chunk]
    for a, b in zip(alone, together, strict=True):
        assert_equal(a, b)
        assert b.pixels is None or b.pixels.untyped_storage().nbytes() == b.pixels.nbytes
    assert source.encoder.encode_all([]) == []


def test_an_image_of_several_prompts_is_cut_and_kept_once(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one go or one after the other, as long as there is room; and what comes of it is the same."""
    from mssr.data.prompt_source import PromptSource

    config = load_config(workspace.config)
    source = PromptSource(config)
    first, second = source.row("t0"), source.row("t1")
    shown = {
        "a": first,
        "b": dataclasses.replace(first, problem="And this?"),
        "c": dataclasses.replace(first, images=first.images + second.images, problem="Both?"),
        "d": second,
    }
    alone = {i: source.encoder.encode(row) for i, row in shown.items()}
    cut: list[bytes] = []
    cut_images = PromptEncoder._cut
    monkeypatch.setattr(
        PromptEncoder, "_cut", lambda self, new, kept: (cut.extend(new), cut_images(self, new, kept))[1]
    )

    def ask(source: PromptSource, *requests: str) -> None:
        monkeypatch.setattr(source, "row", shown.__getitem__)
        cut.clear()
        for ids in requests:
            for prompt_id, prompt in zip(ids, source.get(list(ids)), strict=True):
                assert_equal(prompt, alone[prompt_id])

    images = {key for prompt in alone.values() for key in prompt.image_keys}
    for requests in (["abcd"], ["a", "b", "c", "d"], ["d", "cb", "a", "abcd"]):
        ask(PromptSource(config), *requests)
        assert len(cut) == len(images) and set(cut) == images
    pixels = {
        key: part.nbytes
        for prompt in alone.values()
        for key, part in zip(prompt.image_keys, split_images(prompt), strict=True)
    }
    prompts = sum(dataclasses.replace(prompt, pixels=None).nbytes for prompt in alone.values())
    config.data.image_cache_gib = (prompts + sum(pixels.values()) + 1024 * len(pixels)) / 2**30
    ask(PromptSource(config), "abcd", "abcd")  # it all fits, because none is there twice
    assert len(cut) == len(images)
    config.data.image_cache_gib = 0.0
    ask(PromptSource(config), "a", "b", "abcd")
    assert len(cut) > len(images)


def test_threads_encode_at_the_same_time_and_nothing_twice(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that one is at work on the others wait for, and get its error."""
    from mssr.data.prompt_source import PromptSource

    source = PromptSource(load_config(workspace.config))
    alone = {f"t{k}": source.encoder.encode(source.row(f"t{k}")) for k in range(4)}
    both, encode_all = threading.Barrier(2, timeout=60), source.encoder.encode_all
    encoded: list[int] = []

    def together(rows: list[Row], kept: Any) -> list[EncodedPrompt]:
        encoded.append(len(rows))
        both.wait()  # never both here unless they encode at the same time
        return encode_all(rows, kept)

    monkeypatch.setattr(source.encoder, "encode_all", together)
    with ThreadPoolExecutor(2) as pool:
        asked = [["t0", "t1", "t0"], ["t1", "t2", "t3"]]
        for ids, prompts in zip(asked, pool.map(source.get, asked), strict=True):
            for i, prompt in zip(ids, prompts, strict=True):
                assert_equal(prompt, alone[i])
    assert sum(encoded) == 4

    def broken(rows: list[Row], kept: Any) -> list[EncodedPrompt]:
        if rows:
            both.wait()
            raise UserError("broken")
        both.wait()
        return []

    monkeypatch.setattr(source.encoder, "encode_all", broken)
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(source.get, ["t4"]) for _ in range(2)]:
            with pytest.raises(UserError, match="broken"):
                future.result()
    monkeypatch.setattr(source.encoder, "encode_all", encode_all)
    assert len(source.get(["t4", "t5"])) == 2


def test_a_prompt_survives_the_way_to_another_process(workspace: Workspace) -> None:
    from mssr.data.prompt_source import PromptSource

    source = PromptSource(load_config(workspace.config))
    for prompt in source.get([f"t{k}" for k in range(4)]):
        arrays = prompt.arrays()
        for array in arrays:
            if isinstance(array, np.ndarray):
                array.flags.writeable = False  # as in Ray's object store
        got = EncodedPrompt.from_arrays(arrays)
        assert_equal(got, prompt)
        assert got.token_ids.data_ptr() != prompt.token_ids.data_ptr()


def assert_equal(a: EncodedPrompt, b: EncodedPrompt) -> None:
    for name in EncodedPrompt.__slots__:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y), name
        else:
            assert x == y, name


def test_only_new_prompts_of_training_are_given_out_and_only_once(workspace: Workspace) -> None:
    from mssr.data.prompt_source import PromptSource

    config = load_config(workspace.config, [f"data.val={workspace.path / 'train.parquet'}"])
    source = PromptSource(config)
    prompts = source.get(["t0", "t1", "val/t2", "t0"])
    assert prompts[3] is prompts[0]
    assert source.take_new(["t0", "val/t2", "t5"]) == {"t0": prompts[0]}
    source.get(["t0", "t3"])
    assert list(source.take_new(["t0", "t1", "t3"])) == ["t1", "t3"]
    assert source.take_new(["t0", "t1", "t3"]) == {}
    config.data.image_cache_gib = 0
    source = PromptSource(config)
    source.get(["t0"])
    assert source.take_new(["t0"]) == {}  # it is kept no longer


def test_the_recent_prompts_are_kept_encoded(workspace: Workspace) -> None:
    """As many as data.image_cache_gib holds, pixels as bytes."""
    from mssr.data.prompt_source import PromptSource

    config = load_config(workspace.config)
    sizes = {k: PromptSource(config).get([k])[0].nbytes for k in ("t0", "t1", "t2")}
    config.data.image_cache_gib = (sum(sizes.values()) - 1) / 2**30
    source = PromptSource(config)
    first, second = source.get(["t0", "t1"])
    for prompt_id, prompt in (("t0", first), ("t1", second)):
        [kept] = source.get([prompt_id])
        assert kept.token_ids is prompt.token_ids
        assert_equal(kept, prompt)
    source.get(["t2"])  # no room for all three: t0 was used least recently
    assert source.get(["t1"])[0].token_ids is second.token_ids
    again = source.get(["t0"])[0]
    assert again.token_ids is not first.token_ids and torch.equal(again.token_ids, first.token_ids)
    assert again.pixels is not None and first.pixels is not None and first.pixel_values is not None
    assert torch.equal(again.pixels, first.pixels) and first.pixels.dtype == torch.uint8
    assert sizes["t0"] == 4096 + 8 * len(first.token_ids) + first.pixel_values.numel() // 2
