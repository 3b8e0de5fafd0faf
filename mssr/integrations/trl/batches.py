"""What is done to TRL's batches and order of prompts: plain functions on dicts of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler, split_pixel_values_by_grid, unsplit_pixel_values_by_grid

Batch = dict[str, Any]
"""Of B rows: tensors and lists of B, tensors of all images of the rows, numbers of the whole generation."""
FORWARD = (
    "pixel_values pixel_attention_mask image_grid_thw image_position_ids image_sizes num_images num_tiles"
    " spatial_shapes token_type_ids mm_token_type_ids"
).split()
"""What a batch may have, beside the tokens, that a forward pass takes."""
_PLACEHOLDERS = (
    "image_token_id image_token_index video_token_id video_token_index audio_token_id audio_token_index"
    " vision_start_token_id vision_end_token_id"
).split()


class EpochSampler(Sampler):
    """TRL's `RepeatSampler` in an order that follows from seed and epoch; its own, from the epochs that
    the process saw: resumed in epoch k, it is that of epoch 0 again."""

    def __init__(self, plain: RepeatSampler) -> None:
        self.plain, self.epoch = plain, 0

    def __iter__(self) -> Iterator[int]:
        if self.plain.shuffle:
            self.plain.generator.manual_seed((self.plain.seed or 0) + self.epoch)
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)


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
    """(B, T) 1 for the tokens that the policy gave and the loss counts."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def with_responses(batch: Batch, responses: Sequence[np.ndarray], padding: int) -> Batch:
    """The prompts of a batch with other responses, all text, of which some may be empty."""
    prompts, width = batch["prompt_ids"], max([1, *map(len, responses)])
    tokens = prompts.new_full((len(responses), width), padding)
    mask = torch.zeros_like(tokens)
    for i, response in enumerate(responses):
        tokens[i, : len(response)] = torch.from_numpy(response)
        mask[i, : len(response)] = 1
    types: Batch = {
        key: torch.cat([batch[key][:, : prompts.size(1)], torch.zeros_like(tokens)], dim=1)
        for key in ("token_type_ids", "mm_token_type_ids")
        if key in batch
    }
    return {**batch, **types, "completion_ids": tokens, "completion_mask": mask}


def first_rows(batch: Batch, share: float) -> Batch:
    """The first ceil(share * B) rows. (TRL shuffles a generation before it cuts it into batches.)"""
    rows = math.ceil(share * len(batch["completion_ids"]))
    split = split_pixel_values_by_grid(batch)
    part = {
        key: value[:rows] if isinstance(value, list) or (torch.is_tensor(value) and value.ndim) else value
        for key, value in split.items()
    }
    return unsplit_pixel_values_by_grid(part)
