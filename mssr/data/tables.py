"""Tables whose rows stay in memory-mapped files until somebody asks for them."""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mssr.data.text_rows import convert
from mssr.errors import UserError

RELEASE_BYTES = 64 * 2**20
"""Bytes that are read before the pages of the files are given back; those of smaller files never are."""

BYTES_AROUND = 2**22
"""What the system maps with a cell that is read out of order, at worst: two large pages."""

SAMPLED_ROWS = 1000
"""Rows that are looked at for the names of a text file's columns."""


class Table:
    """Rows of a source, numbered from 0: a `datasets.Dataset`, read as Arrow has it, so that images, in
    whatever structure, are dicts of bytes and path.

    Args:
        dataset: the rows.
        name: of the source as the user wrote it, for messages.
        files: the local files that decide the content, in a fixed order; ``fingerprint`` does without any.
    """

    def __init__(self, dataset: Any, name: str, files: Sequence[Path]) -> None:
        self.name, self.files = name, list(files)
        self._dataset = dataset.with_format("arrow")
        self.column_names: list[str] = dataset.column_names
        self.fingerprint: str = dataset._fingerprint
        self._bytes_read, self._next = 0, 0

    def __len__(self) -> int:
        return len(self._dataset)

    def where(self, number: int) -> str:
        """File and row, for messages."""
        return f"{self.name} row {number}"

    def cells(self, number: int) -> dict[str, Any]:
        """Column names to cells; a ValueError for a row that cannot be parsed. The memory is bounded."""
        self._count([number], len(self._dataset.column_names))
        cells: dict[str, Any] = self._dataset[number].to_pylist()[0]
        return cells

    def column(self, name: str, numbers: Sequence[int]) -> list[Any]:
        """Cells of one column; None where the row cannot be parsed. The memory is bounded, too."""
        self._count(numbers, 1)
        cells: list[Any] = self._dataset.select_columns([name])[list(numbers)][name].to_pylist()
        return cells

    def _count(self, numbers: Sequence[int], columns: int) -> None:
        """Give pages back before the next rows are read, where they are many."""
        in_order = numbers[0] == self._next and numbers[-1] - numbers[0] == len(numbers) - 1
        each = self.mapped_bytes // len(self) if in_order else BYTES_AROUND * columns
        if min(self._bytes_read, self.mapped_bytes) > RELEASE_BYTES:
            self.release()
        self._bytes_read += each * len(numbers)
        self._next = numbers[-1] + 1

    def select(self, numbers: np.ndarray) -> None:
        """Have only these rows from now on."""
        self._dataset = self._dataset.select(numbers)

    def narrow(self, columns: Sequence[str]) -> None:
        """Read no other columns from now on."""
        self._dataset = self._dataset.select_columns([c for c in self.column_names if c in columns])

    @functools.cached_property
    def mapped_bytes(self) -> int:
        """Most memory that reading can take until `release`."""
        return sum(os.path.getsize(file["filename"]) for file in self._dataset.cache_files)

    def release(self) -> None:
        """Give back the memory of the pages that were read."""
        self._bytes_read = 0
        release_pages(file["filename"] for file in self._dataset.cache_files)


class TextTable(Table):
    """The rows of text files, one file below the other; in messages they keep their number in the file.

    Raises:
        UserError: a file has no rows, or the first have no JSON object.
    """

    def __init__(self, name: str, files: Sequence[Path]) -> None:
        import datasets

        parts = [convert(path) for path in files]
        super().__init__(datasets.concatenate_datasets(parts), name, files)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._texts = self._dataset.data.column("text")
        self._numbers = np.arange(len(self._texts))
        first = (json.loads(text.as_py()) for text in self._texts[:SAMPLED_ROWS])
        self.column_names = list(
            dict.fromkeys(k for cells in first if isinstance(cells, dict) for k in cells)
        )
        if not self.column_names:
            problem = json.loads(self._texts[0].as_py())
            raise UserError(
                f"data file {files[0]} has no row that is a JSON object (row 0: {problem}); read are an "
                "object a line, an array of objects, {data: [...]}, and one object of columns"
            )

    def __len__(self) -> int:
        return len(self._numbers)

    def where(self, number: int) -> str:
        row = int(self._numbers[number])
        file = int(np.searchsorted(self._starts, row, "right")) - 1
        return f"{self.files[file]} row {row - self._starts[file]}"

    def _read(self, numbers: Sequence[int]) -> list[dict[str, Any] | str]:
        """Rows, or what is wrong with them."""
        self._count(numbers, 1)
        return [json.loads(self._texts[int(self._numbers[number])].as_py()) for number in numbers]

    def cells(self, number: int) -> dict[str, Any]:
        (cells,) = self._read([number])
        if isinstance(cells, str):
            raise ValueError(cells)
        return cells

    def column(self, name: str, numbers: Sequence[int]) -> list[Any]:
        return [None if isinstance(cells, str) else cells.get(name) for cells in self._read(numbers)]

    def select(self, numbers: np.ndarray) -> None:
        self._numbers = self._numbers[numbers]

    def narrow(self, columns: Sequence[str]) -> None:
        """Nothing: a row is one text."""


def release_pages(files: Iterable[str]) -> None:
    """Give back the pages of all read-only mappings of these files, which count as a process's memory as far
    as they were read. The next access maps them again, from the system's page cache. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    wanted = {os.path.realpath(file) for file in files}
    libc = ctypes.CDLL(None)
    with open("/proc/self/maps") as maps:
        for line in maps:
            # address range, permissions, offset, device, inode, path
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5] in wanted and "w" not in fields[1]:
                start, end = (int(address, 16) for address in fields[0].split("-"))
                length = ctypes.c_size_t(end - start)
                libc.madvise(ctypes.c_void_p(start), length, mmap.MADV_DONTNEED)
