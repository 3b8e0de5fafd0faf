"""Cells of a table -> a `Row`, or the reason why it cannot be one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from mssr.config.data import DataConfig
from mssr.data.images import ImageSource, image_cells, image_key, image_sources
from mssr.data.messages import (
    IMAGE_MARK,
    PART_MARK,
    Conversation,
    Turn,
    count_marks,
    is_messages,
    parts_of,
    read_messages,
)

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
    """The ground truth as text, see `answer_text`."""
    images: tuple[ImageSource, ...]
    """In the order of the marks of all turns."""
    where: str
    """File and row number, for messages."""
    history: tuple[Turn, ...] = ()
    """Turns before the question, where the data has message lists."""
    mark: str = IMAGE_MARK
    """What stands for an image in problem and history."""

    @property
    def question(self) -> str:
        """The problem as people read it."""
        return self.problem.replace(self.mark, IMAGE_MARK)

    def without_images(self) -> Row:
        """The same turns with neither images nor marks."""
        history = tuple((role, text.replace(self.mark, "")) for role, text in self.history)
        return replace(self, images=(), problem=self.problem.replace(self.mark, ""), history=history)

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (*self.history, ("user", self.problem))


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str


def read_row(cells: Mapping[str, Any], row_id: str, where: str, config: DataConfig) -> Row:
    """The row that the configured columns hold; a ValueError says why it is no prompt. No image is opened."""
    prompt = read_prompt(cells, config)
    answer = answer_text(truth(cells, config), config.answer_column)
    given = image_cells(cell(cells, config.images_column))
    if prompt.images and given:
        raise ValueError(
            f"images both within {config.problem_column} and in column {config.images_column}; name one: "
            "data.images_column=null leaves the column out"
        )
    images = image_sources(list(prompt.images) or given, config.image_dir)
    if len(images) > MAX_IMAGES_PER_PROMPT:
        raise ValueError(f"{len(images)} images, at most {MAX_IMAGES_PER_PROMPT} are possible")
    marks = count_marks(prompt.turns, prompt.mark)
    if marks not in (0, len(images)):
        remedy = "; data.image_marks=literal takes <image> for text" if config.image_marks == "strict" else ""
        raise ValueError(f"{marks} {IMAGE_MARK} marks but {len(images)} images{remedy}")
    return Row(row_id, prompt.question, answer, images, where, prompt.history, prompt.mark)


def read_prompt(cells: Mapping[str, Any], config: DataConfig) -> Conversation:
    """Question, turns before it and what else the cell of ``data.problem_column`` holds; a ValueError where
    there is no question."""
    column = config.problem_column
    problem = cell(cells, column)
    if problem is None:
        raise ValueError(f"column {column} is empty")
    prompt = _conversation(problem, column, IMAGE_MARK)
    if literal := config.image_marks == "literal":
        other = _conversation(problem, column, PART_MARK)
        # Rows without such text are as they are by strict, for templates that look for marks as well.
        prompt = other if count_marks(other.turns) else prompt
    if not prompt.question.replace(prompt.mark, "").strip():
        raise ValueError(f"column {column} is empty")
    for _, text in prompt.turns:
        check_text(text, column)
        if "<video>" in text and not literal:
            raise ValueError(f"column {column} has a mark <video>, and videos are not read")
    return prompt


def _conversation(problem: Any, column: str, mark: str) -> Conversation:
    if is_messages(problem):
        return read_messages(problem, column, mark)
    if isinstance(problem, str):
        return Conversation(problem, mark=mark)
    raise ValueError(f"column {column} is {type(problem).__name__}, not text")


def problem_cell(row: Row) -> str:
    """What `read_prompt` reads question and history from, by ``data.image_marks=literal``."""
    if not row.history and row.mark not in row.problem:
        return row.problem
    return json.dumps([{"role": role, "content": parts_of(text, row.mark)} for role, text in row.turns])


def cell(cells: Mapping[str, Any], column: str | None) -> Any:
    """The cell of a column, or of ``column.key.key`` within a cell that is a dict or JSON text of one; None
    where there is none."""
    if column is None:
        return None
    if column in cells:
        return cells[column]
    name, dot, rest = column.partition(".")
    inner = cells.get(name) if dot else None
    if isinstance(inner, str) and inner[:1] == "{":
        with contextlib.suppress(ValueError):
            inner = json.loads(inner)
    return cell(inner, rest) if isinstance(inner, Mapping) else None


def truth(cells: Mapping[str, Any], config: DataConfig) -> Any:
    """The ground truth as the data has it; of a list of messages the assistant's turn behind the question,
    and a ValueError where there is none."""
    found = cell(cells, config.answer_column)
    if not is_messages(found):
        return found
    reply = read_messages(found, config.answer_column).reply
    if reply is None:
        raise ValueError(f"column {config.answer_column} has no turn of the assistant behind the question")
    return reply


def answer_text(found: Any, column: str = "answer") -> str:
    """The ground truth as text, without ``<answer></answer>`` (and what stands before it).

    A list of one counts as its item; whole numbers have no point, since a column of integers with a gap is
    stored as floats; a longer list or a dict is JSON, which no named rule takes, see `is_structured`.

    Raises:
        ValueError: it is empty, or no text, number, truth value, list or dict.
    """
    found = _item(found)
    if found is None or (isinstance(found, float) and math.isnan(found)):
        raise ValueError(f"column {column} is empty")
    if is_structured(found):
        text = json.dumps(found, ensure_ascii=False, default=str) if found else ""
    elif isinstance(found, float) and found.is_integer() and abs(found) < 2**53:
        text = str(int(found))
    elif isinstance(found, (str, int, float, Decimal)):
        text = str(found)
    else:
        raise ValueError(f"column {column} is {type(found).__name__}, not text")
    wrapped = _WRAPPED.search(text)
    if wrapped:
        text = wrapped[1].strip()
    if not text.strip():
        raise ValueError(f"column {column} is empty")
    check_text(text, column)
    return text


def is_structured(found: Any) -> bool:
    """Whether a ground truth is a list of several or a dict: nothing that a rule could compare with text."""
    return isinstance(_item(found), (list, tuple, dict))


def check_text(text: str, column: str) -> None:
    """Raises ValueError for what is no text: half of a surrogate pair, as a cut JSON escape leaves it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {column} is no valid text ({error.reason} at {error.start})") from None


def content_id(cells: Mapping[str, Any], config: DataConfig) -> str:
    """24 hexadecimal digits: a hash of question, answer and images as the data has them."""
    digest = hashlib.blake2b(digest_size=12)
    for column in (config.problem_column, config.answer_column):
        digest.update(_ENCODER.encode(cell(cells, column)).encode() + b"\0")
    for image in image_cells(cell(cells, config.images_column)):
        digest.update(hashlib.blake2b(image_key(image), digest_size=12).digest())
    return digest.hexdigest()


def column_id(found: Any, column: str) -> str:
    """The id of a row from its id column; a ValueError where that is empty, or neither text nor a number."""
    if found is None or (isinstance(found, float) and math.isnan(found)) or not str(found).strip():
        raise ValueError(f"column {column} is empty")
    if not isinstance(found, (str, int, float)):
        raise ValueError(f"column {column} is {type(found).__name__}, not text or a number")
    check_text(str(found), column)
    return str(found)


def _item(found: Any) -> Any:
    return found[0] if isinstance(found, (list, tuple)) and len(found) == 1 else found


def _known_by(value: Any) -> str:
    """What JSON cannot hold, for an id: images within messages by a hash."""
    return hashlib.blake2b(value, digest_size=12).hexdigest() if isinstance(value, bytes) else str(value)


_ENCODER = json.JSONEncoder(default=_known_by)
