"""Items -> prompts in the project's own data form, which engines read by id as in training.

No item is dropped. An image that cannot be decoded (or is more than 200 times as long as wide) is left out
and the rest of the prompt is asked; an item that cannot be asked at all (longer than
``data.max_prompt_length``, more than 16 images, a question with a token that stands for pixels) stays, with
the reason in place of a response. Both are noted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mssr.config.data import DataConfig
from mssr.data.encoder import PromptEncoder
from mssr.data.images import ImageSource, reason
from mssr.data.rows import Row, problem_cell, read_row
from mssr.data.validation_sets import benchmark_data
from mssr.errors import UserError
from mssr.evaluation.base import Benchmark
from mssr.evaluation.cells import question_text
from mssr.evaluation.items import Item
from mssr.evaluation.responses import Key

ROWS_IN_MEMORY = 16
NO_ANSWER = "-"
"""The own data form wants an answer; engines do not see it."""


@dataclass(frozen=True, slots=True)
class Question:
    """An item, and what became of it on the way to the engine."""

    benchmark: Benchmark
    item: Item
    asked: bool
    note: str | None = None
    """What is wrong with it: an image that was left out, or why it cannot be asked."""

    @property
    def flaw(self) -> str | None:
        """``not_asked`` or ``damaged_images``, as results.json counts it; None where all is well."""
        return None if self.note is None else "damaged_images" if self.asked else "not_asked"

    @property
    def prompt_id(self) -> str:
        """Of its row in the data set that `write_prompts` made."""
        return f"{self.benchmark.name}/{self.item.id}"

    def key(self, sample: int) -> Key:
        """Of a response to it."""
        return self.benchmark.name, self.item.id, sample


def prompt_data(config: DataConfig, directory: Path) -> DataConfig:
    """The config of the data set that `write_prompts` writes."""
    return replace(benchmark_data(config), train=str(directory.absolute()), val=None)


def write_prompts(
    benchmarks: Sequence[tuple[Benchmark, Sequence[Item]]], encoder: PromptEncoder, directory: Path
) -> tuple[list[Question], str]:
    """Write all items that can be asked as one saved data set (ids, encoded images, problems, answers).

    Returns:
        the questions, in the order of the items; and a hash of everything in them that an engine sees.

    Raises:
        UserError: a benchmark has no items, or none that can be asked.
    """
    for benchmark, items in benchmarks:
        if not items:
            raise UserError(f"{benchmark.name} has no items")
    digest = hashlib.blake2b(digest_size=16)
    questions: list[Question] = []
    sizes: dict[str, tuple[int, int]] = {}

    def rows() -> Iterator[Row]:
        for benchmark, items in benchmarks:
            for item in items:
                question, row = _question(benchmark, item, encoder, sizes)
                questions.append(question)
                seen: list[str] = []
                if row is not None:
                    seen = [encoder.chat_text(row), *(_digest(image.read()) for image in row.images)]
                    yield row
                digest.update(json.dumps([benchmark.name, item.id, seen]).encode())

    save_rows(rows(), directory)
    for benchmark, items in benchmarks:
        own = [question for question in questions if question.benchmark is benchmark]
        if not any(question.asked for question in own):
            why = own[0].note
            raise UserError(f"{benchmark.name}: of {len(items)} items none can be asked; the first {why}")
    return questions, digest.hexdigest()


def save_rows(rows: Iterable[Row], directory: Path) -> None:
    """Write rows, few at a time, as a saved data set of the columns id, images, problem and answer.

    Such a directory is memory-mapped as it is, where of a parquet file every machine would make a copy.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    datasets.disable_progress_bars()
    features = datasets.Features(
        id=datasets.Value("string"),
        images=datasets.List(datasets.Image()),
        problem=datasets.Value("large_string"),
        answer=datasets.Value("large_string"),
    )
    directory.parent.mkdir(parents=True, exist_ok=True)
    file = directory.with_name(f"{directory.name}.arrow")
    count = 0
    with ArrowWriter(features=features, path=str(file), writer_batch_size=ROWS_IN_MEMORY) as writer:
        for row in rows:
            writer.write(_cells(row))
            count += 1
        if count:
            writer.finalize()
    if count:
        datasets.Dataset.from_file(str(file)).save_to_disk(str(directory))
    file.unlink(missing_ok=True)


def _question(
    benchmark: Benchmark, item: Item, encoder: PromptEncoder, known: dict[str, tuple[int, int]]
) -> tuple[Question, Row | None]:
    """An item and its row, which is None if it cannot be asked.

    Args:
        known: sizes of images by content: each is decoded once, to see that engines can.
    """
    images, sizes, notes, sees = [], [], [], encoder.processor.sees_images
    for k, image in enumerate(item.images if sees else ()):
        try:
            data = image.read()
            key = _digest(data)
            if key not in known:
                size = ImageSource(data, None).decode().size
                encoder.resized(*size)
                known[key] = size
        except Exception as error:  # PIL raises many types for a broken file
            notes.append(f"image {k} is left out ({reason(error)})")
            continue
        images.append(ImageSource(data, None))
        sizes.append(known[key])
    question = Question(benchmark, item, True, "; ".join(notes) or None)
    asked = benchmark.prompt_row(item)
    row = replace(
        asked,
        id=question.prompt_id,
        images=tuple(images) if sees else item.images,  # unread: the encoder refuses the row
        problem=question_text(asked.problem, images, asked.mark) if notes else asked.problem,
        answer=asked.answer if asked.answer.strip() else NO_ANSWER,
    )
    longest = encoder.config.max_prompt_length
    try:
        if (length := encoder.length(row, sizes)) > longest:
            raise ValueError(f"{length} tokens, more than data.max_prompt_length={longest}")
        read_row(_cells(row), row.id, row.where, benchmark_data(encoder.config))
    except ValueError as error:
        return replace(question, asked=False, note=f"not asked: {reason(error)}"), None
    return question, row


def _cells(row: Row) -> dict[str, Any]:
    """Of a row in the project's own form, its images in memory."""
    images = [{"bytes": image.read(), "path": None} for image in row.images]
    return {"id": row.id, "images": images, "problem": problem_cell(row), "answer": row.answer}


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
