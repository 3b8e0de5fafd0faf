"""The rows of one source with their ids and what the check of them said; kept in the cache."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mssr.config.data import DataConfig
from mssr.data.cache import DataCache, digest_of, file_states
from mssr.data.columns import read_columns, resolve_columns, root
from mssr.data.images import MissingFile, reason
from mssr.data.messages import Conversation
from mssr.data.rows import (
    Row,
    answer_text,
    cell,
    column_id,
    content_id,
    is_structured,
    read_prompt,
    read_row,
    truth,
)
from mssr.data.sources import Source, open_table, split_name
from mssr.errors import UserError

USABLE, BAD, DUPLICATE = 0, 1, 2

SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # null where the row cannot be parsed
        ("state", pa.int8()),  # USABLE, BAD or DUPLICATE
        ("reason", pa.string()),  # null if usable
        ("sizes", pa.list_(pa.int32())),  # width, height, width, ... of its images in pixels
        ("structured", pa.bool_()),  # whether the truth is a list or dict
    ]
)

BATCH = 1000
"""Rows whose outcomes are held as Python objects."""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """What the check found out about the R rows of a source."""

    table: pa.Table
    """R rows of `SCHEMA`."""
    key: str
    """Changes with everything that decides the content of the table."""

    @property
    def ids(self) -> list[str | None]:
        return self.table["id"].to_pylist()

    @property
    def usable_ids(self) -> list[str | None]:
        """None for rows that are not usable."""
        return [i if state == USABLE else None for i, state in zip(self.ids, self.states, strict=True)]

    @property
    def states(self) -> np.ndarray:
        """(R,) int8."""
        return self.table["state"].to_numpy()

    def rejected(self, state: int) -> list[tuple[int, str]]:
        """(row number, reason) of the rows that are BAD or DUPLICATE."""
        reasons = self.table["reason"]
        return [(int(n), reasons[int(n)].as_py()) for n in np.flatnonzero(self.states == state)]

    @property
    def structured(self) -> np.ndarray:
        """(R,) bool: usable, with a list or dict as truth, which only a user's function can compare."""
        return self.table["structured"].to_numpy() & (self.states == USABLE)

    @property
    def without_images(self) -> bool:
        """Whether no usable row has one."""
        return not any(len(chunk.flatten()) for chunk in self.table["sizes"].chunks)

    def sizes(self, number: int) -> list[tuple[int, int]]:
        """(width, height) of the images of a row."""
        flat = self.table["sizes"][number].as_py()
        return list(zip(flat[::2], flat[1::2], strict=True))


class SourceRows:
    """One source: its table, opened, and its index.

    Raises:
        UserError: it cannot be opened, has no rows, or lacks a configured column.
    """

    def __init__(
        self, source: Source, config: DataConfig, cache: DataCache, every_column: bool = False
    ) -> None:
        self.source, self.cache = source, cache
        self.table = open_table(source.name)
        if not len(self.table):
            raise UserError(f"data {source.name} has no rows")
        self.columns = resolve_columns(self.table, config, source.name)
        self.config = self.columns.config
        self.table.release()
        if not every_column:
            self.table.narrow([root(name, self.table.column_names) for name in read_columns(self.config)])

    def __len__(self) -> int:
        return len(self.table)

    def row(self, number: int, row_id: str) -> Row:
        """One row, images not opened; a ValueError for one that cannot be used, which a check would say."""
        return read_row(self.cells(number), row_id, self.table.where(number), self.config)

    def cells(self, number: int) -> dict[str, Any]:
        """A row as the table has it; a ValueError for one that cannot be read."""
        try:
            return self.table.cells(number)
        except Exception as error:  # pyarrow and datasets raise many types for damaged data
            raise ValueError(reason(error)) from error

    def answers(self, numbers: Sequence[int], as_cells: bool = False) -> list[Any]:
        """Ground truths, read without touching the images; as text, or as they are where they are none."""
        column = self.config.answer_column
        truths = [truth(cells, self.config) for cells in self._cells_of(column, numbers)]
        return [t if as_cells and not isinstance(t, str) else answer_text(t, column) for t in truths]

    def prompts(self, numbers: Sequence[int]) -> list[Conversation]:
        """Questions of usable rows, with the turns before them."""
        rows = self._cells_of(self.config.problem_column, numbers)
        return [read_prompt(cells, self.config) for cells in rows]

    def _cells_of(self, column: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows as far as one configured column needs them."""
        name = root(column, self.table.column_names)
        return [{name: value} for value in self.table.column(name, numbers)] if numbers else []

    def ids(self) -> list[str | None]:
        """An id for every row, None where it has none. Reads the index where there is one."""
        index = self._cached(self._key()) if self.cache.directory.is_dir() else None
        if index is not None:
            return index.ids
        ids: list[str | None] = [None] * len(self)
        column = self.config.id_column
        named = self._cells_of(column, range(len(self))) if column else None
        for number in range(len(self)):
            with contextlib.suppress(ValueError):
                ids[number] = self._id(named[number] if named else self.cells(number))
        return ids

    def check(self) -> RowIndex:
        """The index; made by reading every row once, with the headers of its images, if it is not kept."""
        key = self._key()
        index = self._cached(key)
        if index is None:
            index = self._scan(key)
            self.cache.save("rows", key, index.table)
        if index.without_images:
            self.columns.refuse_blindness(self.source.name, "no usable image in")
        return index

    def _key(self) -> str:
        table, c = self.table, self.config
        content = self.cache.content_key(table.files) if table.files else table.fingerprint
        _, split = split_name(self.source.name)
        return digest_of(content, split, len(table), read_columns(c), c.id_column, c.image_dir, c.image_marks)

    def _cached(self, key: str) -> RowIndex | None:
        table = self.cache.load("rows", key)
        if table is None or len(table) != len(self):
            return None
        files = json.loads(table.schema.metadata[b"files"])
        return RowIndex(table, digest_of(key, files)) if file_states(files) == files else None

    def _scan(self, key: str) -> RowIndex:
        first: dict[str, int] = {}
        files: dict[str, None] = {}
        batches = []
        for start in range(0, len(self), BATCH):
            numbers = range(start, min(start + BATCH, len(self)))
            outcomes = [self._outcome(number, first, files) for number in numbers]
            batches.append(pa.RecordBatch.from_pylist(outcomes, SCHEMA))
        self.table.release()
        states = file_states(files)
        table = pa.Table.from_batches(batches).replace_schema_metadata({"files": json.dumps(states)})
        return RowIndex(table, digest_of(key, states))

    def _outcome(self, number: int, first: dict[str, int], files: dict[str, None]) -> dict[str, Any]:
        """What the index says of a row; its id is added to those of ``first`` (id -> first row that has it),
        its image files to ``files``."""
        found: dict[str, Any] = {"id": None, "state": USABLE, "sizes": [], "structured": False}
        try:
            cells = self.cells(number)
            found["id"] = row_id = self._id(cells)
            row = read_row(cells, row_id, "", self.config)
            files.update((image.path, None) for image in row.images if image.path)
            found["sizes"] = list(_header_sizes(row))
            found["structured"] = row.answer[0] in "[{" and is_structured(truth(cells, self.config))
            if row_id in first:
                found["state"], found["reason"] = (
                    (BAD, f"id {row_id} occurs twice, first in row {first[row_id]}")
                    if self.config.id_column
                    else (DUPLICATE, f"question, answer and images are those of row {first[row_id]}")
                )
        except ValueError as error:
            found |= {"state": BAD, "reason": reason(error), "sizes": []}
            if isinstance(error, MissingFile):
                files[error.path] = None
        if found["id"] is not None:
            first.setdefault(found["id"], number)
        return found

    def _id(self, cells: dict[str, Any]) -> str:
        column = self.config.id_column
        return column_id(cell(cells, column), column) if column else content_id(cells, self.config)


def _header_sizes(row: Row) -> Iterator[int]:
    for k, image in enumerate(row.images):
        try:
            yield from image.size()
        except Exception as error:
            raise ValueError(f"image {k} cannot be read ({reason(error)})") from error
