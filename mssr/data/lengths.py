"""Prompt lengths in tokens from text and image headers, kept in the cache."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pyarrow as pa

from mssr.data.cache import digest_of
from mssr.data.encoder import PromptEncoder
from mssr.data.images import ImageSource, reason
from mssr.data.index import USABLE, RowIndex, SourceRows
from mssr.data.messages import Conversation
from mssr.data.rows import Row

BATCH = 256
"""Rows whose questions are read at once."""

NOT_IN_LENGTH = {
    *("train", "val", "max_prompt_length", "max_bad_fraction", "shuffle", "cache_dir"),
    *("id_column", "images_column", "problem_column", "answer_column", "image_dir", "image_marks"),
}
"""Keys of `DataConfig` that do not change the length of a row, or that the index depends on already."""

PROBES = (
    (Conversation("a b"), 0),
    (Conversation("a b"), 1),
    (Conversation("<image>a<image>b"), 2),
    (Conversation("c", (("system", "s"), ("user", "a"), ("assistant", "b"))), 1),
)
"""Prompts and numbers of images that show which templates and instructions are in force."""


def prompt_lengths(
    rows: SourceRows, index: RowIndex, encoder: PromptEncoder
) -> tuple[np.ndarray, dict[int, str]]:
    """Lengths of a source: (R,) int32 tokens, -1 for rows that are not usable; and row number -> reason of
    rows that the encoder refuses, such as an image with an aspect ratio above 200."""
    key = digest_of(index.key, encoder_fingerprint(encoder))
    table = rows.cache.load("lengths", key)
    if table is None or len(table) != len(rows):
        table = _compute(rows, index, encoder)
        rows.cache.save("lengths", key, table)
    reasons = table["reason"]
    refused = np.flatnonzero(reasons.is_valid().to_numpy()).tolist()
    return table["length"].to_numpy().copy(), {n: reasons[n].as_py() for n in refused}


def encoder_fingerprint(encoder: PromptEncoder) -> str:
    """A hash of everything in tokenizer, templates and config that the length of a prompt depends on."""
    processor = encoder.processor
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    settings = {k: v for k, v in asdict(encoder.config).items() if k not in NOT_IN_LENGTH} | encoder.texts
    probes = [_text_or_reason(encoder, _row(prompt, images)) for prompt, images in PROBES]
    sizes = [processor.patch_size, processor.merge_size]
    return digest_of(vocabulary, processor.chat_template, settings, probes, sizes)


def _compute(rows: SourceRows, index: RowIndex, encoder: PromptEncoder) -> pa.Table:
    lengths = np.full(len(rows), -1, np.int32)
    reasons: list[str | None] = [None] * len(rows)
    usable = np.flatnonzero(index.states == USABLE).tolist()
    for start in range(0, len(usable), BATCH):
        numbers = usable[start : start + BATCH]
        for number, prompt in zip(numbers, rows.prompts(numbers), strict=True):
            images = index.sizes(number)
            try:
                lengths[number] = encoder.length(_row(prompt, len(images)), images)
            except ValueError as error:
                reasons[number] = reason(error)
    rows.table.release()
    return pa.table({"length": lengths, "reason": pa.array(reasons, pa.string())})


def _row(prompt: Conversation, images: int) -> Row:
    """A row as far as its length needs it."""
    pictures = (ImageSource(b"", None),) * images
    return Row("", prompt.question, "", pictures, "", prompt.history, prompt.mark)


def _text_or_reason(encoder: PromptEncoder, row: Row) -> str:
    try:
        return encoder.chat_text(row)
    except ValueError as error:  # a template may suit the user's questions and not this one
        return reason(error)
