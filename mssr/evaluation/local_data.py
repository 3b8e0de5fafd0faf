"""The data of a benchmark: found under a directory or on the hub, and its images read when asked for.

``--data-dir DIR`` is searched for a file ``NAME`` of one of the `SUFFIXES` (in their order), then a directory
``NAME``, then both under ``DIR/OWNER`` of the hub. Names are compared without case, ``-`` and ``_``, and a
benchmark has those of its registry entry and of its data set (``mathverse``, ``MathVerse``). In a directory:
a data set that the `datasets` library saved; else a file ``SPLIT`` or ``NAME``, also in its folder ``data``;
else whatever `datasets` finds there by the rules of the hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mssr.data.images import ImageSource, MissingFile, image_cells, image_sources, inner_image
from mssr.data.sources import Table, open_table
from mssr.errors import UserError

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".tsv", ".csv")


@dataclass(frozen=True, slots=True)
class Location:
    """Where a benchmark's data are. Example: ``Location("AI4Math/MathVerse", "testmini", "testmini")``"""

    hub: str
    """Owner and name on the hub."""
    split: str
    config: str | None = None
    """Configuration on the hub, if it has several."""

    @property
    def hub_source(self) -> str:
        """As `mssr.data.sources` writes it."""
        return f"{self.hub}:{self.config}@{self.split}" if self.config else f"{self.hub}@{self.split}"


@dataclass(frozen=True, slots=True)
class StoredImage(ImageSource):
    """An image of a table's cell, read from the table when asked for; it holds no bytes itself."""

    table: Any = field(default=None, compare=False, repr=False)
    row: int = 0
    column: str = ""
    position: int = 0
    """Of the image in a cell with several."""

    def read(self) -> bytes:
        cell = self.table.cells(self.row)[self.column]
        return _images(cell, self.table)[self.position].read()


def open_benchmark(name: str, location: Location, data_dir: Path | None) -> Table:
    """The table of a benchmark, local or from the hub.

    Raises:
        UserError: as `find`; or what is there cannot be opened.
    """
    source = find(name, location, data_dir) if data_dir else location.hub_source
    try:
        return open_table(source)
    except UserError as error:
        hint = "" if data_dir else " (a local copy is read with --data-dir)"
        raise UserError(f"{name}: {error}{hint}") from error


def find(name: str, location: Location, data_dir: Path) -> str:
    """What `mssr.data.sources.open_table` opens for a benchmark, under a directory.

    Raises:
        UserError: there is nothing, with the list of places.
    """
    if not data_dir.is_dir():
        raise UserError(f"{name}: --data-dir {data_dir} is no directory")
    owner, _, base = location.hub.partition("/")
    names = {_key(n) for n in (name, base)}
    for folder in (data_dir, *_named(data_dir, {_key(owner)})):
        if file := _file(folder, names):
            return file
        for path in _named(folder, names):
            return _in_directory(path, names, location.split)
    tried = ", ".join(dict.fromkeys(f"{n}{{{','.join(SUFFIXES)}}} or {n}/" for n in (name, base)))
    raise UserError(
        f"{name}: no data in {data_dir}; looked for {tried}, there and in {owner}/ "
        f"(without --data-dir {location.hub} is taken from the hub)"
    )


def _in_directory(path: Path, names: set[str], split: str) -> str:
    if (path / "state.json").is_file():
        return str(path)
    if not (path / "dataset_dict.json").is_file():
        for folder in (path, path / "data"):
            if file := _file(folder, {_key(split)}) or _file(folder, names):
                return file
    return f"{path}@{split}"


def _named(folder: Path, names: set[str]) -> list[Path]:
    """The directories of these names."""
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and _key(path.name) in names]


def _file(folder: Path, names: set[str]) -> str | None:
    """The file of one of the names whose kind comes first in `SUFFIXES`."""
    files = [p for p in folder.glob("*.*") if p.suffix.lower() in SUFFIXES and _key(p.stem) in names]
    found = sorted((SUFFIXES.index(p.suffix.lower()), str(p)) for p in files if p.is_file())
    return found[0][1] if found else None


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.casefold())


def stored_images(
    table: Table, row: int, cells: dict[str, Any], columns: Sequence[str]
) -> tuple[ImageSource, ...]:
    """The images of a row, of the first of the columns that it has; none for an empty cell.

    Relative paths start at the data file's folder, its ``images``, or its parent.

    Raises:
        ValueError: an image is of no known form, or its file is not there.
    """
    for column in columns:
        if column in cells:
            count = len(_images(cells[column], table))
            return tuple(StoredImage(None, None, table, row, column, k) for k in range(count))
    return ()


def _images(cell: Any, table: Table) -> tuple[ImageSource, ...]:
    parts = image_cells(cell)
    # An image that is not null may still be none: {"bytes": None, "path": None}, NaN.
    if all(image is None or image != image for image in map(inner_image, parts)):
        return ()
    folders = [Path(".")]
    if table.files:
        parent = table.files[0].parent
        folders = [parent, parent / "images", parent.parent, *folders]
    missing = []
    for folder in folders:
        try:
            return image_sources(parts, str(folder))
        except MissingFile as error:
            missing.append(error)
    raise missing[0]
