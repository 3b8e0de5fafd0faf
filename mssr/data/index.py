"""The rows of one source with their ids and what the check of them said; kept in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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

RELEASE_BYTES = 64 * 2**20
"""Bytes that are read before the pages of the file are given back; those of smaller files never are."""

BYTES_AROUND = 2**22
"""What the system maps with a cell that is read out of order, at worst: two large pages."""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """What the check found out about the R rows of a source."""

    table: Any
    """`pyarrow.Table` of R rows: id (null where the row cannot be parsed), state (USABLE, BAD or
    DUPLICATE), reason (null if usable), sizes (width, height, width, ... of its images in pixels),
    structured (whether the truth is a list or dict)."""
    key: str
    """Changes with everything that decides the content of the table."""

    @property
    def ids(self) -> list[str | None]:
        return self.table["id"].to_pylist()

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

    def sizes(self, start: int, stop: int) -> list[list[tuple[int, int]]]:
        """(width, height) of the images of some rows."""
        flat = self.table["sizes"].slice(start, stop - start).to_pylist()
        return [list(zip(row[::2], row[1::2], strict=True)) for row in flat]


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
        self._bytes_read = 0
        if not len(self.table):
            raise UserError(f"data {source.name} has no rows")
        self.columns = resolve_columns(self.table, config, source.name)
        self.config = self.columns.config
        self.table.release()
        if not every_column:
            self.table.narrow(self._columns)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def _columns(self) -> list[str]:
        """Those of the table that are read."""
        names = (root(column, self.table.column_names) for column in read_columns(self.config))
        return list(dict.fromkeys(names))

    def row(self, number: int, row_id: str) -> Row:
        """One row, images not opened; the memory that reading takes is bounded.

        Raises:
            ValueError: it cannot be used, which a check would have said.
        """
        row = read_row(self._cells(number), row_id, self.table.where(number), self.config)
        self._count(BYTES_AROUND * len(self._columns))
        return row

    def cells(self, number: int) -> dict[str, Any]:
        """A row as the table has it; the memory that reading takes is bounded."""
        cells = self._cells(number)
        self._count(BYTES_AROUND * len(cells))
        return cells

    def answers(self, numbers: Sequence[int], as_cells: bool = False) -> list[Any]:
        """Ground truths, read without touching the images; as text, or as they are where they are none."""
        column = self.config.answer_column
        truths = [truth(cells, self.config) for cells in self._cells_of(column, numbers)]
        self._count(BYTES_AROUND * len(numbers))
        return [t if as_cells and not isinstance(t, str) else answer_text(t, column) for t in truths]

    def prompts(self, numbers: Sequence[int]) -> list[Conversation]:
        """Questions of usable rows, with the turns before them."""
        return [
            read_prompt(cells, self.config) for cells in self._cells_of(self.config.problem_column, numbers)
        ]

    def _cells_of(self, column: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Rows as far as one configured column needs them."""
        name = root(column, self.table.column_names)
        return [{name: value} for value in self.table.column(name, numbers)] if numbers else []

    def ids(self) -> list[str | None]:
        """An id for every row, None where it has none. Reads the index where there is one."""
        index = self._cached(self._key()) if self.cache.directory.is_dir() else None
        if index is not None:
            return index.ids
        column = self.config.id_column
        numbers = range(len(self))
        if column:
            found = (cell(cells, column) for cells in self._cells_of(column, numbers))
            return [_or_none(column_id, own, column) for own in found]
        return [_or_none(lambda n: self._id(self._cells(n)), n) for n in numbers]

    def check(self) -> RowIndex:
        """The index; made by reading every row once, with the headers of its images, if it is not kept."""
        key = self._key()
        index = self._cached(key)
        if index is None:
            index = self._scan(key)
            self.cache.save("rows", key, index.table)
        if index.without_images:
            self.columns.refuse_blindness(
                self.source.name,
                f"no usable image in column {self.config.images_column!r} (data.images_column)",
            )
        return index

    def _key(self) -> str:
        table, c = self.table, self.config
        content = self.cache.content_key(table.files) if table.files else table.fingerprint
        _, split = split_name(self.source.name)
        return digest_of(content, split, len(table), read_columns(c), c.id_column, c.image_dir)

    def _cached(self, key: str) -> RowIndex | None:
        table = self.cache.load("rows", key)
        if table is None or len(table) != len(self):
            return None
        files = json.loads(table.schema.metadata[b"files"])
        if file_states(list(files)) != list(files.values()):
            return None
        return RowIndex(table, digest_of(key, files))

    def _scan(self, key: str) -> RowIndex:
        import pyarrow as pa

        ids: list[str | None] = []
        states: list[int] = []
        reasons: list[str | None] = []
        sizes: list[list[int]] = []
        structured: list[bool] = []
        first: dict[str, int] = {}
        files: dict[str, None] = {}
        for number in range(len(self)):
            row_id, row_sizes, state, why, compound = None, [], USABLE, None, False
            try:
                cells = self._cells(number)
                row_id = self._id(cells)
                row = read_row(cells, row_id, "", self.config)
                self._count(sum(len(image.data) for image in row.images if image.data))
                files.update((image.path, None) for image in row.images if image.path)
                row_sizes = list(_header_sizes(row))
                compound = row.answer[0] in "[{" and is_structured(truth(cells, self.config))
                if row_id in first:
                    state, why = self._repeated(row_id, first[row_id])
            except ValueError as error:
                state, why, row_sizes = BAD, reason(error), []
                if isinstance(error, MissingFile):
                    files[error.path] = None
            if row_id is not None:
                first.setdefault(row_id, number)
            ids.append(row_id)
            states.append(state)
            reasons.append(why)
            sizes.append(row_sizes)
            structured.append(compound)
        self.table.release()
        table = pa.table(
            {
                "id": pa.array(ids, pa.string()),
                "state": pa.array(states, pa.int8()),
                "reason": pa.array(reasons, pa.string()),
                "sizes": pa.array(sizes, pa.list_(pa.int32())),
                "structured": pa.array(structured, pa.bool_()),
            }
        )
        known = dict(zip(files, file_states(list(files)), strict=True))
        table = table.replace_schema_metadata({b"files": json.dumps(known).encode()})
        return RowIndex(table, digest_of(key, known))

    def _count(self, bytes_read: int) -> None:
        self._bytes_read += bytes_read
        if min(self._bytes_read, self.table.mapped_bytes) > RELEASE_BYTES:
            self.table.release()
            self._bytes_read = 0

    def _cells(self, number: int) -> dict[str, Any]:
        try:
            return self.table.cells(number)
        except Exception as error:  # pyarrow and datasets raise many types for damaged data
            raise ValueError(reason(error)) from error

    def _id(self, cells: dict[str, Any]) -> str:
        column = self.config.id_column
        return column_id(cell(cells, column), column) if column else content_id(cells, self.config)

    def _repeated(self, row_id: str, number: int) -> tuple[int, str]:
        if self.config.id_column:
            return BAD, f"id {row_id} occurs twice, first in row {number}"
        return DUPLICATE, f"question, answer and images are those of row {number}"


def _header_sizes(row: Row) -> Iterator[int]:
    for k, image in enumerate(row.images):
        try:
            yield from image.size()
        except Exception as error:
            raise ValueError(f"image {k} cannot be read ({reason(error)})") from error


def _or_none(read: Callable[..., str], *arguments: Any) -> str | None:
    try:
        return read(*arguments)
    except ValueError:
        return None
