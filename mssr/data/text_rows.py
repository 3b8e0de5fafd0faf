"""JSON, JSONL, CSV and TSV files -> rows, kept memory-mapped by the `datasets` library, each as a JSON text.

So a file may be larger than memory, cells have the types and the text that they have in the file ("007",
"NA"), and a damaged row is one bad row. The readers of `datasets` and pandas refuse such a file whole, or
take the rows behind the damage with it.

JSON is read as it is found, whatever the file's ending: an object a line, objects over several lines, an
array of them. One object that holds a whole table is read where that is plain (`_rows_within`). All but
objects a line, and any text in UTF-16 or UTF-32, is held in memory while it is converted.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mssr.data.cache import settled_state
from mssr.data.messages import is_messages
from mssr.errors import UserError
from mssr.models.files import sha256

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIXES = (*DELIMITERS, ".json", ".jsonl", ".ndjson")

VERSION = 1
"""Part of the names in the cache: raise it when the same file would give other rows."""

ROWS_IN_MEMORY = 100
"""Rows that are held while a file is converted; one may have images inside."""

WRAPPERS = ("data", "rows", "examples", "items", "records", "instances", "samples", "questions", "train")
"""Keys of an object under which a file has its rows, beside others that say something about them."""

_NO_SPACE = re.compile(r"\S")

csv.field_size_limit(sys.maxsize)  # it is 128 KiB, which base64 images exceed


def convert(path: Path) -> Any:
    """A `datasets.Dataset` of one column ``text``: a row's JSON object, or a JSON string, why it is none; in
    the order of the file, without the header of a CSV and without empty lines.

    Raises:
        UserError: the file has no rows, or is a JSON array that ends early.
    """
    import datasets

    if path.stat().st_size == 0:
        raise UserError(f"data file {path} is empty")
    content = settled_state(path) or sha256(path)[:32]

    def examples() -> Iterator[dict[str, str]]:
        delimiter = DELIMITERS.get(path.suffix.lower())
        empty = True
        for row in _csv_rows(path, delimiter) if delimiter else _json_rows(path):
            empty = False
            yield {"text": _text(row)}
        if empty:
            raise UserError(f"data file {path} has no rows")

    return datasets.Dataset.from_generator(
        examples,
        features=datasets.Features(text=datasets.Value("large_string")),
        fingerprint=f"mssr-rows-{VERSION}{path.suffix.lower()}-{content}",
        writer_batch_size=ROWS_IN_MEMORY,
    )


def _text(row: Any) -> str:
    try:
        if isinstance(row, (dict, ValueError)):
            return _ENCODER.encode(row)
        raise ValueError(f"JSON {type(row).__name__}, not an object")
    except ValueError as error:
        return json.dumps(str(error))


def _raise(error: ValueError) -> NoReturn:
    raise error


_ENCODER = json.JSONEncoder(default=_raise)
"""Of rows in which a `ValueError` stands for what is damaged."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | ValueError:
    """A JSON object, of which two equal keys would give the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        return ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} twice in a JSON object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _open(path: Path) -> BinaryIO:
    """The file in UTF-8, without a byte order mark."""
    file = path.open("rb")
    encoding = json.detect_encoding(file.read(4))
    if encoding in ("utf-8", "utf-8-sig"):
        file.seek(3 if encoding == "utf-8-sig" else 0)
        return file
    with file:
        file.seek(0)
        return io.BytesIO(file.read().decode(encoding).encode())


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, str] | ValueError]:
    """Rows, of which quoted line breaks make several lines one.

    A quote that is never closed would swallow the lines behind it: where lines joined by quotes do not have
    the header's number of fields, the first of them is a row of its own.
    """
    header: list[str] = []
    space = False

    def record(lines: Iterable[bytes]) -> tuple[list[str] | ValueError | None, int]:
        """The first, None if there is none; and how many lines it has."""
        texts = (line.decode(errors="surrogateescape") for line in lines)
        reader = csv.reader(texts, delimiter=delimiter, strict=True, skipinitialspace=space)
        try:
            found = next(reader, None)
            "".join(found or []).encode()
        except csv.Error as error:
            return ValueError(f"no CSV ({error})"), reader.line_num
        except UnicodeEncodeError:
            return ValueError("no UTF-8 text"), reader.line_num
        if header and found and len(found) != len(header):
            return ValueError(f"{len(found)} fields, but the header has {len(header)}"), reader.line_num
        return found, reader.line_num

    with _open(path) as file:
        while True:
            begin = file.tell()
            row, lines = record(iter(file.readline, b""))
            if row is None:
                return
            if isinstance(row, ValueError) and lines > 1:
                file.seek(begin)
                row, _ = record([file.readline()])
            if header and row:
                yield row if isinstance(row, ValueError) else dict(zip(header, row, strict=True))
            elif isinstance(row, ValueError):
                raise row
            elif row and not space and any(name[:1] == " " for name in row[1:]):
                space = True  # "a, b" in the header: the space is part of the delimiter, in the rows too
                file.seek(begin)
            elif row:
                header = [name.strip() for name in row]
                for name in filter(None, header):
                    if (count := header.count(name)) > 1:
                        raise UserError(f"data file {path} has {count} columns {name!r}; rename one")


def _json_rows(path: Path) -> Iterator[Any]:
    """What a file holds; a `ValueError` for what is no JSON."""
    lines = _lines(path)
    first = list(itertools.islice(lines, 3))
    values = [_value(line) for line in first]
    rows: Iterator[Any] = itertools.chain(values, map(_value, lines))
    array = bool(first) and first[0].lstrip()[:1] == b"["
    if array or not any(isinstance(value, dict) for value in values):
        try:
            rows = iter(_whole(path, array))
        except (ValueError, RecursionError) as error:  # then lines, each a bad row, or only the first
            if array and path.suffix.lower() == ".json":
                raise UserError(f"data {path} cannot be opened: {error}") from None
    head = list(itertools.islice(rows, 2))
    if len(head) == 1 and isinstance(head[0], dict):
        within = _rows_within(head[0], path)
        return iter(head if within is None else within)
    return itertools.chain(head, rows)


def _lines(path: Path) -> Iterator[bytes]:
    with _open(path) as file:
        yield from (line for line in file if line.strip())


def _value(line: bytes) -> Any:
    try:
        return _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return ValueError(f"no UTF-8 text ({error.reason} at byte {error.start})")
    except RecursionError:
        return ValueError("too deeply nested JSON")
    except ValueError as error:
        return ValueError(f"no JSON ({error})")


def _whole(path: Path, array: bool) -> list[Any]:
    """The items of an array, or values one behind the other, over any number of lines; a ValueError where it
    is something else, or does not end."""
    with _open(path) as file:
        text = file.read().decode().strip()
    values: list[Any] = []
    end = 0
    while begin := _NO_SPACE.search(text, end):
        if array and values:
            raise ValueError(f"text behind the JSON array at character {begin.start()}")
        value, end = _DECODER.raw_decode(text, begin.start())
        values.append(value)
    return values[0] if array else values


def _rows_within(value: dict[str, Any], path: Path) -> list[dict[str, Any]] | None:
    """The rows of a table that is one JSON object; None where the object is itself a row.

    Read are ``{"data": [{...}, ...], ...}`` (or another of `WRAPPERS`, or any only key), columns as lists of
    one length, and what pandas writes: columns or rows by number, ``{"columns": [...], "data": [[...]]}``.

    Raises:
        UserError: it holds several tables, or columns of different lengths.
    """
    if not value:
        return None
    columns, cells = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(cells, list) and all(isinstance(c, list) for c in cells):
        return [dict(zip(columns, row, strict=True)) for row in cells]
    tables = [key for key, part in value.items() if _is_table(part) and (len(value) == 1 or key in WRAPPERS)]
    if len(tables) > 1:
        raise UserError(f"data file {path} holds several tables ({', '.join(tables)}); write a file for each")
    if tables:
        return list(value[tables[0]])
    parts = list(value.values())
    if all(isinstance(part, dict) for part in parts):
        if all(key.isdigit() for key in value):
            return parts
        if all(part and part.keys() == parts[0].keys() for part in parts) and all(map(str.isdigit, parts[0])):
            return [{name: column[number] for name, column in value.items()} for number in parts[0]]
    if all(isinstance(part, list) and not is_messages(part) for part in parts):
        if len({len(part) for part in parts}) > 1:
            lengths = ", ".join(f"{len(column)} {name}" for name, column in value.items())
            raise UserError(f"data file {path} is one JSON object of columns of different lengths: {lengths}")
        return [dict(zip(value, row, strict=True)) for row in zip(*parts, strict=True)]
    return None


def _is_table(part: Any) -> bool:
    rows = isinstance(part, list) and bool(part) and all(isinstance(row, (dict, ValueError)) for row in part)
    return rows and not is_messages(part)
