"""What a sequence costs to train on, in floating point operations, from the shapes of the model.

Of one forward pass, with a multiplication and an addition counted as two. The language model has n layers
of width d, h heads and g key-value heads of e values, an MLP of width f, a vocabulary of V. A sequence of
L tokens, T of them of the response, costs

    L * n * 2 * (2*d*h*e + 2*d*g*e + 3*d*f)       projections and MLP, or the experts that a token passes
    + n * 2*h*e * L^2                             attention; causal, so half of all pairs of tokens
    + T * 2*d*V                                   head, on response tokens only

The vision tower has b blocks, u of them with attention over the whole image and the others in windows of
w x w patches; width c, MLP of width k (and three matrices, or two), patches of p values; m x m patches become
one token. An image of P patches costs

    P * (2*p*c + b * 2 * (4*c^2 + 3*c*k))         patch embedding, projections and MLP
    + P * 4*c * (u*P + (b-u) * min(P, w^2))       attention
    + P/m^2 * 2 * ((m^2*c)^2 + m^2*c*d)           merger, of which there may be several

Backward costs twice as much as forward. A frozen tower has no backward. All letters are those of the
model's shape; norms, rope, softmax and the like are left out. So is what the backward pass computes again to
save memory, as is usual for model FLOPs utilization (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mssr.models.shapes import ModelShape
from mssr.types import TrainBatch

UNIT = 10**6
"""Costs are whole millions of operations: exact, the same on every rank, and no overflow in int64."""


@dataclass(frozen=True, slots=True)
class SequenceWork:
    """How much there is to do for each of B sequences."""

    lengths: npt.NDArray[np.int64]
    """(B,) tokens of prompt and response."""
    text_cost: npt.NDArray[np.int64]
    """(B,) cost in the language model, in any unit."""
    image_cost: npt.NDArray[np.int64]
    """(B,) cost of the prompt's images in the vision tower, in the same unit; 0 without images."""
    prompts: npt.NDArray[np.int64]
    """(B,) number of the prompt. Sequences of one prompt share the cost of its images in a pass."""
    homes: npt.NDArray[np.int64]
    """(B,) a number that the prompt has in every step: the rank with it, modulo the ranks, is likely to have
    prepared its images before."""


@dataclass(frozen=True, slots=True)
class Operations:
    """Of a forward pass over some sequences."""

    matrices: float
    """Projections, MLP and head of the language model."""
    attention: float
    vision: float
    """The tower, on every image once."""

    @property
    def forward(self) -> float:
        return self.matrices + self.attention + self.vision

    def training(self, frozen_weights: bool = False, frozen_tower: bool = False) -> float:
        """Forward and backward. Frozen weights need no gradient of their own, a frozen tower none at all;
        what is trained beside frozen weights (LoRA) is left out."""
        matrices, vision = 2 if frozen_weights else 3, 1 if frozen_tower else 3
        return matrices * self.matrices + 3 * self.attention + vision * self.vision


class CostModel:
    """Forward and backward of a model in units of `UNIT` operations, by the formula above.

    Args:
        train_vision: whether the tower has a backward pass.
    """

    def __init__(self, shape: ModelShape, train_vision: bool = True) -> None:
        text = shape.text_config
        self.image_token = shape.image_token_id
        self.per_token = 2 * text.multiplied
        self.per_square = 2 * text.attending * text.q_width
        self.per_response_token = 2 * text.embedding
        self._vision = shape.vision_config
        self.per_patch = 2 * self._vision.multiplied if self._vision else 0
        self._vision_passes = 3 if train_vision else 1

    def text(
        self, lengths: npt.NDArray[np.int64], response_lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Cost in the language model of sequences of so many tokens, and so many of the response."""
        length = lengths.astype(np.float64)
        forward = length * (self.per_token + self.per_square * length)
        forward += self.per_response_token * response_lengths.astype(np.float64)
        return _units(3 * forward)

    def images(self, patches: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Cost in the vision tower of images of so many patches."""
        return _units(self._vision_passes * self.images_forward(patches))

    def images_forward(self, patches: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Operations of a forward pass of the tower over images of so many patches."""
        p, v = patches.astype(np.float64), self._vision
        if v is None:
            return np.zeros_like(p)
        full = v.full_blocks if v.window else v.depth
        seen = full * p + (v.depth - full) * np.minimum(p, v.window)
        return p * (self.per_patch + 4 * v.hidden_size * seen)

    def work(self, batch: TrainBatch) -> SequenceWork:
        """Of a batch's sequences."""
        sequence, patches = self._images_of(batch)
        image_cost = np.zeros(len(batch), dtype=np.int64)
        np.add.at(image_cost, sequence, self.images(patches))
        numbers: dict[str, int] = {}
        prompts = np.array([numbers.setdefault(i, len(numbers)) for i in batch.prompt_ids], dtype=np.int64)
        homes = np.array([home(prompt_id) for prompt_id in numbers], dtype=np.int64)
        return SequenceWork(
            lengths=batch.lengths,
            text_cost=self.text(batch.lengths, batch.response_lengths),
            image_cost=image_cost,
            prompts=prompts,
            homes=homes[prompts],
        )

    def operations(
        self, batch: TrainBatch, sequences: Sequence[int], tower: bool = True, text_only: bool = False
    ) -> Operations:
        """Of a forward pass over some of a batch's sequences, which has the images of a prompt once.

        Args:
            tower: whether the vision tower runs, or its features are known.
            text_only: without the images.
        """
        image_of, patches = self._images_of(batch)
        tokens = patches / (self._vision.merged if self._vision else 1)
        lengths = batch.lengths - text_only * np.bincount(image_of, tokens, len(batch))
        matrices = self.per_token * lengths + self.per_response_token * batch.response_lengths
        vision = np.bincount(image_of, self.images_forward(patches), len(batch))
        chosen, of_prompts = list(sequences), list({batch.prompt_ids[s]: s for s in sequences}.values())
        return Operations(
            matrices=float(matrices[chosen].sum()),
            attention=float((self.per_square * lengths[chosen] ** 2).sum()),
            vision=float(vision[of_prompts].sum()) if tower and not text_only else 0.0,
        )

    def _images_of(self, batch: TrainBatch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Sequence and patches of each image. It is a run of placeholder tokens, so no pixels are needed."""
        is_image = np.concatenate([[False], batch.tokens == self.image_token, [False]])
        starts, ends = np.flatnonzero(np.diff(is_image.astype(np.int8))).reshape(-1, 2).T
        sequence = np.searchsorted(batch.offsets, starts, side="right") - 1
        return sequence, (ends - starts) * (self._vision.merged if self._vision else 1)


def home(prompt_id: str) -> int:
    """Where a prompt goes in every epoch, so that what is kept of it is found there: modulo the engines, or
    the ranks; the same in every process and run."""
    return zlib.crc32(prompt_id.encode())


def _units(operations: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    return np.maximum(np.rint(operations / UNIT), 1).astype(np.int64)
