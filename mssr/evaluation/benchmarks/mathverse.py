"""MathVerse (arXiv 2403.14624), testmini: 788 problems in five versions that move text into the picture.

The prompt is the official column ``query_cot``; "Vision Only" problems have their question in the picture.
The official score is a language model's; here multiple choice goes by letter or option text, free form by
the rule `math`, and a judge may be asked for the rest. Breakdown: problem version (its mean over the five
versions, "ALL" in the paper, is the accuracy, since they have as many items each) and question type.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mssr.data.images import ImageSource
from mssr.evaluation import scoring
from mssr.evaluation.base import Benchmark
from mssr.evaluation.cells import optional_cell, text_cell
from mssr.evaluation.items import Item
from mssr.evaluation.local_data import Location
from mssr.evaluation.registry import register


@register("mathverse")
class MathVerse(Benchmark):
    """Columns: sample_index, problem_index, problem_version, question, image, answer, question_type,
    metadata, query_wo, query_cot, question_for_eval."""

    location = Location("AI4Math/MathVerse", "testmini", config="testmini")
    id_column = "sample_index"
    question_column = "query_cot"
    breakdowns = ("problem_version", "question_type")

    def item(self, cells: dict[str, Any], images: tuple[ImageSource, ...], where: str) -> Item:
        question_for_eval = optional_cell(cells, "question_for_eval")
        tags = {tag: text_cell(cells, tag) for tag in self.breakdowns}
        multiple = tags["question_type"].startswith("multi")
        return replace(
            super().item(cells, images, where),
            choices=scoring.options(question_for_eval) if multiple else (),
            kind="choice" if multiple else "math",
            tags=tags,
            metadata={"question_for_eval": question_for_eval},
        )

    def judged(self, item: Item) -> tuple[str, str]:
        """With the full question in text, which the prompt of a "Vision Only" item has not."""
        question, answer = super().judged(item)
        return item.metadata["question_for_eval"] or question, answer
