"""MMK12 (arXiv 2503.07365), test: 2000 multiple-choice questions, 500 each of mathematics, physics, chemistry
and biology.

The prompt is the question, which lists its options. Right is the option's letter, or its text where the
question's list can be read. Breakdown: subject.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mssr.data.images import ImageSource
from mssr.evaluation import scoring
from mssr.evaluation.base import Benchmark
from mssr.evaluation.items import Item
from mssr.evaluation.local_data import Location
from mssr.evaluation.registry import register


@register("mmk12")
class MMK12(Benchmark):
    """Columns: id, question, answer, subject, image. Some questions have no image; they are asked too."""

    location = Location("FanqingM/MMK12", "test")
    breakdowns = ("subject",)

    def item(self, cells: dict[str, Any], images: tuple[ImageSource, ...], where: str) -> Item:
        item = super().item(cells, images, where)
        choices = scoring.options(item.question)
        if scoring.choice_kind(choices, item.answer) != "choice":  # the list was not read to its end
            choices = ()
        return replace(item, choices=choices, kind="choice")
