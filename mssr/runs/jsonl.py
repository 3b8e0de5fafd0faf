"""Files with one JSON object a line, which runs append to and a crash may cut off.

samples/step-000010.jsonl   questions, responses and scores of a step, of training and validation sets
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mssr.errors import UserError


def to_lines(records: Iterable[dict[str, Any]]) -> str:
    """As they are in the file."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line; one that a crash cut off before stays a line of its own."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(to_lines([record]).encode())


def read_records(path: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The objects of a file, one a line.

    Args:
        skip_damaged: leave out lines that are none, as one that a crash cut off.

    Raises:
        UserError: a line is damaged; it is named by its number.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace" if skip_damaged else "strict")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    # (Split at \n alone: a text may hold other characters that end a line for Python.)
    lines = text.removesuffix("\n").split("\n") if text else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            if not skip_damaged:
                raise UserError(f"{path} line {number} is damaged: {error}") from error
        else:
            records.append(record)
    return records


def write_samples(path: Path, samples: Iterable[dict[str, Any]], split: str) -> None:
    """Put a split's samples into a step's file, beside the other splits'.

    A step that is computed again after a resume replaces its own.
    """
    others = [x for x in read_records(path) if x["split"] != split] if path.is_file() else []
    path.write_text(to_lines([*others, *samples]), encoding="utf-8")
