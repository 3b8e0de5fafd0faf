"""Prompt ids -> rows and model inputs, from the view of a worker on the data sets."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from mssr.bounded_cache import BoundedCache
from mssr.config import Config
from mssr.data.dataset import VAL_PREFIX, PromptDataset, Row
from mssr.data.encoder import EncodedPrompt, PromptEncoder
from mssr.data.validation_sets import validation_sets
from mssr.models.loading import load_processor


class PromptSource:
    """Reads rows of the train and validation sets by id; keeps ``data.image_cache_gib`` of encoded ones."""

    def __init__(self, config: Config) -> None:
        self.encoder = PromptEncoder(load_processor(config.model), config.data)
        self._datasets = [PromptDataset(config.data.train, config.data)]
        for one in validation_sets(config.data.val):
            self._datasets.append(one.dataset(config.data, config.run_dir))
        self._cache: BoundedCache[str, EncodedPrompt] = BoundedCache(config.data.image_cache_bytes)
        self._lock = threading.Lock()
        self._new: set[str] = set()
        """Prompts that were encoded and not yet asked for by `take_new`."""

    def get(self, prompt_ids: Sequence[str]) -> list[EncodedPrompt]:
        """Read and encoded, in their order. Threads may call it; one encodes at a time."""
        with self._lock:
            wanted = dict.fromkeys(prompt_ids)
            found = {i: kept for i in wanted if (kept := self._cache.get(i)) is not None}
            missing = [i for i in wanted if i not in found]
            for prompt_id, prompt in zip(missing, self.encode(missing), strict=True):
                found[prompt_id] = prompt
                self._cache.put(prompt_id, prompt, prompt.nbytes)
                if not prompt_id.startswith(VAL_PREFIX):
                    self._new.add(prompt_id)
            return [found[i] for i in prompt_ids]

    def take_new(self, prompt_ids: Iterable[str]) -> dict[str, EncodedPrompt]:
        """Those of some prompts that `get` had to encode since this last gave them out.

        Prompts of validation are not among them, nor are those that are kept no longer.
        """
        with self._lock:
            new = self._new.intersection(prompt_ids)
            self._new -= new
        return {i: kept for i in sorted(new) if (kept := self._cache.get(i)) is not None}

    def encode(self, prompt_ids: Sequence[str]) -> list[EncodedPrompt]:
        """The same as `get`, and nothing is kept."""
        return self.encoder.encode_all([self.row(i) for i in prompt_ids])

    def row(self, prompt_id: str) -> Row:
        for dataset in self._datasets:
            if prompt_id in dataset:
                return dataset.row(prompt_id)
        raise KeyError(f"prompt {prompt_id} is in no data set of this run")
