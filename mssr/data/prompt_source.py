"""Prompt ids -> rows and model inputs, from the view of a worker on the data sets."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
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
        self._encoding: dict[str, Future[EncodedPrompt]] = {}
        """Prompts that a thread is at work on."""

    def get(self, prompt_ids: Sequence[str]) -> list[EncodedPrompt]:
        """Read and encoded, in their order. Threads may call it; a prompt that one of them encodes the others
        wait for."""
        found: dict[str, EncodedPrompt] = {}
        coming: dict[str, Future[EncodedPrompt]] = {}
        own: list[str] = []
        with self._lock:
            for i in dict.fromkeys(prompt_ids):
                if (kept := self._kept(i)) is not None:
                    found[i] = kept
                    continue
                if i not in self._encoding:
                    own.append(i)
                    self._encoding[i] = Future()
                coming[i] = self._encoding[i]
        try:
            with self._lock:
                rows = [self.row(i) for i in own]
            for i, prompt in zip(own, self.encoder.encode_all(rows, self._cache), strict=True):
                without = dataclasses.replace(prompt, pixels=None)
                self._cache.put(i, without, without.nbytes)
                coming[i].set_result(prompt)
        except BaseException as error:
            for i in own:
                coming[i].set_exception(error)
            raise
        finally:
            with self._lock:
                for i in own:
                    del self._encoding[i]
                self._new.update(i for i in own if not i.startswith(VAL_PREFIX))
        found |= {i: future.result() for i, future in coming.items()}
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
