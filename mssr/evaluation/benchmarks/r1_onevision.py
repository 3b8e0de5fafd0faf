"""R1-Onevision-Bench (arXiv 2503.10615): 942 school and college questions of five subjects, in one split that
is called train, pictures as base64.

The prompt is the question with its hint and options (options of the column ``choices`` are put behind it
where the question lacks them). The official score is a language model's; here a question whose answer is
an option goes by letter or option text, any other by the rule `math`, and a judge may be asked for the rest.
Breakdown: category (subject) and level.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mssr.data.images import ImageSource
from mssr.evaluation import scoring
from mssr.evaluation.base import Benchmark
from mssr.evaluation.cells import list_cell
from mssr.evaluation.items import Item
from mssr.evaluation.local_data import Location
from mssr.evaluation.registry import register


@register("r1_onevision")
class R1OnevisionBench(Benchmark):
    """Columns: index, question, answer, level, category, image, and in some copies choices."""

    location = Location("Fancy-MLLM/R1-Onevision-Bench", "train")
    id_column = "index"
    image_columns = ("image", "image_path")
    breakdowns = ("category", "level")

    def item(self, cells: dict[str, Any], images: tuple[ImageSource, ...], where: str) -> Item:
        item = super().item(cells, images, where)
        question, answer = item.question, item.answer
        choices = scoring.options(question)
        if not choices and (choices := _choices(cells)):
            listed = "\n".join(f"({scoring.LETTERS[i]}) {text}" for i, text in enumerate(choices))
            question = f"{question}\nChoices:\n{listed}"
        kind = scoring.choice_kind(choices, answer)
        position = scoring.by_text(answer, choices) if kind == "math" else None
        if position is not None:  # the answer is an option's text
            kind, answer = "choice", scoring.LETTERS[position]
        return replace(item, question=question, answer=answer, choices=choices, kind=kind)


def _choices(cells: dict[str, Any]) -> tuple[str, ...]:
    """Of the column choices: a list, the text of one, or a text that lists the options by letter."""
    cell = cells.get("choices")
    if isinstance(cell, str):
        listed = scoring.options(cell)
        if listed or not cell.strip().startswith("["):
            return listed
    return list_cell(cell)
