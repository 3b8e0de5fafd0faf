"""Real models of each family of about a million parameters, with random weights and a tokenizer of their own.

Everything is the genuine article, only small: the tower with its windows or levels, multimodal rope, tied
embeddings, the byte-level BPE of Qwen2 with all its special tokens, the chat template, the image and video
processors. What runs with them runs with the large ones, so the tests and the embedded tasks use them. One is
built in about a second, from a text corpus, without a network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mssr.errors import UserError
from mssr.models.families import family_named, family_of
from mssr.models.files import give_usual_modes

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

# The control tokens of Qwen-VL, in the order of their ids there.
SPECIAL_TOKENS = tuple(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> "
    "<|video_pad|>".split()
)


@dataclass(frozen=True, slots=True)
class TinySize:
    """The dimensions of a tiny model; the defaults give about 0.9 million parameters."""

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

    def text(self, ids: Mapping[str, int], interleaved: bool) -> dict[str, Any]:
        """Options of the language model.

        Args:
            ids: the tokenizer's vocabulary.
            interleaved: how rotary frequencies are shared out over time, height and width.
        """
        half = self.hidden // self.heads // 2
        # Qwen2.5-VL divides 64 of them 16:24:24, and Qwen3-VL alternates, 24:20:20.
        sides = half * 5 // 16 if interleaved else half * 3 // 8
        rope = {"rope_type": "default", "rope_theta": 10_000.0}
        rope |= {"mrope_section": [half - 2 * sides, sides, sides]}
        return {
            "vocab_size": len(ids),
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.text_layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-6,
            "initializer_range": self.initializer_range,
            "rope_parameters": rope | ({"mrope_interleaved": True} if interleaved else {}),
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        }

    def vision(self) -> dict[str, Any]:
        """Options of the tower."""
        return {
            "depth": self.vision_depth,
            "hidden_size": self.vision_hidden,
            "intermediate_size": self.vision_mlp,
            "num_heads": self.vision_heads,
            "out_hidden_size": self.hidden,
            "initializer_range": self.initializer_range,
        }

    def options(self, ids: Mapping[str, int], text: Any, vision: Any) -> dict[str, Any]:
        """Of a model that sees images."""
        return {
            "text_config": text,
            "vision_config": vision,
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": True,
            "dtype": "float32",
        }

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
    )


def build_tiny(
    out_dir: Path, model_type: str, corpus: Sequence[str], seed: int = 0, size: TinySize | None = None
) -> Any:
    """Write a tiny model of a family with random weights to ``out_dir`` in Hugging Face format; return it.

    transformers and vLLM load the directory. ``corpus`` is the text the tokenizer is trained on. Weights are
    float32 and the same for the same family, seed, corpus and size; the caller's random state is not touched.

    Raises:
        UserError: there is no such family.
    """
    import torch

    from mssr.models.loading import import_transformers

    transformers = import_transformers()
    family, size = family_named(model_type, str(out_dir)), size or TinySize()
    tokenizer = train_tokenizer(corpus, size.vocab_limit)
    ids = tokenizer.get_vocab()
    config = family.tiny_config(ids, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family.auto_class).from_config(config)
    model.eval()
    model.generation_config = transformers.GenerationConfig(
        # Qwen's models stop at either of the two, so code that assumes a single id shows it here.
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    pixels = {"shortest_edge": size.min_pixels, "longest_edge": size.max_pixels}
    out_dir.mkdir(parents=True, exist_ok=True)
    save_quietly(model, out_dir)
    family.tiny_processor(tokenizer, pixels).save_pretrained(out_dir)
    return model


def save_quietly(model: Any, out_dir: Path) -> None:
    """Write a model without transformers' progress bar, which is noise for a file of 4 MB."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        family_of(model.config).save(model, out_dir)
        give_usual_modes(out_dir)
    finally:
        if shown:
            logging.enable_progress_bar()
