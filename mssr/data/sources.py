"""Names of data -> tables. What `data.train` and `data.val` may be, and how each form is opened.

A source is one of

- a file: .parquet, .arrow, .json (an array of objects, or one object a line), .jsonl, .csv, .tsv;
- a directory: a saved data set, a dictionary of saved data sets (then ``dir@split``), or a folder with
  data files in the layout of the hub;
- ``hub/name@split`` or ``hub/name:config@split``, opened by the same code as a folder.

``@split`` may carry a slice: ``train[:500]``, ``train[10%:]``. A file is one split, ``train`` (or the
file's own name without its ending); a directory without ``@split`` means ``train`` where there are
several.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mssr.data.images import local_path, reason
from mssr.data.tables import Table, TextTable
from mssr.data.text_rows import TEXT_SUFFIXES
from mssr.errors import UserError

ARROW_SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}
APART_BYTES = 64 * 2**20
"""Files of this size together are converted in a process of their own."""

FILE_SUFFIXES = (*ARROW_SUFFIXES, *TEXT_SUFFIXES)


@dataclass(frozen=True, slots=True)
class Source:
    """One source of prompts, as the user named it.

    Example: ``Source("data/geometry3k@train", weight=2.0)``
    """

    name: str
    weight: float | None = None
    """Share of the drawn prompts, relative to the other sources'; None where no source has one."""

    @property
    def label(self) -> str:
        """A short name that other sources do not change: last part of the path, and a hash of it all."""
        path = self.name.rpartition("@")[0] or self.name
        return f"{Path(path).stem or 'data'}-{hashlib.blake2b(self.name.encode(), digest_size=3).hexdigest()}"


def parse_sources(value: Any, key: str) -> list[Source]:
    """The sources of a config value, which is a string, or a list of strings and mappings {path, weight}.

    Raises:
        UserError: names the ``key``, data.train or data.val; weights are for the former.
    """
    items = [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(items, Sequence) or not items:
        raise UserError(f"{key}: expected a source or a list of sources, not {value!r}")
    sources = [_parse_source(item, key) for item in items]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{key}: {twice} is listed twice; {{path: ..., weight: 2.0}} draws it more often")
    if all(source.weight is None for source in sources):
        return sources
    return [Source(source.name, 1.0 if source.weight is None else source.weight) for source in sources]


def _parse_source(item: Any, key: str) -> Source:
    entry = item if isinstance(item, Mapping) else {"path": item}
    unknown = sorted(str(k) for k in entry if k not in ("path", "weight"))
    if unknown or "path" not in entry:
        problem = f"unknown key {unknown[0]!r}" if unknown else "no path"
        raise UserError(f"{key}: {problem} in {dict(entry)}; an entry is {{path: ..., weight: 2.0}}")
    path, weight = entry["path"], entry.get("weight")
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"{key}: {path!r} is not the name of a source")
    if weight is None:
        return Source(path.strip())
    if type(weight) not in (int, float):
        raise UserError(f"{key}: weight {weight!r} of {path} is not a number")
    if not 0 < weight < math.inf:
        raise UserError(f"{key}: weight {weight} of {path} must be above 0")
    if key != "data.train":
        raise UserError(f"{key}: {path} has a weight, but only data.train is drawn by weights")
    return Source(path.strip(), float(weight))


def open_table(name: str) -> Table:
    """Open a source.

    Raises:
        UserError: it does not exist or cannot be opened, in one line.
    """
    if name.startswith("file://"):
        name = local_path(name)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", name):
        raise UserError(
            f"data {name} is an address; download it and name the file, or name a data set of the hub as "
            "owner/name@split"
        )
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors become our lines
    path, split = split_name(name)
    try:
        if path.is_file():
            return _open_file(path, split, name)
        if path.is_dir():
            return _open_directory(path, split, name)
        if path.suffix in FILE_SUFFIXES:
            raise UserError(f"data file {path} does not exist")
        if not split:
            raise UserError(f"data {name} is neither a file, a directory nor hub/name@split")
        hub_name, _, config = str(path).partition(":")
        return _load({"path": hub_name, "name": config or None}, split, name)
    except Exception as error:  # datasets raises many types; the user needs the source and the reason
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(cause, UserError):
            raise cause from None
        raise UserError(f"data {name} cannot be opened: {reason(cause)}") from error


def split_name(name: str) -> tuple[Path, str]:
    """Path and split, of a name that may contain @ itself."""
    if "@" in name and not Path(name).exists():
        path, _, split = name.rpartition("@")
        return Path(path), split
    return Path(name), ""


def _open_file(path: Path, split: str, name: str) -> Table:
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise UserError(f"data file {path}: expected one of {', '.join(FILE_SUFFIXES)}")
    if split and _base(split) not in ("train", path.stem):
        raise UserError(f"data {name}: a file is one split, so leave @{split} out or call it train")
    if suffix in TEXT_SUFFIXES:
        return _sliced(TextTable(name, [path]), split)
    split = split or "train"
    return _load({"path": ARROW_SUFFIXES[suffix], "data_files": {_base(split): str(path)}}, split, name)


def _open_directory(path: Path, split: str, name: str) -> Table:
    import datasets

    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        base = _base(split) or _default_split(list(saved), name)
        _check_split(base, saved, name)
        return _sliced(Table(saved[base], name, _files(path / base)), split)
    if (path / "state.json").is_file():
        dataset = datasets.load_from_disk(str(path))
        if split and _base(split) not in ("train", path.name, str(dataset.split)):
            raise UserError(f"data {name}: {path} is a single saved split, so leave @{split} out")
        return _sliced(Table(dataset, name, _files(path)), split)
    return _load({"path": str(path)}, split, name)


def _load(arguments: dict[str, Any], split: str, name: str) -> Table:
    """A file, a folder or a hub name, as ``arguments`` of `datasets.load_dataset`: splits and files are found
    by the rules of the hub."""
    import datasets

    builder = datasets.load_dataset_builder(**arguments)
    listed = {str(k): [str(f) for f in v] for k, v in (builder.config.data_files or {}).items()}
    split = split or _default_split(list(listed), name)
    bases = [_base(part) for part in split.split("+")]
    for base in bases if listed else []:
        _check_split(base, listed, name)
    paths = [Path(file) for base in bases for file in listed.get(base, [])]
    local = bool(paths) and all(path.is_file() for path in paths)
    if local and len(bases) == 1 and all(path.suffix.lower() in TEXT_SUFFIXES for path in paths):
        return _sliced(TextTable(name, paths), split)
    size = sum(path.stat().st_size for path in paths) if local else 0
    if size >= APART_BYTES and not Path(builder.cache_dir).is_dir():
        _convert_apart(arguments)
    return Table(datasets.load_dataset(**arguments, split=split), name, paths if local else [])


def _convert_apart(arguments: dict[str, Any]) -> None:
    """Have `datasets` convert files to Arrow in another process, which may take their size in memory. Of a
    failure the caller hears when it opens the data."""
    program = (
        "import datasets, json, sys; datasets.disable_progress_bars(); "
        "datasets.load_dataset_builder(**json.load(sys.stdin)).download_and_prepare()"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, input=json.dumps(arguments), text=True, capture_output=True, check=False)


def _check_split(base: str, splits: Iterable[str], name: str) -> None:
    if base not in splits:
        raise UserError(f"data {name} has no split {base!r}, it has {', '.join(splits)}")


def _default_split(splits: Sequence[str], name: str) -> str:
    if len(splits) == 1:
        return splits[0]
    if "train" in splits:
        return "train"
    raise UserError(f"data {name}: say which split, as in {name}@{splits[0] if splits else 'train'}")


def _base(split: str) -> str:
    return split.partition("[")[0]


def _sliced(table: Table, split: str) -> Table:
    if "[" in split:
        import datasets

        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({_base(split): len(table)})
        table.select(np.concatenate([np.arange(part.from_, part.to) for part in parts]))
    return table


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())
