"""Prompt ids -> rows and model inputs, from the view of a worker on the data sets."""

from __future__ import annotations

from collections import OrderedDict

from PIL import Image

from mssr.config import Config
from mssr.data.dataset import PromptDataset, Row
from mssr.data.encoder import PromptEncoder
from mssr.data.validation_sets import validation_sets
from mssr.models.loading import load_processor


class PromptSource:
    """Reads rows of the train and validation sets by id; keeps ``data.image_cache_gib`` of prepared ones."""

    def __init__(self, config: Config) -> None:
        self.encoder = PromptEncoder(load_processor(config.model), config.data)
        self._datasets = [PromptDataset(config.data.train, config.data)]
        for one in validation_sets(config.data.val):
            self._datasets.append(one.dataset(config.data, config.run_dir))
        self._cache: OrderedDict[str, tuple[str, list[Image.Image]]] = OrderedDict()
        self._bytes = 0
        self._max_bytes = int(config.data.image_cache_gib * 2**30)

    def get(self, prompt_id: str) -> tuple[str, list[Image.Image]]:
        """(chat text, images in their final size)."""
        if prompt_id in self._cache:
            self._cache.move_to_end(prompt_id)
            return self._cache[prompt_id]
        row = self.row(prompt_id)
        item = (self.encoder.chat_text(row), self.encoder.images(row))
        self._cache[prompt_id] = item
        self._bytes += _bytes(item[1])
        while self._bytes > self._max_bytes and self._cache:
            _, (_, images) = self._cache.popitem(last=False)
            self._bytes -= _bytes(images)
        return item

    def row(self, prompt_id: str) -> Row:
        for dataset in self._datasets:
            if prompt_id in dataset:
                return dataset.row(prompt_id)
        raise KeyError(f"prompt {prompt_id} is in no data set of this run")


def _bytes(images: list[Image.Image]) -> int:
    """What a prompt counts in the cache: RGB pixels in memory take 4 bytes; a text is not for nothing."""
    return 4096 + sum(4 * i.width * i.height for i in images)
