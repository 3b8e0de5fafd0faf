"""Prompt ids -> rows and model inputs, from the view of a worker on the data sets."""

from __future__ import annotations

from collections import OrderedDict

import torch

from mssr.config import Config
from mssr.data.dataset import PromptDataset, Row
from mssr.data.encoder import EncodedPrompt, PromptEncoder
from mssr.data.validation_sets import validation_sets
from mssr.models.loading import load_processor


class PromptSource:
    """Reads rows of the train and validation sets by id; keeps ``data.image_cache_gib`` of encoded ones.

    Args:
        pixel_dtype: in which pixels are kept: that of the forward pass, which would round them anyway.
    """

    def __init__(self, config: Config, pixel_dtype: torch.dtype = torch.float32) -> None:
        self.encoder = PromptEncoder(load_processor(config.model), config.data)
        self._datasets = [PromptDataset(config.data.train, config.data)]
        for one in validation_sets(config.data.val):
            self._datasets.append(one.dataset(config.data, config.run_dir))
        self._pixel_dtype = pixel_dtype
        self._cache: OrderedDict[str, EncodedPrompt] = OrderedDict()
        self._bytes = 0
        self._max_bytes = int(config.data.image_cache_gib * 2**30)

    def get(self, prompt_id: str) -> EncodedPrompt:
        """Read and encoded."""
        if prompt_id in self._cache:
            self._cache.move_to_end(prompt_id)
            return self._cache[prompt_id]
        prompt = self.encoder.encode(self.row(prompt_id)).with_pixels(self._pixel_dtype)
        self._cache[prompt_id] = prompt
        self._bytes += prompt.nbytes
        while self._bytes > self._max_bytes and self._cache:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return prompt

    def row(self, prompt_id: str) -> Row:
        for dataset in self._datasets:
            if prompt_id in dataset:
                return dataset.row(prompt_id)
        raise KeyError(f"prompt {prompt_id} is in no data set of this run")
