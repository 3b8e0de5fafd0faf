"""Prompts as the actor needs them: tokens, pixels and rope positions by id, the recent ones kept."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np
import torch

from mssr.data.prompt_source import PromptSource
from mssr.models.packing import PackItem
from mssr.models.policy import PolicyModel
from mssr.types import TrainBatch


class PromptCache:
    """Encodes each prompt once as long as it stays among the most recent ``max_bytes``.

    Responses to the same prompt follow one another, so one is kept in any case.

    Args:
        pixel_dtype: in which pixels are kept: that of the forward pass, which would round them anyway.
    """

    def __init__(
        self,
        source: PromptSource,
        model: PolicyModel,
        max_bytes: int = 2**30,
        pixel_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._source = source
        self._model = model
        self._max_bytes = max_bytes
        self._pixel_dtype = pixel_dtype
        self._bytes = 0
        self._items: OrderedDict[tuple[str, bool], PackItem] = OrderedDict()

    def item(self, batch: TrainBatch, index: int) -> PackItem:
        """Sequence ``index`` of a batch.

        Raises:
            RuntimeError: the engine saw other prompt tokens than the actor; names the row.
        """
        prompt_id = batch.prompt_ids[index]
        tokens = batch.tokens[batch.offsets[index] : batch.offsets[index + 1]]
        split = int(batch.prompt_lengths[index])
        prompt = self._prompt(prompt_id)
        if not np.array_equal(tokens[:split], prompt.prompt.token_ids.numpy()):
            where = self._source.row(prompt_id).where
            raise RuntimeError(
                f"{where} (id {prompt_id}): engine and actor tokenise this prompt differently "
                f"({split} and {len(prompt.prompt.token_ids)} tokens)"
            )
        return prompt.with_response(torch.from_numpy(tokens[split:].astype(np.int64)))

    def text_only(self, batch: TrainBatch, index: int) -> PackItem:
        """Sequence ``index`` of a batch, as if its prompt had no image."""
        tokens = batch.tokens[batch.offsets[index] : batch.offsets[index + 1]]
        response = tokens[int(batch.prompt_lengths[index]) :].astype(np.int64)
        prompt = self._prompt(batch.prompt_ids[index], text_only=True)
        return prompt.with_response(torch.from_numpy(response))

    def _prompt(self, prompt_id: str, text_only: bool = False) -> PackItem:
        key = (prompt_id, text_only)
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key]
        row = self._source.row(prompt_id)
        if text_only:
            row = dataclasses.replace(row, images=(), problem=row.problem.replace("<image>", ""))
        encoded = self._source.encoder.encode(row).with_pixels(self._pixel_dtype)
        item = PackItem(
            prompt=encoded,
            prompt_positions=self._model.rope_positions(encoded),
            response=torch.empty(0, dtype=torch.int64),
        )
        self._items[key] = item
        self._bytes += encoded.nbytes
        while self._bytes > self._max_bytes and len(self._items) > 1:
            _, oldest = self._items.popitem(last=False)
            self._bytes -= oldest.prompt.nbytes
        return item
