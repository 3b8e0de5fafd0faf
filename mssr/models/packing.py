"""Several sequences as one: token ids, rope positions and images laid end to end, without padding.

transformers keeps packed sequences apart when the position ids have four rows: the text positions,
which restart at 0 with every sequence, and the three mrope rows (temporal, height, width).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from mssr.device import to_device
from mssr.models.encoded import EncodedPrompt, PixelNormalizer
from mssr.models.families.base import Grid


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward pass. S tokens, N response tokens, V patches and I images over all sequences.

    What the host has to know of it is no tensor: it would have to wait for a device to read one.
    """

    input_ids: torch.Tensor
    """(1, S) int64."""
    position_ids: torch.Tensor
    """(4, 1, S) int64: text positions, then the three mrope rows."""
    pixels: torch.Tensor | None
    """(V, channels * patch * patch) uint8, see `EncodedPrompt`; None when no image is in the batch."""
    image_grids: tuple[Grid, ...]
    """(I,)"""
    image_keys: tuple[bytes, ...]
    """(I,) see `EncodedPrompt.image_keys`; all different."""
    image_index: torch.Tensor
    """(placeholder tokens,) where in S they are."""
    feature_index: torch.Tensor
    """(placeholder tokens,) which row of the image features each of them gets."""
    response_index: torch.Tensor
    """(N,) position in S whose hidden state predicts a response token."""
    targets: torch.Tensor
    """(N,) int64 the response tokens."""
    cu_seqlens: torch.Tensor
    """(sequences + 1,) int32 where each sequence starts in S, and S."""
    max_length: int
    """Tokens of the longest sequence."""
    normalizer: PixelNormalizer | None = None
    """Of the pixels."""

    def to(self, device: torch.device) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: to_device(tensor, device) for name, tensor in tensors.items()})


@dataclass(frozen=True, slots=True)
class PackItem:
    """A prompt with its rope positions and the response to it."""

    prompt: EncodedPrompt
    prompt_positions: torch.Tensor
    """(3, P) int64 mrope rows."""
    response: torch.Tensor
    """(T,) int64."""


def split_images(prompt: EncodedPrompt) -> tuple[torch.Tensor, ...]:
    """The pixels of each image, (patches, channels * patch * patch) uint8."""
    if prompt.image_grid_thw is None or prompt.pixels is None:
        return ()
    return torch.split(prompt.pixels, prompt.image_grid_thw.prod(-1).tolist())


def pack(sequences: Sequence[PackItem], merge_size: int) -> PackedBatch:
    """Lay sequences end to end. An image that occurs twice, in one prompt or in several, is held once.

    Args:
        sequences: at least one.
        merge_size: patches per side of a merged vision token.
    """
    ids, positions, response_index, targets, totals = [], [], [], [], []
    pixels, grids, features, placeholders = [], [], [], []
    first_feature: dict[bytes, int] = {}
    feature_count = 0
    start = 0
    for s in sequences:
        p, t = len(s.prompt.token_ids), len(s.response)
        ids += [s.prompt.token_ids, s.response]
        text = torch.arange(p + t)
        # A response is text: its mrope rows go on together after the largest of the prompt.
        after = int(s.prompt_positions.max()) + 1 + torch.arange(t)
        mrope = torch.cat([s.prompt_positions, after.expand(3, t)], dim=1)
        positions.append(torch.cat([text[None], mrope]))
        response_index.append(start + p - 1 + torch.arange(t))
        targets.append(s.response)
        totals.append(p + t)
        placeholders.append(start + s.prompt.token_types.nonzero()[:, 0])
        start += p + t
        for k, (key, image) in enumerate(zip(s.prompt.image_keys, split_images(s.prompt), strict=True)):
            assert s.prompt.image_grid_thw is not None
            count = len(image) // merge_size**2
            if key not in first_feature:
                first_feature[key] = feature_count
                feature_count += count
                pixels.append(image)
                grids.append(tuple(s.prompt.image_grid_thw[k].tolist()))
            features.append(first_feature[key] + torch.arange(count))
    return PackedBatch(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, dim=1)[:, None],
        pixels=torch.cat(pixels) if pixels else None,
        image_grids=tuple(grids),
        image_keys=tuple(first_feature),
        image_index=torch.cat(placeholders),
        feature_index=torch.cat(features) if features else torch.empty(0, dtype=torch.int64),
        response_index=torch.cat(response_index),
        targets=torch.cat(targets),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(totals)], dtype=torch.int32),
        max_length=max(totals),
        normalizer=next((s.prompt.normalizer for s in sequences if s.prompt.pixels is not None), None),
    )
