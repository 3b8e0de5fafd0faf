"""Images, questions and answers of the digits task, made from scikit-learn's bundled scans.

Each image shows two of the 1,797 real 8 x 8 scans of handwritten digits, side by side. Training and
validation never share a scan, so validation accuracy measures reading and not memory.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

DIGIT_SIDE = 56
"""Pixels of one digit: 4 x 4 patches, 2 x 2 merged tokens, one attention window of the tiny model."""

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

    pixels: npt.NDArray[np.uint8]
    """(N, 56, 56) grey values, dark ink on white."""
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


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one pair of scans. Example: ``Example(4, 17, "sum", "Add the two digits.")``"""

    left: int
    """Index into `Scans`."""
    right: int
    kind: str
    question: str


def load_scans(split: str, seed: int = 0) -> Scans:
    """scikit-learn's scans, sevenfold in size, for ``train`` (four in five, drawn by ``seed``) or ``val``."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    # 0 is paper and 16 is ink; the enlarged scan should look like pen on paper.
    grey = np.round(255 - bundle.images * (255 / 16)).astype(np.uint8)
    side, bicubic = (DIGIT_SIDE, DIGIT_SIDE), PIL.Image.Resampling.BICUBIC
    pixels = np.stack([np.asarray(PIL.Image.fromarray(g).resize(side, bicubic)) for g in grey])
    order = np.random.default_rng([seed, 0]).permutation(len(pixels))
    cut = len(order) * 4 // 5
    part = order[:cut] if split == "train" else order[cut:]
    return Scans(pixels[part], bundle.target[part].astype(np.int64), part)


def answer_to(kind: str, left: int, right: int) -> int:
    """The right answer to a question of this kind about two digits."""
    return {"sum": left + right, "difference": abs(left - right), "larger": max(left, right)}[kind]


def draw_examples(scans: Scans, count: int, rng: np.random.Generator) -> Iterator[Example]:
    """``count`` random pairs of scans with random questions; the kinds come in equal shares."""
    for index in range(count):
        left, right = rng.integers(len(scans), size=2).tolist()
        kind = KINDS[index % len(KINDS)]
        phrasings = QUESTIONS[kind]
        yield Example(left, right, kind, phrasings[int(rng.integers(len(phrasings)))])


def pair_image(scans: Scans, left: int, right: int) -> npt.NDArray[np.uint8]:
    """(56, 112, 3) RGB image of two scans side by side."""
    grey = np.concatenate([scans.pixels[left], scans.pixels[right]], axis=1)
    return np.repeat(grey[:, :, None], 3, axis=2)


def write_parquet(scans: Scans, examples: list[Example], split: str, path: Path) -> None:
    """Write ``id, images, problem, answer, kind`` as ``datasets`` reads them; ``images`` is a list of one
    PNG, embedded, and ``problem`` starts with the mark ``<image>``."""
    import pyarrow.parquet as pq
    from datasets import Dataset, Features, Image, Sequence, Value

    text = Value("string")
    features = Features(id=text, images=Sequence(Image()), problem=text, answer=text, kind=text)
    rows = []
    for index, example in enumerate(examples):
        buffer = io.BytesIO()
        PIL.Image.fromarray(pair_image(scans, example.left, example.right)).save(buffer, format="PNG")
        rows.append(
            {
                "id": f"{split}-{index:05d}",
                "images": [{"bytes": buffer.getvalue(), "path": None}],
                "problem": f"<image>{example.question}",
                "answer": str(scans.answer(example)),
                "kind": example.kind,
            }
        )
    # Not Dataset.to_parquet: that shows a progress bar of its own.
    pq.write_table(Dataset.from_list(rows, features=features).data.table, path)
