"""The prompts of a run by id, over one source or several. Pixels stay in files until somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mssr.config.data import DataConfig
from mssr.data.cache import DataCache
from mssr.data.index import BAD, DUPLICATE, RowIndex, SourceRows
from mssr.data.rows import BadRow, Row
from mssr.data.sources import parse_sources

VAL_PREFIX = "val/"
"""Before the ids of validation rows: users number the rows of both files from 0."""


class PromptDataset:
    """The rows of ``data.train`` or ``data.val``, addressed by id: the row's own (its id column, else a hash
    of its content), behind ``geometry3k-1f08aa/``, the source's label, where there are several sources.

    Opening reads no rows. The ids are read when first asked for, from the index of an earlier check
    where there is one. `check` goes through all rows and leaves the usable ones; `keep` narrows further.

    Args:
        sources: see `mssr.data.sources.parse_sources`.
        prefix: put before every id; one that begins with ``VAL_PREFIX`` tells that this is of ``data.val``.
        every_column: let `cells` give all columns, and not only those that make a prompt.

    Raises:
        UserError: a source cannot be opened, is empty or lacks a configured column.
    """

    def __init__(
        self, sources: Any, config: DataConfig, prefix: str = "", every_column: bool = False
    ) -> None:
        self.sources, self.config, self.prefix = sources, config, prefix
        self.cache = DataCache(config.cache_dir)
        parsed = parse_sources(sources, "data.val" if prefix.startswith(VAL_PREFIX) else "data.train")
        self.parts = [SourceRows(source, config, self.cache, every_column) for source in parsed]
        self.labels = [source.label for source in parsed]
        several = len(parsed) > 1
        self._prefixes = [prefix + (f"{label}/" if several else "") for label in self.labels]
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        self._rows: dict[str, int] | None = None
        self.response_prefix = ""
        """Text of the prompt that the named rules see before a response, see `PromptEncoder`."""
        self.bad_rows: list[BadRow] = []
        """Rows that `check` found unusable."""
        self.duplicates: list[BadRow] = []
        """Rows whose content an earlier row of the source has, with that row's number."""

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._index

    @property
    def ids(self) -> list[str]:
        return list(self._index)

    @property
    def numbers(self) -> list[int]:
        """Rows of the ids, counted over all sources."""
        return list(self._index.values())

    @property
    def total_rows(self) -> int:
        """Rows of the sources, whether usable or not."""
        return int(self._starts[-1])

    @property
    def notes(self) -> list[str]:
        """What the user should hear once, one sentence each."""
        notes = [note for part in self.parts for note in part.columns.notes]
        if problem := self.cache.problem:
            notes.append(f"checked data is not kept for the next run: {problem} (data.cache_dir)")
        return notes

    @property
    def weights(self) -> dict[str, float] | None:
        """Label of a source -> its weight; None if every prompt counts the same."""
        sources = [part.source for part in self.parts]
        return {one.label: one.weight for one in sources if one.weight is not None} or None

    def source_of(self, prompt_id: str) -> str:
        """Label of the source that a prompt is from."""
        return self._find(prompt_id)[0].source.label

    def source_name(self, prompt_id: str) -> str:
        """That source, as the user named it."""
        return self._find(prompt_id)[0].source.name

    @property
    def column_names(self) -> list[str]:
        """The columns that all sources have."""
        first, *others = (part.table.column_names for part in self.parts)
        return [name for name in first if all(name in names for names in others)]

    def ids_by_source(self) -> dict[str, list[str]]:
        """Label of a source -> its ids, in the order of `ids`."""
        result: dict[str, list[str]] = {label: [] for label in self.labels}
        for prompt_id in self._index:
            result[self.source_of(prompt_id)].append(prompt_id)
        return result

    def row(self, prompt_id: str) -> Row:
        part, number = self._find(prompt_id)
        return part.row(number, prompt_id)

    def where(self, prompt_id: str) -> str:
        """File and row of a prompt."""
        part, number = self._find(prompt_id)
        return part.table.where(number)

    def cells(self, prompt_id: str) -> dict[str, Any]:
        """A row as the data has it."""
        part, number = self._find(prompt_id)
        return part.cells(number)

    def answers(self, prompt_ids: Sequence[str], as_cells: bool = False) -> list[Any]:
        """Ground truths, read without touching the images; ``as_cells``: what is no text stays as the data
        has it, else it becomes text."""
        found: dict[str, Any] = {}
        places = {i: self._find(i) for i in prompt_ids}
        for part in self.parts:
            own = {i: number for i, (one, number) in places.items() if one is part}
            found.update(zip(own, part.answers(list(own.values()), as_cells), strict=True))
        return [found[i] for i in prompt_ids]

    def keep(self, prompt_ids: Iterable[str]) -> None:
        """Narrow the set to some ids, in their order."""
        index = self._index
        self._rows = {i: index[i] for i in prompt_ids}

    def check(self) -> list[RowIndex]:
        """Check every row (or read what an earlier check said) and leave the usable ones.

        Returns the index of every source.
        """
        indexes = [part.check() for part in self.parts]
        self._rows = self._numbered(index.usable_ids for index in indexes)
        self.bad_rows, self.duplicates = [], []
        for part, index in zip(self.parts, indexes, strict=True):
            for state, listed in ((BAD, self.bad_rows), (DUPLICATE, self.duplicates)):
                listed += [BadRow(part.table.where(number), why) for number, why in index.rejected(state)]
        return indexes

    @property
    def _index(self) -> dict[str, int]:
        """Id -> number of the row, counted over all sources."""
        if self._rows is None:
            self._rows = self._numbered(part.ids() for part in self.parts)
        return self._rows

    def _numbered(self, ids_of_parts: Iterable[Sequence[str | None]]) -> dict[str, int]:
        """Id -> number of the first row that has it."""
        found: dict[str, int] = {}
        for prefix, start, ids in zip(self._prefixes, self._starts.tolist(), ids_of_parts, strict=False):
            for number, row_id in enumerate(ids, start):
                if row_id is not None:
                    found.setdefault(prefix + row_id, number)
        return found

    def _find(self, prompt_id: str) -> tuple[SourceRows, int]:
        """Its source, and the number of its row there."""
        number = self._index[prompt_id]
        part = int(np.searchsorted(self._starts, number, "right")) - 1
        return self.parts[part], number - int(self._starts[part])
