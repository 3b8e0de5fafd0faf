"""Prompts as the actor needs them: tokens, pixels and rope positions by id, the recent ones kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from mssr.data.prompt_source import PromptSource
from mssr.models.bounded_cache import BoundedCache
from mssr.models.encoded import EncodedPrompt
from mssr.models.packing import PackItem
from mssr.models.policy import PolicyModel
from mssr.types import TrainBatch

Prepared = Callable[[Sequence[str]], dict[str, EncodedPrompt]]
"""Prompts by id, those of the ones asked for that somebody else has encoded already."""
_Prompt = tuple[EncodedPrompt, torch.Tensor]
"""And its (3, P) rope positions."""


class PromptCache:
    """Reads and encodes a prompt once as long as it stays among the most recent ``max_bytes``.

    Attributes:
        encoded: how many prompts with their images had to be encoded here so far.
    """

    def __init__(self, source: PromptSource, model: PolicyModel, max_bytes: int = 2**30) -> None:
        self.encoded = 0
        self._prepared: Prepared | None = None
        self._source = source
        self._model = model
        self._kept: BoundedCache[tuple[str, bool], _Prompt] = BoundedCache(max_bytes)

    @contextlib.contextmanager
    def using(self, prepared: Prepared | None) -> Iterator[None]:
        """Inside, ``prepared`` is asked for prompts before they are read and encoded here."""
        self._prepared = prepared
        try:
            yield
        finally:
            self._prepared = None

    def items(self, batch: TrainBatch, sequences: Sequence[int], text_only: bool = False) -> list[PackItem]:
        """Sequences of a batch, by their indices.

        Args:
            text_only: as if the prompts had no images.

        Raises:
            RuntimeError: the engine saw other prompt tokens than the actor; names the row.
        """
        prompts = self._prompts([batch.prompt_ids[s] for s in sequences], text_only)
        result = []
        for s in sequences:
            prompt, positions = prompts[batch.prompt_ids[s]]
            tokens = batch.tokens[batch.offsets[s] : batch.offsets[s + 1]]
            seen, response = np.split(tokens, [batch.prompt_lengths[s]])
            if not text_only and not np.array_equal(seen, prompt.token_ids.numpy()):
                where = self._source.row(batch.prompt_ids[s]).where
                raise RuntimeError(
                    f"{where} (id {batch.prompt_ids[s]}): engine and actor tokenise this prompt differently "
                    f"({len(seen)} and {len(prompt.token_ids)} tokens)"
                )
            result.append(PackItem(prompt, positions, torch.from_numpy(response.astype(np.int64))))
        return result

    def _prompts(self, prompt_ids: Sequence[str], text_only: bool) -> dict[str, _Prompt]:
        wanted = dict.fromkeys(prompt_ids)
        found = {i: kept for i in wanted if (kept := self._kept.get((i, text_only))) is not None}
        missing = [i for i in wanted if i not in found]
        encoded = self._without_images(missing) if text_only else self._encoded(missing)
        for prompt_id, prompt in encoded.items():
            positions = self._model.rope_positions(prompt)
            found[prompt_id] = prompt, positions
            size = prompt.nbytes + positions.nbytes
            self._kept.put((prompt_id, text_only), found[prompt_id], size)
        return found

    def _encoded(self, prompt_ids: Sequence[str]) -> dict[str, EncodedPrompt]:
        found = self._prepared(prompt_ids) if prompt_ids and self._prepared else {}
        missing = [i for i in prompt_ids if i not in found]
        self.encoded += len(missing)
        return found | dict(zip(missing, self._source.encode(missing), strict=True))

    def _without_images(self, prompt_ids: Sequence[str]) -> dict[str, EncodedPrompt]:
        rows = [self._source.row(i).without_images() for i in prompt_ids]
        return dict(zip(prompt_ids, self._source.encoder.encode_all(rows), strict=True))
