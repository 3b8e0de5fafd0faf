"""Prompt ids -> rows and model inputs, from the view of a worker on the data sets."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from mssr.config import Config
from mssr.data.dataset import VAL_PREFIX, PromptDataset, Row
from mssr.data.encoder import PromptEncoder
from mssr.data.validation_sets import validation_sets
from mssr.models.bounded_cache import BoundedCache
from mssr.models.encoded import EncodedPrompt, join_pixels
from mssr.models.loading import load_processor


class PromptSource:
    """Reads rows of the train and validation sets by id; keeps ``data.image_cache_gib`` of what is encoded.

    Images are kept apart from the prompts that show them, so that one that several show is there once.
    """

    def __init__(self, config: Config) -> None:
        self.encoder = PromptEncoder(load_processor(config.model), config.data)
        val = [one.dataset(config.data, config.run_dir) for one in validation_sets(config.data.val)]
        self._datasets = [PromptDataset(config.data.train, config.data), *val]
        self._cache: BoundedCache[str | bytes, Any] = BoundedCache(config.data.image_cache_bytes)
        """Prompts without their pixels by id, and images by key."""
        self._lock = threading.Lock()
        self._new: set[str] = set()
        """Prompts that were encoded and not yet asked for by `take_new`."""

    def get(self, prompt_ids: Sequence[str]) -> list[EncodedPrompt]:
        """Read and encoded, in their order. Threads may call it; one encodes at a time."""
        with self._lock:
            wanted = dict.fromkeys(prompt_ids)
            found = {i: kept for i in wanted if (kept := self._kept(i)) is not None}
            missing = [i for i in wanted if i not in found]
            encoded = self.encoder.encode_all([self.row(i) for i in missing], self._cache)
            for prompt_id, prompt in zip(missing, encoded, strict=True):
                found[prompt_id] = prompt
                without = dataclasses.replace(prompt, pixels=None)
                self._cache.put(prompt_id, without, without.nbytes)
                if not prompt_id.startswith(VAL_PREFIX):
                    self._new.add(prompt_id)
            return [found[i] for i in prompt_ids]

    def take_new(self, prompt_ids: Iterable[str]) -> dict[str, EncodedPrompt]:
        """Those of some prompts that `get` had to encode since this last gave them out, without validation's
        and those that are kept no longer."""
        with self._lock:
            new = self._new.intersection(prompt_ids)
            self._new -= new
        return {i: kept for i in sorted(new) if (kept := self._kept(i)) is not None}

    def _kept(self, prompt_id: str) -> EncodedPrompt | None:
        """The prompt with its pixels, if all of it is kept."""
        prompt: EncodedPrompt | None = self._cache.get(prompt_id)
        if prompt is None or not prompt.image_keys:
            return prompt
        images: list[Any] = [self._cache.get(key) for key in prompt.image_keys]
        lost = any(image is None for image in images)
        return None if lost else dataclasses.replace(prompt, pixels=join_pixels(images))

    def encode(self, prompt_ids: Sequence[str]) -> list[EncodedPrompt]:
        """The same as `get`, and nothing is kept."""
        return self.encoder.encode_all([self.row(i) for i in prompt_ids])

    def row(self, prompt_id: str) -> Row:
        for dataset in self._datasets:
            if prompt_id in dataset:
                return dataset.row(prompt_id)
        raise KeyError(f"prompt {prompt_id} is in no data set of this run")
