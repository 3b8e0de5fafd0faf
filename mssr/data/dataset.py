"""Rows on disk -> prompts by id. Pixels stay in the memory-mapped file until somebody asks.

Source of the table: parquet, JSON or JSONL file, a directory of a saved dataset, or ``hub/name@split``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mssr.data_config import DataConfig
from mssr.errors import UserError

VAL_PREFIX = "val/"
"""Before the ids of validation rows: users number the rows of both files from 0."""

MAX_IMAGES_PER_PROMPT = 16
"""Engines reserve memory for so many."""

FILE_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt as the data has it.

    Example: ``Row("a1", "<image>What is the sum?", "8", (ImageSource(...),), source="train.parquet row 0")``
    """

    id: str
    problem: str
    answer: str
    images: tuple[ImageSource, ...]
    where: str
    """File and row number, for messages."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Encoded bytes of an image or the path of a file that holds them; decoded on demand."""

    data: bytes | None
    path: str | None

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        assert self.path is not None
        return Path(self.path).read_bytes()

    def size(self) -> tuple[int, int]:
        """(width, height) from the header; the file is checked but its pixels are not decoded."""
        with Image.open(io.BytesIO(self.read())) as image:
            size = image.size
            image.verify()
        if min(size) < 1:
            raise ValueError(f"image has size {size}")
        return size

    def decode(self) -> Image.Image:
        with Image.open(io.BytesIO(self.read())) as image:
            return image.convert("RGB")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str


class PromptDataset:
    """The rows of one data source, addressed by id.

    Opening reads the id column (or hashes the rows) and nothing else; `check` goes through the
    rows once. `keep` narrows the set to some ids, in their order.

    Args:
        source: see the module's docstring.
        prefix: put before every id, to tell the rows of several sources apart.
    """

    def __init__(self, source: str, config: DataConfig, prefix: str = "") -> None:
        self.source = source
        self.config = config
        self._prefix = prefix
        self._table = _open_table(source)
        self._check_columns()
        self.bad_rows: list[BadRow] = []
        self._index = self._read_ids()

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._index

    @property
    def ids(self) -> list[str]:
        return list(self._index)

    def row(self, prompt_id: str) -> Row:
        number = self._index[prompt_id]
        return self._row(number, prompt_id, self._table[number])

    def answers(self, prompt_ids: Sequence[str]) -> list[str]:
        """Ground truths, read without touching the images."""
        column = self._table.select_columns([self.config.answer_column])
        return [str(column[self._index[i]][self.config.answer_column]) for i in prompt_ids]

    def keep(self, prompt_ids: Sequence[str]) -> None:
        self._index = {i: self._index[i] for i in prompt_ids}

    def check(self) -> Iterator[tuple[Row, list[tuple[int, int]]]]:
        """Every usable row with the sizes of its images; the others are added to ``bad_rows``."""
        for prompt_id in self.ids:
            number = self._index[prompt_id]
            try:
                row = self._row(number, prompt_id, self._table[number])
                if not row.problem.replace("<image>", "").strip():
                    raise ValueError(f"column {self.config.problem_column} is empty")
                sizes = []
                for k, image in enumerate(row.images):
                    try:
                        sizes.append(image.size())
                    except Exception as error:  # PIL raises many types for a broken file
                        raise ValueError(f"image {k} cannot be read ({_reason(error)})") from error
                if len(sizes) > MAX_IMAGES_PER_PROMPT:
                    raise ValueError(f"{len(sizes)} images, at most {MAX_IMAGES_PER_PROMPT} are possible")
                marks = row.problem.count("<image>")
                if marks not in (0, len(sizes)):
                    raise ValueError(f"{marks} <image> marks but {len(sizes)} images")
            except ValueError as error:
                self.bad_rows.append(BadRow(self._where(number), str(error)))
                del self._index[prompt_id]
                continue
            yield row, sizes

    def _check_columns(self) -> None:
        c = self.config
        present = self._table.column_names
        required = {"data.problem_column": c.problem_column, "data.answer_column": c.answer_column}
        if c.id_column:
            required["data.id_column"] = c.id_column
        for key, column in required.items():
            if column not in present:
                raise UserError(
                    f"{self.source} has no column {column!r} ({key}); its columns are {', '.join(present)}"
                )

    def _read_ids(self) -> dict[str, int]:
        c = self.config
        index: dict[str, int] = {}
        ids: Iterator[str]
        if c.id_column:
            ids = (str(value) for value in self._table[c.id_column])
        else:
            ids = (self._content_hash(cells) for cells in self._table)
        for number, own_id in enumerate(ids):
            prompt_id = self._prefix + own_id
            if prompt_id in index:
                self.bad_rows.append(BadRow(self._where(number), f"id {own_id} occurs twice"))
            else:
                index[prompt_id] = number
        return index

    def _content_hash(self, cells: dict[str, Any]) -> str:
        c = self.config
        digest = hashlib.blake2b(digest_size=12)
        for part in (cells.get(c.problem_column), cells.get(c.answer_column)):
            digest.update(json.dumps(part, default=str).encode() + b"\0")
        for cell in _as_list(cells.get(c.images_column)):
            digest.update(hashlib.blake2b(_image_key(cell), digest_size=12).digest())
        return digest.hexdigest()

    def _where(self, number: int) -> str:
        return f"{self.source} row {number}"

    def _row(self, number: int, prompt_id: str, cells: dict[str, Any]) -> Row:
        c = self.config
        problem, answer = cells[c.problem_column], cells[c.answer_column]
        if not isinstance(problem, str):
            raise ValueError(f"column {c.problem_column} is {type(problem).__name__}, not text")
        if answer is None or not str(answer).strip():
            raise ValueError(f"column {c.answer_column} is empty")
        images = tuple(_image_source(cell) for cell in _as_list(cells.get(c.images_column)))
        return Row(prompt_id, problem, str(answer), images, self._where(number))


def _open_table(source: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if path.suffix in FILE_FORMATS:
            if not path.is_file():
                raise UserError(f"data file {source} does not exist")
            table = datasets.load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        elif path.is_dir():
            table = datasets.load_from_disk(str(path))
        else:
            name, _, split = source.partition("@")
            if not split:
                raise UserError(f"data {source} is neither a file, a directory nor hub/name@split")
            table = datasets.load_dataset(name, split=split)
    except UserError:
        raise
    except Exception as error:  # datasets raises many types; the user needs the source and the reason
        raise UserError(f"data {source} cannot be opened: {_reason(error)}") from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return table


def _as_list(cell: Any) -> list[Any]:
    if cell is None:
        return []
    return cell if isinstance(cell, list) else [cell]


def _image_source(cell: Any) -> ImageSource:
    if isinstance(cell, dict):
        if not (cell.get("bytes") or cell.get("path")):
            raise ValueError("an image is missing")
        return ImageSource(cell.get("bytes"), cell.get("path"))
    if isinstance(cell, bytes) and cell:
        return ImageSource(cell, None)
    if isinstance(cell, str) and cell:
        return ImageSource(None, cell)
    raise ValueError(f"an image is {'missing' if not cell else type(cell).__name__}")


def _image_key(cell: Any) -> bytes:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    return cell if isinstance(cell, bytes) else str(cell).encode()


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
