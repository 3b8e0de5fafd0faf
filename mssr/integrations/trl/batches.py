"""What is done to TRL's batches and order of prompts: plain functions on dicts of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from trl.trainer.utils import RepeatSampler, split_pixel_values_by_grid, unsplit_pixel_values_by_grid

Batch = dict[str, Any]
"""Of B rows: tensors and lists of B, tensors of all images of the rows, numbers of the whole generation."""

_PLACEHOLDERS = tuple(
    [f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index")]
    + ["vision_start_token_id", "vision_end_token_id"]
)
_OF_IMAGES = (
    *("pixel_values", "pixel_attention_mask", "spatial_shapes", "num_images", "num_tiles"),
    *("image_grid_thw", "image_position_ids", "image_sizes"),
)
FORWARD = (*_OF_IMAGES, "token_type_ids", "mm_token_type_ids")
"""What a batch may have, beside the tokens, that a forward pass takes."""


class EpochSampler(RepeatSampler):
    """`RepeatSampler`, whose order follows from seed and epoch alone. TRL's depends on the epochs that the
    process has seen, so that a run resumed in epoch k has the order of epoch 0 again."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + self.epoch)
        return super().__iter__()


def placeholder_ids(config: Any) -> list[int]:
    """Tokens that stand for pixels or sound, of a model's config: a response with one breaks later passes."""
    return sorted({int(i) for name in _PLACEHOLDERS if (i := getattr(config, name, None)) is not None})


def ban(kwargs: dict[str, Any], banned: Sequence[int], *, vllm: bool) -> dict[str, Any]:
    """A user's ``generation_kwargs`` with tokens banned beside what they ban or bias themselves.

    vLLM gets a bias of -100, the most that its server takes, which leaves a probability of e^-100.
    """
    if not banned:
        return kwargs
    if vllm:
        given = {int(token): bias for token, bias in (kwargs.get("logit_bias") or {}).items()}
        return {**kwargs, "logit_bias": {**given, **dict.fromkeys(banned, -100.0)}}
    return {**kwargs, "suppress_tokens": sorted({*(kwargs.get("suppress_tokens") or []), *banned})}


def loss_mask(batch: Batch) -> torch.Tensor:
    """(B, T) 1 for the tokens of the responses that the policy gave and the loss counts."""
    mask: torch.Tensor = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]


def first_rows(batch: Batch, share: float) -> Batch:
    """The first ceil(share * B) rows. (TRL shuffles a generation before it cuts it into batches.)"""
    rows = math.ceil(share * len(batch["completion_ids"]))
    split = split_pixel_values_by_grid(batch)
    part = {
        key: value[:rows] if isinstance(value, list) or (torch.is_tensor(value) and value.ndim) else value
        for key, value in split.items()
    }
    return unsplit_pixel_values_by_grid(part)
