"""Prompt ids -> rows and model inputs, from the view of a worker on the data sets."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from PIL import Image

from mssr.config import Config
from mssr.data.dataset import PromptDataset, Row
from mssr.data.encoder import PromptEncoder
from mssr.data.validation_sets import validation_sets
from mssr.models.loading import load_processor


class Prompt(NamedTuple):
    """A prompt as engines take it."""

    text: str
    """After the chat template, with one placeholder for each image."""
    token_ids: list[int]
    """Of the text, so with one token for each image."""
    images: list[Image.Image]
    """In their final size."""


class PromptSource:
    """Reads rows of the train and validation sets by id; keeps ``data.image_cache_gib`` of prepared ones."""

    def __init__(self, config: Config) -> None:
        self.encoder = PromptEncoder(load_processor(config.model), config.data)
        self._datasets = [PromptDataset(config.data.train, config.data)]
        for one in validation_sets(config.data.val):
            self._datasets.append(one.dataset(config.data, config.run_dir))
        self._cache: OrderedDict[str, Prompt] = OrderedDict()
        self._bytes = 0
        self._max_bytes = int(config.data.image_cache_gib * 2**30)

    def get(self, prompt_id: str) -> Prompt:
        """Read, tokenised and decoded."""
        if prompt_id in self._cache:
            self._cache.move_to_end(prompt_id)
            return self._cache[prompt_id]
        row = self.row(prompt_id)
        text = self.encoder.chat_text(row)
        token_ids = self.encoder.processor.tokenizer(text)["input_ids"]
        prompt = Prompt(text, token_ids, self.encoder.images(row))
        self._cache[prompt_id] = prompt
        self._bytes += _bytes(prompt)
        while self._bytes > self._max_bytes and self._cache:
            self._bytes -= _bytes(self._cache.popitem(last=False)[1])
        return prompt

    def row(self, prompt_id: str) -> Row:
        for dataset in self._datasets:
            if prompt_id in dataset:
                return dataset.row(prompt_id)
        raise KeyError(f"prompt {prompt_id} is in no data set of this run")


def _bytes(prompt: Prompt) -> int:
    """What a prompt counts in the cache: a pixel takes 4 bytes, a token 8; a text is not for nothing."""
    return 4096 + 8 * len(prompt.token_ids) + sum(4 * i.width * i.height for i in prompt.images)
