"""Prompts as the actor needs them: tokens, pixels and rope positions by id, the recent ones kept."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch

from mssr.data.prompt_source import PromptSource
from mssr.models.packing import PackItem
from mssr.models.policy import PolicyModel
from mssr.types import TrainBatch


class PromptCache:
    """Encodes each prompt once as long as it stays among the most recent ``max_bytes``."""

    def __init__(self, source: PromptSource, model: PolicyModel, max_bytes: int = 2**29) -> None:
        self._source = source
        self._model = model
        self._max_bytes = max_bytes
        self._bytes = 0
        self._items: OrderedDict[str, PackItem] = OrderedDict()

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

    def _prompt(self, prompt_id: str) -> PackItem:
        if prompt_id in self._items:
            self._items.move_to_end(prompt_id)
            return self._items[prompt_id]
        encoded = self._source.encoder.encode(self._source.row(prompt_id))
        item = PackItem(
            prompt=encoded,
            prompt_positions=self._model.rope_positions(encoded),
            response=torch.empty(0, dtype=torch.int64),
            prompt_id=prompt_id,
        )
        self._items[prompt_id] = item
        self._bytes += encoded.nbytes
        while self._bytes > self._max_bytes and len(self._items) > 1:
            _, oldest = self._items.popitem(last=False)
            self._bytes -= oldest.prompt.nbytes
        return item
