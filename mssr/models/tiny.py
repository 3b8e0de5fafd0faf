"""A real Qwen2.5-VL of about a million parameters, with random weights and a tokenizer of its own.

Everything is the genuine article, only small: window attention in the vision tower, multimodal rope,
tied embeddings, the byte-level BPE of Qwen2 with all its special tokens, the chat template, the image
and video processors. What runs with it runs with Qwen2.5-VL-7B, so the tests and the embedded tasks
use it. It is built in about a second, from a text corpus, without a network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mssr.errors import UserError
from mssr.models.files import give_usual_modes

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

# The control tokens of Qwen2.5-VL, in the order of their ids there.
SPECIAL_TOKENS = tuple(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> "
    "<|video_pad|>".split()
)

# The structure of Qwen2.5-VL's own template; only the default system prompt is left out.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True)
class TinySize:
    """The dimensions of a tiny Qwen2.5-VL; the defaults give about 0.9 million parameters."""

    vocab_limit: int = 512
    """Most entries of the BPE vocabulary (special tokens come on top); >= 256, the byte alphabet."""
    hidden: int = 128
    """Width of the language model."""
    mlp: int = 256
    """Inner width of its feed-forward layers."""
    text_layers: int = 4
    heads: int = 4
    """Query heads; ``hidden / heads`` must be a head size of vLLM's CPU attention (32, 64, 80 ...)."""
    kv_heads: int = 2
    vision_hidden: int = 64
    vision_mlp: int = 128
    vision_depth: int = 3
    vision_heads: int = 2
    full_attention_blocks: tuple[int, ...] = (1,)
    """Vision blocks that see the whole image; the others see one window."""
    window: int = 56
    """Side of an attention window in pixels. 56 = 2 x 2 merged tokens, so small images have several."""
    initializer_range: float = 0.08
    """Standard deviation of the weights. About ``hidden ** -0.5``: at the 0.02 of the large models a
    model this narrow says nearly the same whatever it sees, and tests against it would pass too easily."""
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 256
    max_positions: int = 4096

    def __post_init__(self) -> None:
        blocks, width = set(range(self.vision_depth)), 4 * self.vision_heads
        rules = (
            ("vocab_limit", self.vocab_limit >= 256, "at least 256, one entry a byte"),
            ("hidden", self.hidden % (32 * self.heads) == 0, f"not a multiple of 32 for {self.heads} heads"),
            ("kv_heads", self.heads % self.kv_heads == 0, f"does not divide heads={self.heads}"),
            ("vision_hidden", self.vision_hidden % width == 0, f"not a multiple of {width} (two-way rope)"),
            ("full_attention_blocks", blocks.issuperset(self.full_attention_blocks), f"not all in {blocks}"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise UserError(f"TinySize.{name}={getattr(self, name)}: {rule}")


def train_tokenizer(corpus: Sequence[str], vocab_limit: int = 512) -> Qwen2Tokenizer:
    """Train the byte-level BPE of Qwen2 on ``corpus`` and add Qwen's special tokens behind it.

    Any text can be encoded; words that occur twice or more in the corpus become single tokens as far
    as ``vocab_limit`` (BPE entries without the special tokens) allows. Numbers are split into digits,
    as Qwen2 does.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    rules = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(BPE())
    bpe.normalizer, bpe.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=vocab_limit, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*corpus, *("user", "assistant") * 2], trainer)
    learned = json.loads(bpe.to_str())["model"]
    # The constructor would put eos and pad in front of the others; ids given here keep Qwen's order.
    vocab = learned["vocab"] | {token: len(learned["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,  # bytes cover everything
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(tokenizer: Qwen2Tokenizer, size: TinySize) -> Qwen2_5_VLConfig:
    """The model's configuration, its special ids taken from ``tokenizer``."""
    from transformers import Qwen2_5_VLConfig

    ids = tokenizer.get_vocab()
    half = size.hidden // size.heads // 2
    # Qwen2.5-VL divides the 64 rotary frequencies 16:24:24 over time, height and width.
    section = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size.hidden,
            "intermediate_size": size.mlp,
            "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": size.max_positions,
            "max_window_layers": size.text_layers,
            "rms_norm_eps": 1e-6,
            "initializer_range": size.initializer_range,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section},
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_mlp,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "window_size": size.window,
            "fullatt_block_indexes": list(size.full_attention_blocks),
            "tokens_per_second": 2,
            "initializer_range": size.initializer_range,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def build_tiny_qwen2_5_vl(
    out_dir: Path, corpus: Sequence[str], seed: int = 0, size: TinySize | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """Write a tiny Qwen2.5-VL with random weights to ``out_dir`` in Hugging Face format; return it.

    ``AutoProcessor``, ``AutoModelForImageTextToText`` and vLLM load the directory. ``corpus`` is the text
    the tokenizer is trained on. Weights are float32 and the same for the same seed, corpus and size;
    the caller's random state is not touched.
    """
    import torch

    from mssr.models.loading import import_transformers

    transformers = import_transformers()
    size = size or TinySize()
    tokenizer = train_tokenizer(corpus, size.vocab_limit)
    config, ids = tiny_config(tokenizer, size), tokenizer.get_vocab()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    model.eval()
    model.generation_config = transformers.GenerationConfig(
        # Qwen2.5-VL stops at either of the two, so code that assumes a single id shows it here.
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    pixels = {"shortest_edge": size.min_pixels, "longest_edge": size.max_pixels}
    processor = transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=True),
        chat_template=CHAT_TEMPLATE,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    save_quietly(model, out_dir)
    processor.save_pretrained(out_dir)
    return model


def save_quietly(model: Qwen2_5_VLForConditionalGeneration, out_dir: Path) -> None:
    """``save_pretrained`` without its progress bar, which is noise for a file of 4 MB."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(out_dir)
        give_usual_modes(out_dir)
    finally:
        if shown:
            logging.enable_progress_bar()
