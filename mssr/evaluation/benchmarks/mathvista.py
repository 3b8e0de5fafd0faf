"""MathVista (arXiv 2310.02255), testmini: 1000 questions of 28 data sets.

The prompt is the official column ``query``, which holds the hint on the form of the answer, and the options.
An answer is normalised and compared as by the official script (`scoring.mathvista_choice`,
`scoring.mathvista_number`): an option by its letter, else the text at the smallest edit distance; an integer
by cutting decimals off; a float by rounding to ``precision`` decimals; a list by its numbers. The official
script has a language model extract the answer, here it is taken from the box (see `scoring`), and units,
percent signs and thousands separators are taken off. Breakdown: task, question type and answer type.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mssr.data.images import ImageSource
from mssr.evaluation import scoring
from mssr.evaluation.base import Benchmark
from mssr.evaluation.cells import dict_cell, list_cell, optional_cell, text_cell
from mssr.evaluation.items import Item, Kind, Verdict
from mssr.evaluation.local_data import Location
from mssr.evaluation.registry import register

_KINDS: dict[str, Kind] = {"integer": "number", "float": "number", "list": "list", "text": "text"}


@register("mathvista")
class MathVista(Benchmark):
    """Columns: pid, question, image, decoded_image, choices, unit, precision, answer, question_type,
    answer_type, metadata (category, context, grade, language, skills, source, split, task), query."""

    location = Location("AI4Math/MathVista", "testmini")
    id_column = "pid"
    question_column = "query"
    image_columns = ("decoded_image", "image")
    breakdowns = ("task", "question_type", "answer_type")

    def item(self, cells: dict[str, Any], images: tuple[ImageSource, ...], where: str) -> Item:
        item = super().item(cells, images, where)
        choices = list_cell(cells.get("choices"))
        question_type, answer_type = text_cell(cells, "question_type"), text_cell(cells, "answer_type")
        if answer_type not in _KINDS:
            raise ValueError(f"answer_type {answer_type!r} is none of {', '.join(_KINDS)}")
        multiple = question_type == "multi_choice"
        if multiple and item.answer not in (choice.strip() for choice in choices):
            raise ValueError(f"the answer {item.answer!r} is none of the choices")
        task = dict_cell(cells.get("metadata")).get("task", "")
        return replace(
            item,
            choices=choices,
            kind="choice" if multiple else _KINDS[answer_type],
            tags={"task": str(task), "question_type": question_type, "answer_type": answer_type},
            metadata={"precision": _precision(cells, item.answer) if answer_type == "float" else None},
        )

    def rule(self, item: Item) -> str:
        return f"mathvista_{item.kind}"

    def is_right(self, item: Item, answer: str) -> bool:
        if item.kind == "choice":
            return scoring.mathvista_choice(answer, item.choices).strip() == item.answer
        if item.kind == "number":
            return scoring.mathvista_number(answer, item.answer, item.metadata["precision"])
        return super().is_right(item, answer)

    def undecided(self, item: Item, verdict: Verdict) -> bool:
        """As the official script, which always decides once there is an answer; words in free form may be
        judged."""
        if verdict.status == "wrong" and item.kind != "text":
            return False
        return super().undecided(item, verdict)


def _precision(cells: dict[str, Any], answer: str) -> int:
    """Decimals of a float answer; those that it is written with, where the column is empty."""
    text = optional_cell(cells, "precision")
    return int(float(text)) if text else len(answer.partition(".")[2])
