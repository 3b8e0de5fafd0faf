"""Images, questions and answers of the digits task, made from scikit-learn's bundled scans.

Each image shows two of the 1,797 real 8 x 8 scans of handwritten digits, side by side. Training and
validation never share a scan, so validation accuracy measures reading and not memory. For models that take
text only the digits are in words, and training and validation never share a question about the same digits.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from mssr.data.images import ImageSource
from mssr.data.rows import Row

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

QUESTIONS: dict[str, tuple[str, ...]] = {
    "sum": (
        "What is the sum of the two digits?",
        "What do the two digits add up to?",
        "How much is the left digit plus the right digit?",
        "Add the two digits.",
        "What is the total of both digits?",
    ),
    "difference": (
        "What is the difference between the two digits?",
        "How far apart are the two digits?",
        "By how much do the two digits differ?",
        "Subtract the smaller digit from the larger one.",
        "How much is the larger digit minus the smaller digit?",
    ),
    "larger": (
        "Which digit is larger?",
        "What is the larger of the two digits?",
        "Which of the two digits is greater?",
        "What is the highest digit in the image?",
        "Name the bigger digit.",
    ),
}
KINDS = tuple(QUESTIONS)


@dataclass(frozen=True, slots=True)
class Scans:
    """Scans of one split. Example: ``load_scans("train").labels[3]``"""

    split: str
    """train or val."""
    pixels: npt.NDArray[np.uint8] | None
    """(N, side, side) grey values, dark ink on white; None for digits in words."""
    labels: npt.NDArray[np.int64]
    """(N,) the digit, 0 to 9."""
    source: npt.NDArray[np.int64]
    """(N,) index of the scan in scikit-learn's ``load_digits``."""

    def __len__(self) -> int:
        return len(self.labels)

    def digits(self, example: Example) -> tuple[int, int]:
        return int(self.labels[example.left]), int(self.labels[example.right])

    def answer(self, example: Example) -> int:
        return answer_to(example.kind, *self.digits(example))

    def problem(self, example: Example) -> str:
        """The question, with the mark <image> or after the digits in words."""
        if self.pixels is not None:
            return f"<image>{example.question}"
        return in_words(*self.digits(example), example.question)

    def may_ask(self, example: Example) -> bool:
        """Whether the question is one of this split: of those in words one in five is for validation."""
        held_out = zlib.crc32(self.problem(example).encode()) % 5 == 0
        return self.pixels is not None or held_out == (self.split == "val")

    def row(self, example: Example, index: int = 0, image_format: str = "PNG") -> Row:
        """The example as the data has it."""
        images = []
        if self.pixels is not None:
            buffer = io.BytesIO()
            PIL.Image.fromarray(pair_image(self, example.left, example.right)).save(buffer, image_format)
            images = [ImageSource(buffer.getvalue(), None)]
        where = f"{self.split}-{index:05d}"
        return Row(where, self.problem(example), str(self.answer(example)), tuple(images), where)


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one pair of scans. Example: ``Example(4, 17, "sum", "Add the two digits.")``"""

    left: int
    """Index into `Scans`."""
    right: int
    kind: str
    question: str


def load_scans(split: str, seed: int = 0, side: int = 56) -> Scans:
    """scikit-learn's scans for ``train`` (four in five, drawn by ``seed``) or ``val``.

    Args:
        side: pixels to which one is enlarged; 0 for digits in words.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    # 0 is paper and 16 is ink; the enlarged scan should look like pen on paper.
    grey = np.round(255 - bundle.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng([seed, 0]).permutation(len(grey))
    cut = len(order) * 4 // 5
    part = order[:cut] if split == "train" else order[cut:]
    enlarged = [
        np.asarray(PIL.Image.fromarray(scan).resize((side, side), PIL.Image.Resampling.BICUBIC))
        for scan in (grey[part] if side else ())
    ]
    return Scans(split, np.stack(enlarged) if side else None, bundle.target[part].astype(np.int64), part)


def in_words(left: int, right: int, question: str) -> str:
    """Example: ``The two digits are three and five. Add the two digits.``"""
    digits = f"The two digits are {WORDS[left]} and {WORDS[right]}."
    return f"{digits} {question.replace('in the image', 'of the two')}"


def answer_to(kind: str, left: int, right: int) -> int:
    """The right answer to a question of this kind about two digits."""
    return {"sum": left + right, "difference": abs(left - right), "larger": max(left, right)}[kind]


def draw_examples(scans: Scans, count: int, rng: np.random.Generator) -> Iterator[Example]:
    """``count`` random pairs of scans with random questions; the kinds come in equal shares."""

    def draw(kind: str) -> Example:
        left, right = rng.integers(len(scans), size=2).tolist()
        phrasings = QUESTIONS[kind]
        return Example(left, right, kind, phrasings[int(rng.integers(len(phrasings)))])

    for index in range(count):
        while not scans.may_ask(example := draw(KINDS[index % len(KINDS)])):
            pass
        yield example


def pair_image(scans: Scans, left: int, right: int) -> npt.NDArray[np.uint8]:
    """(side, 2 side, 3) RGB image of two scans side by side."""
    assert scans.pixels is not None
    grey = np.concatenate([scans.pixels[left], scans.pixels[right]], axis=1)
    return np.repeat(grey[:, :, None], 3, axis=2)


def write_parquet(scans: Any, examples: Sequence[Any], path: Path) -> None:
    """Write ``id, images, problem, answer, kind`` as ``datasets`` reads them; ``images`` is a list of one
    PNG, embedded, and ``problem`` starts with the mark ``<image>``. Digits in words have no images."""
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image, Sequence, Value

    text = Value("string")
    features = Features(id=text, images=Sequence(Image()), problem=text, answer=text, kind=text)
    rows = []
    for index, example in enumerate(examples):
        row = scans.row(example, index)
        images = [{"bytes": image.data, "path": None} for image in row.images]
        texts = {"problem": row.problem, "answer": row.answer, "kind": example.kind}
        rows.append({"id": row.id, "images": images} | texts)
    # Not Dataset.to_parquet: that shows a progress bar of its own.
    pq.write_table(Dataset.from_list(rows, features=features).data.table, path)
