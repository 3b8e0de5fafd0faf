"""JSON, JSONL, CSV and TSV files as tables: the file stays memory-mapped, a row is parsed when asked for.

Only the byte range of every row is kept. So a file may be larger than memory, cells keep the types and
the text that they have in the file ("007", "NA"), and a damaged row is one bad row, not a bad file.

JSON is read as it is found, whatever the file's ending: an object a line, objects over several lines, an
array of them. One object that holds a whole table is read where that is plain (`_rows_within`); such a file,
and one in UTF-16 or UTF-32, is held in memory.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mssr.data.messages import is_messages
from mssr.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (*DELIMITERS, *JSON_SUFFIXES)

SAMPLED_ROWS = 1000
"""Rows that are looked at for the names of a JSON file's columns."""

WRAPPERS = ("data", "rows", "examples", "items", "records", "instances", "samples", "questions", "train")
"""Keys of an object under which a file has its rows, beside others that say something about them."""

JSON_FORMS = "read are an object a line, an array of objects, {data: [...]}, and one object of columns"


class TextTable:
    """One file. Rows are numbered from 0, without the header of a CSV and without empty lines.

    Args:
        spans: (R, 2) int64, first byte of every row and the byte behind it; None finds them.

    Raises:
        UserError: the file has no rows, or is no JSON at all.
    """

    def __init__(self, path: Path, spans: np.ndarray | None = None) -> None:
        self.path = path
        self.files = [path]
        self._delimiter = DELIMITERS.get(path.suffix.lower())
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size == 0:
                raise UserError(f"data file {path} is empty")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        encoding = json.detect_encoding(mapped[:4])
        plain = encoding.startswith("utf-8")
        self._bytes: Any = mapped if plain else mapped[:].decode(encoding).encode()
        self._space_after_delimiter = False
        self.spans = self._find() if spans is None else spans
        if self._delimiter:
            self.column_names = self._header()
        else:
            self.column_names = self._json_columns()
        if not len(self):
            raise UserError(f"data file {path} has no rows")

    def __len__(self) -> int:
        return len(self.spans) - bool(self._delimiter)  # the header is span 0

    def where(self, number: int) -> str:
        return f"{self.path} row {number}"

    def cells(self, number: int) -> dict[str, Any]:
        """Column names to cells.

        Raises:
            ValueError: the row cannot be parsed.
        """
        if self._delimiter:
            values = self._csv_rows(number + 1, number + 2)[0]
            if len(values) != len(self.column_names):
                raise ValueError(f"{len(values)} fields, but the header has {len(self.column_names)}")
            return dict(zip(self.column_names, values, strict=True))
        try:
            value = _DECODER.decode(self._text(number))
        except RecursionError:
            raise ValueError("too deeply nested JSON") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"no JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"JSON {type(value).__name__}, not an object")
        return value

    def column(self, name: str, numbers: Sequence[int]) -> list[Any]:
        """Cells of one column; None where the row cannot be parsed."""
        result = []
        for number in numbers:
            try:
                result.append(self.cells(number).get(name))
            except ValueError:
                result.append(None)
        return result

    @property
    def mapped_bytes(self) -> int:
        return len(self._bytes)

    def release(self) -> None:
        """Give back the memory of the pages that were read."""
        if hasattr(self._bytes, "madvise"):
            self._bytes.madvise(mmap.MADV_DONTNEED)

    def _text(self, span: int) -> str:
        start, end = self.spans[span]
        try:
            return self._bytes[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"no UTF-8 text ({error.reason} at byte {error.start})") from None

    def _csv_rows(self, start: int, end: int) -> list[list[str]]:
        with _long_fields():
            try:
                lines = (self._text(span) for span in range(start, end))
                return [next(self._reader([line])) for line in lines]
            except csv.Error as error:
                raise ValueError(f"no CSV ({error})") from None

    def _reader(self, lines: Any) -> Iterator[list[str]]:
        assert self._delimiter is not None
        # One string may hold several lines; the reader wants them apart only outside quotes.
        skip = self._space_after_delimiter
        return csv.reader(lines, delimiter=self._delimiter, strict=True, skipinitialspace=skip)

    def _header(self) -> list[str]:
        names = [name.strip() for name in self._csv_rows(0, 1)[0]]
        for name in names:
            if name and names.count(name) > 1:
                raise UserError(f"data file {self.path} has {names.count(name)} columns {name!r}; rename one")
        return names

    def _json_columns(self) -> list[str]:
        names: dict[str, None] = {}
        problem = ""
        for number in range(min(SAMPLED_ROWS, len(self))):
            try:
                names.update(dict.fromkeys(self.cells(number)))
            except ValueError as error:
                problem = problem or f" (row {number}: {error})"
        if not names and len(self):
            raise UserError(f"data file {self.path} has no row that is a JSON object{problem}; {JSON_FORMS}")
        return list(names)

    def _find(self) -> np.ndarray:
        begin = 3 if self._bytes[:3] == b"\xef\xbb\xbf" else 0  # byte order mark
        if self._delimiter:
            spans = self._find_csv_rows(begin)
        else:
            spans = self._find_json(begin)
        return np.array(spans, np.int64).reshape(-1, 2)

    def _find_json(self, begin: int) -> list[tuple[int, int]]:
        lines = ((start, end) for start, end in self._lines(begin) if self._bytes[start:end].strip())
        first = list(itertools.islice(lines, 3))
        head = self._bytes[first[0][0] : first[0][0] + 1000].lstrip()[:1] if first else b""
        spans: list[tuple[int, int]] | None = None
        if head == b"[":
            try:
                spans = self._find_values(array=True)
            except UserError:
                if self.path.suffix.lower() == ".json":
                    raise  # else its first line may be a bad row
        elif head == b"{" and not any(_is_object(self._bytes[start:end]) for start, end in first):
            with contextlib.suppress(UserError):  # not over several lines either: lines, each a bad row
                spans = self._find_values(array=False)
        if spans is None:
            spans = [*first, *lines]
        if len(spans) == 1 and head == b"{" and _is_object(text := self._bytes[slice(*spans[0])]):
            rows = _rows_within(json.loads(text), self.path)
            if rows is not None:
                self._bytes = "".join(json.dumps(row) + "\n" for row in rows).encode()
                spans = list(self._lines(0))
        return spans

    def _lines(self, position: int) -> Iterator[tuple[int, int]]:
        size = len(self._bytes)
        while position < size:
            newline = self._bytes.find(b"\n", position)
            end = size if newline < 0 else newline + 1
            yield position, end
            position = end

    def _find_values(self, array: bool) -> list[tuple[int, int]]:
        """The items of a JSON array, or values one behind the other. The text is in memory for this time.

        Raises:
            UserError: it is something else, or does not end.
        """
        try:
            text = self._bytes[:].decode("utf-8-sig")
            skip = len(self._bytes) - len(text.encode())
            scan: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
            spans: list[tuple[int, int]] = []
            position = _skip_space(text, text.index("[") + 1 if array else 0)
            done, done_bytes = 0, skip  # characters, and the bytes they take
            while position < len(text) and not (array and text[position] == "]"):
                _, end = scan(text, position)
                start_byte = done_bytes + len(text[done:position].encode())
                end_byte = start_byte + len(text[position:end].encode())
                spans.append((start_byte, end_byte))
                done, done_bytes = end, end_byte
                position = _skip_space(text, end)
                if array and text[position : position + 1] == ",":
                    position = _skip_space(text, position + 1)
                elif array and text[position : position + 1] not in ("]", ""):
                    raise ValueError(f"no comma between items at character {position}")
            if array and position == len(text):
                raise ValueError("the JSON array does not end")
            if array and _skip_space(text, position + 1) < len(text):
                raise ValueError(f"text behind the JSON array at character {position + 1}")
            return spans
        except (ValueError, RecursionError) as error:
            raise UserError(f"data {self.path} cannot be opened: {error}") from None

    def _find_csv_rows(self, begin: int) -> list[tuple[int, int]]:
        """Rows, of which quoted line breaks make several lines one.

        A quote that is never closed would swallow the lines behind it: where lines joined by quotes do
        not have the header's number of fields, the first of them is a row of its own.
        """
        spans: list[tuple[int, int]] = []
        fields = 0
        with _long_fields():
            while begin < len(self._bytes):
                begin = self._csv_row(begin, fields, spans)
                if not fields and spans:
                    start, end = spans[0]
                    header = next(self._reader([self._bytes[start:end].decode("utf-8", "replace")]))
                    fields = len(header)
                    # "a, b" in the header: the space is part of the delimiter, in the rows too.
                    self._space_after_delimiter = any(name[:1] == " " for name in header[1:])
        return spans

    def _csv_row(self, begin: int, fields: int, spans: list[tuple[int, int]]) -> int:
        """Append the row at ``begin``, unless it is empty; return where the next one begins."""
        line_end = next(self._lines(begin))[1]
        if self._bytes.find(b'"', begin, line_end) < 0:  # nothing can join it with the next line
            if self._bytes[begin:line_end].strip(b"\r\n"):
                spans.append((begin, line_end))
            return line_end
        ends: list[int] = []

        def lines() -> Iterator[str]:
            for start, end in self._lines(begin):
                ends.append(end)
                yield self._bytes[start:end].decode("utf-8", "replace")

        try:
            values = next(self._reader(lines()))
        except csv.Error:
            values = []
            whole = False
        else:
            whole = not fields or len(values) == fields or len(ends) == 1
        end = ends[-1] if whole else ends[0]
        spans.append((begin, end))
        return end


class JoinedTable:
    """Several tables below one another; a column has to be in the first."""

    def __init__(self, tables: Sequence[TextTable]) -> None:
        self.tables = list(tables)
        self.files = [file for table in tables for file in table.files]
        self.column_names = tables[0].column_names
        self._starts = np.cumsum([0, *(len(t) for t in tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _find(self, number: int) -> tuple[TextTable, int]:
        k = int(np.searchsorted(self._starts, number, "right")) - 1
        return self.tables[k], number - int(self._starts[k])

    def where(self, number: int) -> str:
        table, own = self._find(number)
        return table.where(own)

    def cells(self, number: int) -> dict[str, Any]:
        table, own = self._find(number)
        return table.cells(own)

    def column(self, name: str, numbers: Sequence[int]) -> list[Any]:
        return [table.column(name, [own])[0] for table, own in map(self._find, numbers)]

    @property
    def mapped_bytes(self) -> int:
        return sum(table.mapped_bytes for table in self.tables)

    def release(self) -> None:
        for table in self.tables:
            table.release()


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which two equal keys would give the last value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} twice in a JSON object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


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
    rows = isinstance(part, list) and bool(part) and all(isinstance(row, dict) for row in part)
    return rows and not is_messages(part)


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module stops at 128 KiB a field, which base64 images exceed; its limit is global."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
