"""The columns of a table with question, truth and images: as configured, else as message lists have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mssr.config.data import DataConfig
from mssr.data.images import image_cells, looks_like_image
from mssr.data.messages import IMAGE_MARK, is_messages
from mssr.data.rows import cell
from mssr.errors import UserError

if TYPE_CHECKING:
    from mssr.data.sources import Table

SAMPLED_ROWS = 16
"""Rows, spread over the table, whose cells tell what a column holds."""

MESSAGES = ("messages", "conversations", "prompt", "conversation")
TRUTHS = ("reward_model.ground_truth", "ground_truth", "solution")
"""Names that are tried, in this order, where a configured name is the default and the table has no such
column; in a table of message lists only."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What of a table is read."""

    config: DataConfig
    """With the columns that the table has."""
    notes: tuple[str, ...]
    """Lines that tell the user what was found."""
    unread_images: str | None
    """A column with images that is not read."""

    def refuse_blindness(self, name: str, without: str) -> None:
        """For a source of this name in which no row has an image (``without``: "no", "no usable image in"): a
        UserError if there are some in a column that is not read, since a model would learn without seeing."""
        if (column := self.unread_images) is not None:
            raise UserError(
                f"{name}: {without} column {self.config.images_column!r} (data.images_column), but there is "
                f"a column {column!r} with images; set data.images_column={column}, or "
                "data.images_column=null to go on without seeing them"
            )


def resolve_columns(table: Table, config: DataConfig, name: str) -> Columns:
    """Find the configured columns of the source of this name.

    Raises:
        UserError: a column is not there; the one of images is not, and there are images in another.
    """
    rows = _sample(table)
    config = replace(config, **_chat_columns(table, config, rows))
    for key in ("problem_column", "answer_column", "id_column"):
        column = getattr(config, key)
        if not _has(table, column) and (column or key != "id_column"):
            remedy = "; null takes a hash of the content" if key == "id_column" else ""
            present = ", ".join(map(repr, table.column_names))
            raise UserError(
                f"{name} has no column {column!r} (data.{key}{remedy}); its columns are {present}"
            )
    has_images = _has(table, config.images_column)
    notes = []
    if _holds_messages(rows, config.problem_column):
        own = config.answer_column == config.problem_column
        truth = "the assistant's turn behind it" if own else f"column {config.answer_column}"
        images = f"column {config.images_column}" if has_images else "their parts"
        notes.append(
            f"{name}: column {config.problem_column} holds messages: the question is the user's last turn, "
            f"turns before it stay before it, the truth is {truth}, images are those of {images}"
        )
    if config.image_marks == "literal" and any(_marks_beside_images(row, config) for row in rows):
        notes.append(
            f"{name}: there are questions with images that hold {IMAGE_MARK}; it stays text "
            "(data.image_marks=literal)"
        )
    unread = unread_images(table, read_columns(config), rows) if config.images_column else None
    if has_images and unread is not None:
        notes.append(f"{name}: column {unread!r} holds images, too, and is not read")
    columns = Columns(config, tuple(notes), unread)
    if not has_images:
        columns.refuse_blindness(name, "no")
    return columns


def read_columns(config: DataConfig) -> list[str]:
    """The configured names, the id first."""
    names = (config.id_column, config.problem_column, config.answer_column, config.images_column)
    return [name for name in names if name]


def unread_images(
    table: Table, read: Sequence[str], rows: Sequence[Mapping[str, Any]] | None = None
) -> str | None:
    """A column with images beside those that are ``read``, as far as some rows (or ``rows``) tell."""
    known = {root(column, table.column_names) for column in read}
    rows = _sample(table) if rows is None else rows
    others = (name for name in table.column_names if name not in known)
    return next((name for name in others if any(looks_like_image(row.get(name)) for row in rows)), None)


def root(column: str, present: Sequence[str]) -> str:
    """The column of the table that ``column.key`` is in."""
    return column if column in present else column.partition(".")[0]


def _chat_columns(table: Table, config: DataConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of the config to change where a table holds message lists."""
    default = DataConfig()
    found: dict[str, Any] = {}
    problem = config.problem_column
    if problem == default.problem_column and not _has(table, problem):
        problem = next((n for n in MESSAGES if _holds_messages(rows, n)), problem)
        found["problem_column"] = problem
    if not _holds_messages(rows, problem):
        return {}
    if config.answer_column == default.answer_column and not _has(table, config.answer_column):
        named = (n for n in TRUTHS if any(cell(row, n) is not None for row in rows))
        found["answer_column"] = next(named, problem)
    images = config.images_column
    if images == default.images_column and not _has(table, images) and _has(table, "image"):
        found["images_column"] = "image"
    return found


def _holds_messages(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    return any(is_messages(cell(row, column)) for row in rows)


def _marks_beside_images(row: Mapping[str, Any], config: DataConfig) -> bool:
    images = cell(row, config.images_column)
    return IMAGE_MARK in str(cell(row, config.problem_column)) and bool(image_cells(images))


def _has(table: Table, column: str | None) -> bool:
    return column is not None and root(column, table.column_names) in table.column_names


def _sample(table: Table) -> list[dict[str, Any]]:
    """The cells of some rows; those that cannot be read are bad rows, which others say."""
    rows = []
    for number in np.unique(np.linspace(0, len(table) - 1, SAMPLED_ROWS).astype(int)):
        try:
            rows.append(table.cells(int(number)))
        except Exception:  # pyarrow raises many types; the check of all rows says which row and why
            continue
    return rows
