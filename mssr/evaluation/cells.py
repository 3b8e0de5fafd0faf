"""Cells of a benchmark's rows, in the forms that parquet, JSON and TSV files give them."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mssr.data.images import ImageSource
from mssr.data.rows import IMAGE_MARK


def text_cell(cells: Mapping[str, Any], column: str) -> str:
    """The text of a cell that must not be empty; numbers count as their text.

    Raises:
        ValueError: the column is not there or empty, or holds no text.
    """
    if column not in cells:
        raise ValueError(f"no column {column}")
    value = optional_cell(cells, column)
    if not value.strip():
        raise ValueError(f"column {column} is empty")
    return value


def optional_cell(cells: Mapping[str, Any], column: str) -> str:
    """The text of a cell; "" if it is empty or not there."""
    value = cells.get(column)
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"column {column} is {type(value).__name__}, not text")
    return str(value)


def question_text(text: str, images: Sequence[ImageSource], mark: str = IMAGE_MARK) -> str:
    """A question whose marks are as many as its images; otherwise they are taken out."""
    return (text if text.count(mark) in (0, len(images)) else text.replace(mark, "")).strip()


def list_cell(cell: object) -> tuple[str, ...]:
    """A cell with a list of texts, as a list or as the text of one (TSV files); () for none."""
    return tuple(str(value) for value in _literal(cell, (list, tuple), "list"))


def dict_cell(cell: object) -> dict[str, object]:
    """A cell with a mapping, or the text of one; {} for none."""
    return {str(key): value for key, value in _literal(cell, (dict,), "mapping").items()}


def _literal(cell: object, types: tuple[type, ...], what: str) -> Any:
    value = cell
    if isinstance(cell, str):
        value = cell.strip()
        for read_text in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = read_text(cell.strip())
                break
    if value is None or value == "":
        return types[0]()
    if not isinstance(value, types):
        raise ValueError(f"{str(value)[:60]!r} is no {what}")
    return value
