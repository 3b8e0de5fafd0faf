"""Images, questions and answers of the chains task: two to five handwritten digits in a row, under noise.

The answer to each question is the last of running totals, one a digit, so a response that writes them down
needs one simple step a digit, and one that does not needs all of them at once.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import PIL.Image

from mssr.data.digits.rows import Scans
from mssr.data.images import ImageSource
from mssr.data.rows import Row

QUESTIONS: dict[str, tuple[str, str]] = {
    "sum": ("What is the last digit of the sum?", "Add all digits modulo ten."),
    "alternating": ("What is the last digit of the alternating sum?", "Add and subtract in turn modulo ten."),
    "largest": ("Which digit is the largest?", "Name the largest digit."),
    "evens": ("How many digits are even?", "Count the even digits."),
}
KINDS = tuple(QUESTIONS)
LENGTHS = (2, 3, 4, 5)
NOISE = 40.0
"""Standard deviation of the noise of a pixel, in grey values of 0 to 255."""


def running_totals(kind: str, digits: Sequence[int]) -> list[int]:
    """One a digit, of which the last is the answer. Example: ``"sum", [3, 5, 7]`` -> [3, 8, 5]"""
    if kind == "largest":
        return list(itertools.accumulate(digits, max))
    summands = {
        "sum": digits,
        "alternating": [-digit if place % 2 else digit for place, digit in enumerate(digits)],
        "evens": [int(digit % 2 == 0) for digit in digits],
    }
    return [total % 10 for total in itertools.accumulate(summands[kind])]


@dataclass(frozen=True, slots=True)
class Chain:
    """One question about one row of scans. Example: ``Chain((4, 17), "sum", "Add all digits ...", 8)``"""

    scans: tuple[int, ...]
    """Indices into the scans of a split."""
    kind: str
    question: str
    noise: int
    """Seed of the image's noise."""


@dataclass(frozen=True, slots=True)
class ChainScans:
    """The scans of one split, and rows made of them."""

    scans: Scans

    def digits(self, chain: Chain) -> list[int]:
        return [int(self.scans.labels[i]) for i in chain.scans]

    def answer(self, example: Chain) -> int:
        return running_totals(example.kind, self.digits(example))[-1]

    def image(self, chain: Chain) -> npt.NDArray[np.uint8]:
        """(side, side * digits, 3) RGB, the noise the same in all three channels."""
        assert self.scans.pixels is not None
        grey = np.concatenate([self.scans.pixels[i] for i in chain.scans], axis=1)
        noise = np.random.default_rng(chain.noise).normal(0.0, NOISE, grey.shape)
        noisy = np.clip(np.round(grey + noise), 0, 255).astype(np.uint8)
        return np.repeat(noisy[:, :, None], 3, axis=2)

    def row(self, example: Chain, index: int = 0, image_format: str = "PNG") -> Row:
        """The chain as the data has it."""
        buffer = io.BytesIO()
        PIL.Image.fromarray(self.image(example)).save(buffer, image_format)
        where, images = f"{self.scans.split}-{index:05d}", (ImageSource(buffer.getvalue(), None),)
        return Row(where, f"<image>{example.question}", str(self.answer(example)), images, where)


def draw_chains(scans: ChainScans, count: int, rng: np.random.Generator) -> Iterator[Chain]:
    """``count`` random rows of scans with random questions; kinds and lengths come in equal shares."""
    for index in range(count):
        kind, length = KINDS[index % len(KINDS)], LENGTHS[index // len(KINDS) % len(LENGTHS)]
        chosen = rng.integers(len(scans.scans), size=length).tolist()
        phrasing, noise = QUESTIONS[kind][int(rng.integers(2))], int(rng.integers(2**32))
        yield Chain(tuple(chosen), kind, phrasing, noise)
