"""What the benchmarks of the update run on: shapes of Qwen2.5-VL and lengths like Vision-R1's, also as files.

The shapes are those of the published configs of Qwen2.5-VL-3B-Instruct and -7B-Instruct, and `tiny` one for
tests. The weights are random: what an update costs does not depend on them. Lengths are log-normal responses
of mean 500, at most 4096, and prompts of 300 to 1500 tokens, all but some 40 to 160 of them an image's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from mssr.models import tiny
from mssr.models.families import FAMILIES, Family
from mssr.models.tiny import TinySize

RESPONSE_MEAN, RESPONSE_LIMIT, SIGMA, PROMPT, TEXT = 500, 4096, 0.8, (300, 1500), (40, 160)
VISION: dict[str, Any] = {
    "vision_hidden": 1280,
    "vision_mlp": 3420,
    "vision_depth": 32,
    "vision_heads": 16,
    "full_attention_blocks": (7, 15, 23, 31),
    "window": 112,
    "max_positions": 128000,
}
MIDDLING: dict[str, Any] = {
    "vision_hidden": 256,
    "vision_mlp": 768,
    "vision_depth": 8,
    "vision_heads": 4,
    "full_attention_blocks": (3, 7),
    "window": 112,
}
SHAPES = {
    "tiny": TinySize(vision_depth=4, full_attention_blocks=(3,), window=112),
    "20m": TinySize(hidden=256, mlp=1024, text_layers=8, heads=8, **MIDDLING),
    "60m": TinySize(hidden=512, mlp=1536, text_layers=10, heads=8, **MIDDLING),
    "200m": TinySize(hidden=1024, mlp=2816, text_layers=12, heads=8, **MIDDLING),
    "3b": TinySize(hidden=2048, mlp=11008, text_layers=36, heads=16, kv_heads=2, **VISION),
    "7b": TinySize(hidden=3584, mlp=18944, text_layers=28, heads=28, kv_heads=4, **VISION),
}
VOCABULARY = {"tiny": 512, "20m": 16384, "60m": 32768, "200m": 65536, "3b": 151936, "7b": 152064}
CELL = 28  # pixels, the side of what becomes one token: 2 x 2 patches of 14


def make_tokenizer() -> Any:
    """A few hundred tokens, the lowest ids of the vocabulary; the others decode to nothing."""
    return tiny.train_tokenizer(["0 1 2 3 4 5 6 7 8 9"], 256)


def family_and_size(name: str) -> tuple[Family, str]:
    """Of "20m", which is a Qwen2.5-VL, or "20m-qwen3_vl"."""
    size, _, model_type = name.partition("-")
    return FAMILIES[model_type or "qwen2_5_vl"], size


def model_config(name: str) -> transformers.PreTrainedConfig:
    """A Qwen2.5-VL in the shape of the 3B or 7B one, or a smaller one, for the tokens of `make_tokenizer`; or
    one of another family."""
    family, size = family_and_size(name)
    config = family.tiny_config(make_tokenizer().get_vocab(), SHAPES[size])
    config.text_config.vocab_size = VOCABULARY[size]
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = size != "7b"
    return config


def write_model(directory: Path, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights, drawn on a device, in a Hugging Face directory, with `make_tokenizer`."""
    tokenizer, config = make_tokenizer(), model_config(name)
    end = [config.text_config.eos_token_id, config.text_config.pad_token_id]
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    model.generation_config = transformers.GenerationConfig(eos_token_id=end, pad_token_id=end[1])
    pixels = {"shortest_edge": 56 * 56, "longest_edge": CELL * CELL * 2 * PROMPT[1]}
    directory.mkdir(parents=True, exist_ok=True)
    tiny.save_quietly(model, directory)
    family_and_size(name)[0].tiny_processor(tokenizer, pixels).save_pretrained(directory)


def draw_lengths(prompts: int, n: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(prompts,) prompt lengths and (prompts * n,) response lengths."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(*PROMPT, prompts)
    response = rng.lognormal(math.log(RESPONSE_MEAN) - SIGMA**2 / 2, SIGMA, prompts * n)
    response = np.minimum(np.maximum(response, 8), RESPONSE_LIMIT)
    return np.maximum(prompt * scale, 40).astype(int), np.maximum(response * scale, 2).astype(int)


def write_rows(directory: Path, lengths: np.ndarray, scale: float, template: int = 12) -> Path:
    """A JSONL file of prompts "0", "1", ... of about so many tokens, each with a JPEG image of its own.

    Args:
        lengths: (B,) tokens of the prompts, as `draw_lengths` gives them.
        template: tokens that the chat template adds.
    """
    rng = np.random.default_rng(1)
    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for k, length in enumerate(lengths.tolist()):
        digits = max(int(rng.integers(*TEXT) * scale), 4)
        cells = max(length - digits - template, 4)
        height = int(cells**0.5)
        # A few colours, enlarged: as smooth as photographs are, and no two alike.
        colours = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        image = colours.resize((cells // height * CELL, height * CELL), Image.Resampling.BICUBIC)
        image.save(images / f"{k}.jpg", quality=90)
        question = "".join(map(str, rng.integers(0, 10, digits)))
        row = {"id": str(k), "images": [str(images / f"{k}.jpg")], "problem": question, "answer": "1"}
        rows.append(json.dumps(row))
    file = directory / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    return file
