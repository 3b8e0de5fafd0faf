"""What a benchmark is: where its data are, how a row becomes an item, what makes a response right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from mssr.data.columns import unread_images
from mssr.data.images import ImageSource
from mssr.data.rows import Row
from mssr.data.sources import Table
from mssr.errors import UserError
from mssr.evaluation import scoring
from mssr.evaluation.cells import optional_cell, question_text, text_cell
from mssr.evaluation.items import STATUSES, Item, Status, Verdict
from mssr.evaluation.local_data import Location, open_benchmark, stored_images
from mssr.evaluation.statistics import count_right

Counts = dict[str, dict[str, tuple[int, int]]]
"""Breakdown -> group -> (right, all)."""


class Benchmark:
    """A benchmark: a location and columns, and what of the methods differs."""

    name: str = ""
    """In the registry, which sets it."""
    location: ClassVar[Location]
    id_column: ClassVar[str] = "id"
    question_column: ClassVar[str] = "question"
    answer_column: ClassVar[str] = "answer"
    image_columns: ClassVar[tuple[str, ...]] = ("image",)
    """The images of a row are those of the first of these columns that it has; () for no images."""
    breakdowns: ClassVar[tuple[str, ...]] = ()
    """The tags that `breakdown` groups by."""
    numbers_repeats: bool = True
    """Whether a row with the id of an earlier one is an item of its own; else it is an error."""
    rewarded: bool = False
    """Whether training's reward scores its responses, see `verdicts`, and not `verdict`."""

    def load(self, data_dir: Path | None = None, limit: int | None = None) -> list[Item]:
        """The items, in the order of the data.

        Args:
            data_dir: see `mssr.evaluation.local_data`; None takes the hub.
            limit: the first so many.

        Raises:
            UserError: there are no data, or a row is none of this benchmark.
        """
        return self.read(open_benchmark(self.name, self.location, data_dir), limit)

    def read(self, table: Table, limit: int | None) -> list[Item]:
        """The items of a table; every row is one, or an error that names it.

        An id that an earlier row has gets ``-2``, ``-3`` ... behind it: no row is left out.
        """
        items: list[Item] = []
        seen: Counter[str] = Counter()
        for number in range(len(table) if limit is None else min(limit, len(table))):
            try:
                item = replace(self.item_of_row(table, number), benchmark=self.name)
                seen[item.id] += 1
                if seen[item.id] > 1:
                    if not self.numbers_repeats:
                        raise ValueError(f"the id {item.id} is also that of an earlier row")
                    item = replace(item, id=f"{item.id}-{seen[item.id]}")
            except ValueError as error:
                raise UserError(f"{self.name}: {table.where(number)}: {error}") from error
            items.append(item)
        if self.image_columns and not any(item.images for item in items):
            read = (self.id_column, self.question_column, self.answer_column)
            if (column := unread_images(table, read)) is not None:
                raise UserError(
                    f"{self.name}: no image in column {' or '.join(self.image_columns)}, but column {column} "
                    f"has images: set image_columns = ({column!r},) in the class, or () to ask without them"
                )
        table.release()
        return items

    def item_of_row(self, table: Table, number: int) -> Item:
        """See `item`, which gets the row's cells and images."""
        cells = table.cells(number)
        images = stored_images(table, number, cells, self.image_columns)
        return self.item(cells, images, table.where(number))

    def item(self, cells: dict[str, Any], images: tuple[ImageSource, ...], where: str) -> Item:
        """The item of a row; this one has its columns as they are, and those of `breakdowns` as tags.

        Raises:
            ValueError: the reason why it is none.
        """
        return Item(
            benchmark=self.name,
            id=text_cell(cells, self.id_column),
            question=question_text(text_cell(cells, self.question_column), images),
            images=images,
            answer=text_cell(cells, self.answer_column).strip(),
            tags={tag: optional_cell(cells, tag) or "unknown" for tag in self.breakdowns},
            where=where,
        )

    def prompt_row(self, item: Item) -> Row:
        """What `PromptEncoder` encodes: template and instruction are added there, as in training."""
        return Row(item.id, item.question, item.answer, item.images, item.where, item.history, item.mark)

    def verdict(self, item: Item, response: str, truncated: bool = False) -> Verdict:
        """What the rules say of a response; ``truncated`` if the length limit ended it."""
        assert not self.rewarded
        answer = self.extract(item, response, truncated)
        status: Status = "truncated" if truncated else "extraction_failed"
        if answer is not None:
            status = "right" if self.is_right(item, answer) else "wrong"
        return Verdict(status == "right", answer, status, self.rule(item))

    def rule(self, item: Item) -> str:
        """Name of what decides about an item."""
        return item.kind

    def extract(self, item: Item, response: str, truncated: bool) -> str | None:
        """The final answer of a response; None if there is none."""
        if item.kind == "choice":
            return scoring.final_choice(response, item.choices, truncated=truncated)
        if item.kind == "yes_no":
            return scoring.final_yes_no(response, truncated=truncated)
        return scoring.final_text(response, truncated=truncated)

    def is_right(self, item: Item, answer: str) -> bool:
        """Whether a final answer is right, by the rule of its kind."""
        if item.kind == "choice":
            return scoring.choice(answer, item.answer, item.choices)
        if item.kind == "yes_no":
            return scoring.yes_no(answer) == item.answer
        if item.kind == "list":
            return scoring.same_list(answer, item.answer)
        return scoring.math(answer, item.answer)

    def undecided(self, item: Item, verdict: Verdict) -> bool:
        """Whether the rules leave a verdict to a judge, if there is one.

        They do for a response without a final answer, and for a wrong answer that they may not have
        understood: where an option or yes/no is asked for, one that names none; else one of which the
        answer or the truth is no plain number. A truncated response is decided.
        """
        if verdict.status == "extraction_failed":
            return True
        if verdict.status != "wrong" or verdict.extracted is None:
            return False
        if item.kind == "choice":
            return not scoring.letters_of(verdict.extracted)
        if item.kind == "yes_no":
            return scoring.yes_no(verdict.extracted) is None
        return None in (_plain(verdict.extracted), _plain(item.answer))

    def judged(self, item: Item) -> tuple[str, str]:
        """Question and ground truth as a judge sees them, in text alone."""
        return item.question.replace(item.mark, "").strip(), item.answer

    def breakdown(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Counts:
        """Right and all answers by the groups of every tag in `breakdowns`, groups sorted by name."""
        pairs = list(zip(items, verdicts, strict=True))
        return {
            tag: count_right((i.tags[tag], v.correct) for i, v in pairs if tag in i.tags)
            for tag in self.breakdowns
        }

    def metrics(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, float]:
        """``accuracy`` over all items, and the fraction of each status other than right and wrong."""
        assert len(items) == len(verdicts)
        shares = {"accuracy": sum(v.correct for v in verdicts)}
        for status in STATUSES[2:]:
            shares[status] = sum(v.status == status for v in verdicts)
        return {name: number / max(len(verdicts), 1) for name, number in shares.items()}


def _plain(text: str) -> float | None:
    try:
        return float(text.strip())
    except ValueError:
        return None
