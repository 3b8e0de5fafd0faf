"""Cells of a table -> a `Row`, or the reason why it cannot be one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from mssr.data.images import ImageSource, image_cells, image_key, image_sources
from mssr.data_config import DataConfig

IMAGE_MARK = "<image>"

MAX_IMAGES_PER_PROMPT = 16
"""Engines reserve memory for so many."""

_WRAPPED = re.compile(r"<answer>((?:(?!<answer>).)*)</answer>\s*$", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt as the data has it.

    Example: ``Row("a1", "<image>What is the sum?", "8", (ImageSource(...),), where="train.parquet row 0")``
    """

    id: str
    problem: str
    answer: str
    images: tuple[ImageSource, ...]
    where: str
    """File and row number, for messages."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str


def read_row(cells: dict[str, Any], row_id: str, where: str, config: DataConfig) -> Row:
    """The row that the configured columns hold. No image is opened.

    Raises:
        ValueError: the reason why it is no prompt.
    """
    problem = cells.get(config.problem_column)
    if problem is None:
        raise ValueError(f"column {config.problem_column} is empty")
    if not isinstance(problem, str):
        raise ValueError(f"column {config.problem_column} is {type(problem).__name__}, not text")
    if not problem.replace(IMAGE_MARK, "").strip():
        raise ValueError(f"column {config.problem_column} is empty")
    answer = answer_text(cells.get(config.answer_column), config.answer_column)
    images = image_sources(cells.get(config.images_column), config.image_dir)
    if len(images) > MAX_IMAGES_PER_PROMPT:
        raise ValueError(f"{len(images)} images, at most {MAX_IMAGES_PER_PROMPT} are possible")
    marks = problem.count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise ValueError(f"{marks} {IMAGE_MARK} marks but {len(images)} images")
    return Row(row_id, problem, answer, images, where)


def answer_text(cell: Any, column: str = "answer") -> str:
    """The ground truth as text, without ``<answer></answer>`` (and what stands before it).

    A list of one counts as its item.

    Raises:
        ValueError: it is empty or no text, number or truth value.
    """
    if isinstance(cell, (list, tuple)) and len(cell) == 1:
        cell = cell[0]
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        raise ValueError(f"column {column} is empty")
    if not isinstance(cell, (str, int, float)):
        raise ValueError(f"column {column} is {type(cell).__name__}, not text")
    text = str(cell)
    wrapped = _WRAPPED.search(text)
    if wrapped:
        text = wrapped[1].strip()
    if not text.strip():
        raise ValueError(f"column {column} is empty")
    return text


def content_id(cells: dict[str, Any], config: DataConfig) -> str:
    """24 hexadecimal digits: a hash of question, answer and images as the data has them."""
    digest = hashlib.blake2b(digest_size=12)
    for part in (cells.get(config.problem_column), cells.get(config.answer_column)):
        digest.update(json.dumps(part, default=str).encode() + b"\0")
    for cell in image_cells(cells.get(config.images_column)):
        digest.update(hashlib.blake2b(image_key(cell), digest_size=12).digest())
    return digest.hexdigest()


def column_id(cell: Any, column: str) -> str:
    """The id of a row from its id column.

    Raises:
        ValueError: it is empty, or neither text nor a number.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)) or not str(cell).strip():
        raise ValueError(f"column {column} is empty")
    if not isinstance(cell, (str, int, float)):
        raise ValueError(f"column {column} is {type(cell).__name__}, not text or a number")
    return str(cell)
