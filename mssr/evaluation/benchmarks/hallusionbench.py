"""HallusionBench (arXiv 2310.14566): yes/no questions on pictures that mislead, and on edited copies.

On the hub the split ``image`` has the 951 questions with a picture, which most reports use; a local copy may
be the authors' JSON with all 1129, where those without a picture are asked too. The prompt is the question
and "Please answer yes or no."; the official score is a language model's, here the word decides.

- **aAcc**: right questions. **qAcc**: question pairs (one question over all figures of its set) of which
  every answer is right. **fAcc**: figures of which every question is answered right; the questions that the
  category VS asks without a figure (figure 0) are none of a figure's.
- For such a question without a figure, an answer that it cannot be known is right, as officially.
- Groups: all, the category (VD: visual dependent, VS: visual supplement), and its subcategories.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mssr.data.images import ImageSource
from mssr.evaluation import scoring
from mssr.evaluation.base import Benchmark, Counts
from mssr.evaluation.cells import text_cell
from mssr.evaluation.items import Item, Verdict
from mssr.evaluation.local_data import Location
from mssr.evaluation.registry import register
from mssr.evaluation.statistics import count_right

INSTRUCTION = "Please answer yes or no."
_ANSWERS = {"0": "no", "1": "yes", "no": "no", "yes": "yes"}


@register("hallusionbench")
class HallusionBench(Benchmark):
    """Columns: category, subcategory, visual_input, set_id, figure_id, sample_note, question_id, question,
    gt_answer_details, gt_answer, filename, image."""

    location = Location("lmms-lab/HallusionBench", "image")
    id_column = "question_id"
    answer_column = "gt_answer"
    image_columns = ("image", "filename")

    def item(self, cells: dict[str, Any], images: tuple[ImageSource, ...], where: str) -> Item:
        keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
        ids = {key: text_cell(cells, key) for key in keys}
        item = super().item(cells, images, where)
        truth = item.answer.lower()
        if truth not in _ANSWERS:
            raise ValueError(f"gt_answer {truth!r} is neither 0 nor 1")
        return replace(
            item,
            id="_".join(ids.values()),
            question=f"{item.question}\n{INSTRUCTION}",
            answer=_ANSWERS[truth],
            kind="yes_no",
            tags={"category": ids["category"], "subcategory": f"{ids['category']}/{ids['subcategory']}"},
            metadata={**ids, "gt_answer_details": str(cells.get("gt_answer_details") or "")},
        )

    def verdict(self, item: Item, response: str, truncated: bool = False) -> Verdict:
        verdict = super().verdict(item, response, truncated)
        if verdict.status in ("wrong", "extraction_failed") and _without_figure(item):
            boxed = scoring.lenient_answer(response, boxed_only=True)
            if _is_unknown(boxed or scoring.outside_thinking(response)):
                return Verdict(True, boxed or "unknown", "right", verdict.rule)
        return verdict

    def judged(self, item: Item) -> tuple[str, str]:
        question, answer = super().judged(item)
        details = item.metadata["gt_answer_details"]
        return question, f"{answer} ({details})" if details else answer

    def breakdown(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> Counts:
        """aAcc, qAcc and fAcc, each for all, by category and by subcategory."""
        answers = [(item, verdict.correct) for item, verdict in zip(items, verdicts, strict=True)]
        of_figures = [(item, correct) for item, correct in answers if not _without_figure(item)]
        return {
            "aAcc": _counts(answers, lambda item: item.id),
            "qAcc": _counts(answers, lambda item: _of_set(item, "question_id")),
            "fAcc": _counts(of_figures, lambda item: _of_set(item, "figure_id")),
        }

    def metrics(self, items: Sequence[Item], verdicts: Sequence[Verdict]) -> dict[str, float]:
        """Those of every benchmark, and aAcc (the accuracy), qAcc and fAcc."""
        result = super().metrics(items, verdicts)
        for name, groups in self.breakdown(items, verdicts).items():
            right, count = groups.get("all", (0, 0))
            result[name] = right / count if count else 0.0
        return result


def _without_figure(item: Item) -> bool:
    return item.metadata["category"] == "VS" and item.metadata["figure_id"] == "0"


def _is_unknown(answer: str) -> bool:
    """Whether an answer says that it cannot be known; "yes, ..." and "no, ..." do not."""
    first = answer.strip().lower()
    return scoring.is_uncertain(answer) and not first.startswith(("yes", "no,", "no."))


def _of_set(item: Item, key: str) -> tuple[str, ...]:
    return tuple(item.metadata[k] for k in ("category", "subcategory", "set_id", key))


def _counts(
    answers: Sequence[tuple[Item, bool]], unit_of: Callable[[Item], Hashable]
) -> dict[str, tuple[int, int]]:
    """Group -> (units of which all items are right, units)."""
    units: dict[Hashable, tuple[Mapping[str, str], list[bool]]] = {}
    for item, correct in answers:
        units.setdefault(unit_of(item), (item.tags, []))[1].append(correct)
    return count_right(
        (group, all(correct))
        for tags, correct in units.values()
        for group in ("all", tags["category"], tags["subcategory"])
    )
