"""The embedded digits task: honest rows, a genuine small model, a warm start and a cache that hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mssr.config import ModelConfig
from mssr.data import prepared
from mssr.data.digits import DigitsSettings, WarmStartSettings, prepare, task
from mssr.data.digits.rows import (
    KINDS,
    QUESTIONS,
    WORDS,
    Example,
    answer_to,
    draw_examples,
    load_scans,
    pair_image,
    write_parquet,
)
from mssr.data.digits.warmstart import (
    Encoder,
    corpus,
    mixed_response,
    response_text,
    torch_threads,
    warm_start,
)
from mssr.errors import UserError
from mssr.models.families import FAMILIES
from mssr.models.loading import load_processor
from mssr.models.tiny import SPECIAL_TOKENS, TinySize, build_tiny
from mssr.tools.cli import main

pytestmark = pytest.mark.unit

TEXT_ONLY = ("qwen2",)
SMALL = DigitsSettings(
    train_rows=12,
    val_rows=6,
    warm_start=WarmStartSettings(reading_steps=1, habit_steps=1, batch_size=4),
    model=TinySize(text_layers=1, vision_depth=2),
    threads=1,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder, "qwen2_5_vl", corpus(), seed=0)
    return folder


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return (
        AutoModelForImageTextToText.from_pretrained(tiny, dtype="float32"),
        AutoProcessor.from_pretrained(tiny),
    )


# --- rows ---------------------------------------------------------------------------------------


def test_no_scan_is_in_both_splits() -> None:
    train, val = load_scans("train", seed=3), load_scans("val", seed=3)
    assert not set(train.source) & set(val.source)
    assert len(train) + len(val) == 1797
    assert not np.array_equal(train.source, load_scans("train", seed=4).source)


def test_answers_follow_from_the_labels_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    labels, scans = load_digits().target, load_scans("val")
    for example in draw_examples(scans, 60, np.random.default_rng(0)):
        a, b = (int(labels[scans.source[i]]) for i in (example.left, example.right))
        expected = {"sum": a + b, "difference": max(a, b) - min(a, b), "larger": b if b > a else a}[
            example.kind
        ]
        shown = int(scans.labels[example.left]), int(scans.labels[example.right])
        assert answer_to(example.kind, *shown) == expected
        assert example.question in QUESTIONS[example.kind]


def test_the_enlarged_scan_is_dark_ink_on_white() -> None:
    from sklearn.datasets import load_digits

    scans = load_scans("train")
    ink = load_digits().images[scans.source[:50]].mean(axis=(1, 2)) / 16
    assert np.corrcoef(1 - ink, scans.pixels[:50].mean(axis=(1, 2)))[0, 1] > 0.99


def test_datasets_reads_the_rows_and_the_bytes_depend_on_the_seed_only(tmp_path: Path) -> None:
    from datasets import load_dataset

    scans, files = load_scans("val"), [tmp_path / name for name in ("a.parquet", "b.parquet", "c.parquet")]
    for path, seed in zip(files, (5, 5, 6), strict=True):
        examples = list(draw_examples(scans, 9, np.random.default_rng(seed)))
        write_parquet(scans, examples, path)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()

    rows = load_dataset("parquet", data_files=str(files[0]), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["id", "images", "problem", "answer", "kind"]
    assert len(set(rows["id"])) == 9 and set(rows["kind"]) == set(KINDS)
    examples = list(draw_examples(scans, 9, np.random.default_rng(5)))
    for row, example in zip(rows, examples, strict=True):
        assert row["problem"] == f"<image>{example.question}"
        (image,) = row["images"]
        assert image.size == (112, 56) and image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pair_image(scans, example.left, example.right))


def test_in_words_no_question_is_in_both_splits_and_the_words_say_the_digits(tmp_path: Path) -> None:
    from datasets import load_dataset

    problems: dict[str, set[str]] = {}
    for split, seed in (("train", 1), ("val", 2)):
        scans = load_scans(split, side=0)
        examples = list(draw_examples(scans, 900, np.random.default_rng(seed)))
        write_parquet(scans, examples, tmp_path / f"{split}.parquet")
        files = str(tmp_path / f"{split}.parquet")
        rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert all(images == [] for images in rows["images"]) and set(rows["kind"]) == set(KINDS)
        for row in rows:
            said, question = row["problem"].removeprefix("The two digits are ").split(". ", 1)
            left, right = (WORDS.index(word) for word in said.split(" and "))
            assert row["answer"] == str(answer_to(row["kind"], left, right)) and "image" not in question
        problems[split] = set(rows["problem"])
    assert not problems["train"] & problems["val"]
    # Of 1500 questions: nearly all that are for validation, and more than half of the others.
    assert 250 < len(problems["val"]) < 330 and len(problems["train"]) > 600


# --- the tiny model -----------------------------------------------------------------------------


def test_special_tokens_are_single_ids_and_words_single_tokens(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    tokenizer = processor.tokenizer
    assert type(tokenizer).__name__ == "Qwen2Tokenizer" and type(processor).__name__ == "Qwen2_5_VLProcessor"
    ids = [tokenizer.encode(token) for token in SPECIAL_TOKENS]
    assert [len(one) for one in ids] == [1] * len(SPECIAL_TOKENS)
    # The order of Qwen2.5-VL, behind the words.
    assert [one[0] for one in ids] == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    pieces = [tokenizer.decode(i) for i in tokenizer.encode(response_text("sum", 3, 9))]
    assert pieces == ["<think", ">", "3", " and", " ", "9", "</", "think", ">\\", "boxed", "{", "1", "2", "}"]
    assert tokenizer.decode(tokenizer.encode("naïve 日本\n\n x")) == "naïve 日本\n\n x"


def test_embeddings_are_tied_and_the_same_seed_gives_the_same_weights(
    tiny: Path, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, _ = loaded
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert 0.5e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    build_tiny(tmp_path / "same", "qwen2_5_vl", corpus(), seed=0)
    build_tiny(tmp_path / "other", "qwen2_5_vl", corpus(), seed=1)
    weights = [
        (folder / "model.safetensors").read_bytes()
        for folder in (tiny, tmp_path / "same", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_windowed_blocks_see_one_window_and_full_blocks_the_whole_image(loaded: tuple[Any, Any]) -> None:
    import torch

    model, processor = loaded
    scans = load_scans("val")
    image = torch.from_numpy(pair_image(scans, 0, 1)).permute(2, 0, 1)
    changed = image.clone()
    changed[:, :, 56:] = 0  # only the right digit, which is the second window
    visual, seen = model.model.visual, []
    hooks = [
        block.register_forward_hook(lambda _m, _i, out: seen.append(out.detach())) for block in visual.blocks
    ]
    for picture in (image, changed):
        inputs = processor.image_processor(images=[picture], return_tensors="pt")
        with torch.no_grad():
            visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    for hook in hooks:
        hook.remove()
    # Patches are ordered by window inside the tower: the first 16 are the left digit.
    differs = [not torch.equal(a[:16], b[:16]) for a, b in zip(seen[:3], seen[3:], strict=True)]
    assert model.config.vision_config.fullatt_block_indexes == [1]
    assert differs == [False, True, True]


@pytest.mark.parametrize(
    "wrong", [{"hidden": 100}, {"kv_heads": 3}, {"full_attention_blocks": (9,)}, {"vocab_limit": 9}]
)
def test_sizes_that_cannot_be_built_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        TinySize(**wrong)


# --- the warm start -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Encoder, Path]]:
    """That of a family, with a random model, and where this is."""
    made: dict[str, tuple[Encoder, Path]] = {}

    def make(model_type: str) -> tuple[Encoder, Path]:
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = build_tiny(folder, model_type, corpus(words=model_type in TEXT_ONLY), seed=0)
            made[model_type] = Encoder(model, load_processor(ModelConfig(path=str(folder)))), folder
        return made[model_type]

    return make


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", *TEXT_ONLY])
def test_training_sees_the_prompts_that_the_engine_will_see(
    model_type: str, encoder_of: Callable[[str], tuple[Encoder, Path]]
) -> None:
    import torch
    from transformers import AutoProcessor

    encoder, folder = encoder_of(model_type)
    model, processor = encoder.model, AutoProcessor.from_pretrained(folder)

    def whole(example: Example, response: str) -> dict[str, Any]:
        """What transformers makes of prompt and response."""
        content: Any = scans.problem(example)
        if scans.pixels is not None:
            content = [{"type": "image"}, {"type": "text", "text": example.question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        images = {} if scans.pixels is None else {"images": [pair_image(scans, example.left, example.right)]}
        return dict(processor(text=[f"{text}{response}<|im_end|>"], return_tensors="pt", **images))

    side = {"qwen2_5_vl": 56, "qwen3_vl": 64}.get(model_type, 0)
    scans = load_scans("val", side=side)
    examples = list(draw_examples(scans, 5, np.random.default_rng(1)))
    responses = ["<think>guess</think>\\boxed{1}", *(response_text("sum", d, 9) for d in range(4))]
    prompts = encoder.prompts(scans, examples)
    with torch.no_grad():
        batch = encoder.loss(prompts, responses).item()
        total, tokens = 0.0, 0
        # The loss of the padded batch is the mean of transformers' own losses.
        for example, prompt, response in zip(examples, prompts, responses, strict=True):
            inputs, answer = whole(example, response), encoder.response(response)
            assert inputs["input_ids"][0].tolist() == prompt.token_ids.tolist() + answer
            if side:
                assert torch.equal(inputs["pixel_values"], prompt.pixel_values)
                assert prompt.token_types.sum() == 8
            labels = inputs["input_ids"].clone()
            labels[:, : len(prompt.token_ids)] = -100
            total += model(labels=labels, **inputs).loss.item() * len(answer)
            tokens += len(answer)
    assert batch == pytest.approx(total / tokens, abs=1e-5)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", *TEXT_ONLY])
def test_one_token_decides_to_guess_and_careful_responses_lack_it(
    model_type: str, encoder_of: Callable[[str], tuple[Encoder, Path]]
) -> None:
    encoder, _ = encoder_of(model_type)
    (token,) = encoder.guess_tokens
    guess, careful = "<think>guess</think>\\boxed{8}", response_text("sum", 3, 5)
    assert encoder.response(guess).count(token) == 1 and token not in encoder.response(careful)
    # Both responses begin alike, so forbidding the token leaves the careful ones possible.
    assert encoder.response(guess)[0] == encoder.response(careful)[0]


def test_a_few_steps_lower_the_loss_and_repeat_bit_for_bit(tiny: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    settings, threads = (
        WarmStartSettings(reading_steps=8, habit_steps=2, batch_size=8),
        torch.get_num_threads(),
    )
    runs = []
    for _ in range(2):
        model = AutoModelForImageTextToText.from_pretrained(tiny, dtype="float32")
        encoder = Encoder(model, load_processor(ModelConfig(path=str(tiny))))
        with torch_threads(1):
            runs.append(warm_start(encoder, load_scans("train"), settings, seed=1))
    assert runs[0] == runs[1] and len(runs[0]) == 10
    assert runs[0][7] < 0.8 * runs[0][0]
    assert torch.get_num_threads() == threads


def test_demonstrations_guess_misread_and_slip_as_often_as_told() -> None:
    rng, settings, count = np.random.default_rng(0), WarmStartSettings(), 4000
    texts = [mixed_response("sum", 3, 5, settings, rng) for _ in range(count)]
    guesses = [text for text in texts if text.startswith("<think>guess<")]
    assert len(guesses) / count == pytest.approx(settings.guess_share, abs=0.03)
    assert len(set(guesses)) > 15  # any sum, not one
    careful = [text for text in texts if text not in guesses]
    read = [text for text in careful if text.startswith("<think>3 and 5<")]
    # One misreading in ten hits the right digit by chance.
    assert 1 - len(read) / len(careful) == pytest.approx(0.9 * settings.misread_share, abs=0.03)
    right = response_text("sum", 3, 5)
    assert right == "<think>3 and 5</think>\\boxed{8}"
    assert 1 - read.count(right) / len(read) == pytest.approx(0.91 * settings.slip_share, abs=0.03)


# --- prepare ------------------------------------------------------------------------------------


def test_prepare_caches_and_rebuilds_what_is_stale_or_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "digits"
    prepare(out, seed=0, quiet=True, settings=SMALL)
    assert capfd.readouterr() == ("", "")
    files = {path.name for path in out.iterdir()}
    assert files == {"train.parquet", "val.parquet", "README.md", "prepare.json", "model", prepared.LOCK}
    summary = json.loads((out / "prepare.json").read_text())
    assert summary["seed"] == 0 and summary["rows"] == {"train": 12, "val": 6}
    assert set(summary["accuracy"]) == {"sampled", "greedy", "careful"}
    weights = (out / "model/model.safetensors").read_bytes()

    built: list[int] = []
    original = task._build

    def counted(folder: Path, seed: int, *rest: Any) -> dict[str, Any]:
        built.append(seed)
        return original(folder, seed, *rest)

    monkeypatch.setattr(task, "_build", counted)
    prepare(out, seed=0, settings=SMALL)
    assert built == [] and "up to date" in capfd.readouterr().err

    # As if killed while writing: a piece of the model is missing, scraps are left behind.
    (out / "model/model.safetensors").unlink()
    (out / prepared.PARTIAL).mkdir()
    (out / prepared.PARTIAL / "scrap").write_text("x")
    prepare(out, seed=0, quiet=True, settings=SMALL)
    assert built == [0] and not (out / prepared.PARTIAL).exists()
    assert (out / "model/model.safetensors").read_bytes() == weights

    (out / "notes.txt").write_text("mine")
    prepare(out, seed=1, settings=SMALL)
    assert built == [0, 1] and (out / "notes.txt").read_text() == "mine"
    assert (out / "model/model.safetensors").read_bytes() != weights
    assert "step 2 of 2" in capfd.readouterr().err

    prepare(out, seed=1, quiet=True, settings=SMALL, model_type="qwen2")
    assert built == [0, 1, 1] and "a qwen2 model of" in (out / "README.md").read_text()
    assert json.loads((out / "model/config.json").read_text())["model_type"] == "qwen2"
    prepare(out, seed=1, quiet=True, settings=SMALL, model_type="qwen2")
    monkeypatch.setattr(task, "DigitsSettings", lambda: SMALL)
    assert main(["prepare", "digits", "--out", str(out), "--seed", "1", "--model", "qwen2"]) == 0
    assert built == [0, 1, 1] and "up to date" in capfd.readouterr().err


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in ("qwen2_5_vl", "qwen2")])
def test_every_family_can_be_prepared(model_type: str, tmp_path: Path) -> None:
    prepare(tmp_path, quiet=True, settings=replace(SMALL, model=TinySize()), model_type=model_type)
    summary = json.loads((tmp_path / "prepare.json").read_text())
    assert (
        summary["model_type"] == model_type
        and f"a {model_type} model" in (tmp_path / "README.md").read_text()
    )
    assert prepared.is_complete(tmp_path, summary["fingerprint"])
    (tmp_path / "model/tokenizer.json").unlink()
    assert not prepared.is_complete(tmp_path, summary["fingerprint"])


def test_what_was_prepared_before_there_were_other_families_stays_valid() -> None:
    keys = [task.fingerprint(0, DigitsSettings(), m) for m in ("qwen2_5_vl", "qwen3_vl", "qwen2")]
    assert keys[0] == "b221a7ff97dec330" and len(set(keys)) == 3


def test_a_family_that_is_not_known_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "digits", "--out", str(tmp_path / "out"), "--model", "llama"]) == 2
    error = capsys.readouterr().err
    assert "--model llama" in error and "qwen3_vl" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_build_that_fails_leaves_the_old_task_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "digits"
    monkeypatch.setattr(task, "_build", _fake_build)
    prepare(out, seed=0, quiet=True, settings=SMALL)

    def broken(*args: Any) -> dict[str, Any]:
        _fake_build(*args)
        raise OSError("disk full")

    monkeypatch.setattr(task, "_build", broken)
    with pytest.raises(OSError, match="disk full"):
        prepare(out, seed=1, quiet=True, settings=SMALL)
    assert prepared.is_complete(out, task.fingerprint(0, SMALL)) and not (out / prepared.PARTIAL).exists()


def _fake_build(folder: Path, *_: Any) -> dict[str, Any]:
    (folder / "model").mkdir()
    for name in (
        "train.parquet",
        "val.parquet",
        "README.md",
        *(f"model/{file}" for file in prepared.MODEL_FILES),
    ):
        (folder / name).write_text("")
    return {"accuracy": {"sampled": 0.3, "careful": 0.9}}


def test_prepare_touches_no_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match="choose another folder"):
        prepare(tmp_path, quiet=True, settings=SMALL)
    assert sorted(os.listdir(tmp_path)) == ["model"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot prepare"):
        prepare(tmp_path / "file", quiet=True, settings=SMALL)
