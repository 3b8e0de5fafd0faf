"""The records of an evaluation: an item of a benchmark, and what its scoring said of one response."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mssr.data.images import ImageSource

Kind = Literal["choice", "number", "list", "yes_no", "text", "math"]
"""What the answer of an item is."""

Status = Literal["right", "wrong", "extraction_failed", "truncated", "judge_failed"]
STATUSES: tuple[Status, ...] = ("right", "wrong", "extraction_failed", "truncated", "judge_failed")
"""Every item has one of these, and all but the first are wrong answers that stay in the denominator."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark. It is light: pixels and encoded bytes are read when asked for.

    Example: ``Item("mathvista", "17", "Question: How many?", (ImageSource(...),), "4", kind="number",
    tags={"task": "figure question answering"}, where="testmini.parquet row 16")``
    """

    benchmark: str
    """Name in the registry."""
    id: str
    """Stable, from the columns of the data; unique in the benchmark."""
    question: str
    """What the model is asked, with marks where the data have them; without marks the images stand before it.
    The training instruction is not in it."""
    images: tuple[ImageSource, ...]
    """Empty for a question without an image. `read()` gives encoded bytes, `decode()` a PIL image."""
    answer: str
    """The ground truth as it is compared: an option's letter or text, a number, a word, an expression."""
    choices: tuple[str, ...] = ()
    """Texts of the options A, B, C ...; empty where there are none or they are only in the question."""
    kind: Kind = "math"
    tags: Mapping[str, str] = field(default_factory=dict)
    """Breakdown -> this item's group: ``{"problem_version": "Vision Only"}``."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Other columns that scoring needs (precision, set_id ...); JSON values."""
    where: str = ""
    """File and row, for messages."""
    history: tuple[tuple[str, str], ...] = ()
    """Role and text of the turns before the question."""
    mark: str = "<image>"
    """What stands for an image in question and history."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What scoring says of one response. Example: ``Verdict(True, "B", "right", "choice")``"""

    correct: bool
    extracted: str | None
    """The final answer that was found in the response; None if there was none."""
    status: Status
    rule: str
    """What decided: "choice", "math", "mathvista", "yes_no", "judge" ..."""

    def __post_init__(self) -> None:
        assert self.correct == (self.status == "right"), self
