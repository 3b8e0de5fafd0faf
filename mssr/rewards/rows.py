"""The row behind a response, for functions that ask for more than its answer.

The driver sends ids only. The reward processes open the data sets themselves, memory-mapped, and only if the
function asks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mssr.rewards.base import RewardInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from mssr.config import ModelConfig
    from mssr.config.data import DataConfig
    from mssr.data.dataset import PromptDataset
    from mssr.data.rows import Row

Sizes = list[tuple[int, int]]
"""(width, height) in pixels, of each image of a row."""


@dataclass(frozen=True)
class RowAccess:
    """Where the rows of a run are. It travels to the reward processes; without sources there are no rows."""

    sources: tuple[tuple[Any, DataConfig, str], ...] = ()
    """The arguments of each `PromptDataset`."""
    columns: frozenset[str] = frozenset()
    """Those that all of them have."""
    config: DataConfig | None = None
    """Names the columns that are read in any case."""
    model: ModelConfig | None = None
    """Its processor decides to what size images are resized."""
    sized: bool = False
    """Whether the function asks for those sizes."""

    @classmethod
    def of(cls, datasets: Sequence[PromptDataset], model: ModelConfig) -> RowAccess:
        """To the rows of open data sets."""
        columns = frozenset.intersection(*(frozenset(d.column_names) for d in datasets))
        sources = tuple((d.sources, d.config, d.prefix) for d in datasets)
        return cls(sources, columns, datasets[0].parts[0].config, model)

    def named(self, key: str) -> str:
        """The column that ``data.<key>`` names, as ``answer_column``."""
        return key.removesuffix("_column") if self.config is None else getattr(self.config, key)

    @property
    def named_columns(self) -> set[str]:
        """Those that are read in any case."""
        return {self.named(key) for key in ("answer_column", "problem_column", "images_column")}


NO_ROWS = RowAccess()


class RowReader:
    """The data sets, opened.

    Raises:
        UserError: one cannot be.
    """

    def __init__(self, access: RowAccess) -> None:
        from mssr.data.dataset import PromptDataset

        self.access = access
        self._datasets = [PromptDataset(*arguments, every_column=True) for arguments in access.sources]
        for dataset in self._datasets:
            len(dataset)  # reads the ids: now, and not in every process that is forked with them
        self._encoder: Any = None
        if access.sized:
            from mssr.data.encoder import PromptEncoder
            from mssr.models.loading import load_processor

            assert access.model is not None
            self._encoder = PromptEncoder(load_processor(access.model), access.sources[0][1])

    def find(self, prompt_id: str) -> PromptDataset:
        for dataset in self._datasets:
            if prompt_id in dataset:
                return dataset
        raise LookupError(f"the row of prompt {prompt_id!r} is in none of the data sets")

    def resized(self, sizes: Sizes) -> Sizes:
        """The sizes in which the model sees images of these."""
        return [self._encoder.resized(*size) for size in sizes]


class RowView:
    """The row of one response; each part is read when it is asked for.

    Args:
        reader: None where there are no rows; then a prompt is empty, and images raise LookupError.
    """

    def __init__(self, item: RewardInput, reader: RowReader | None) -> None:
        self._item, self._reader = item, reader

    @functools.cached_property
    def cells(self) -> dict[str, Any]:
        """Column names to cells, as the data has them."""
        if self._reader is None:
            return {"answer": self._item.answer}
        return self._reader.find(self._item.prompt_id).cells(self._item.prompt_id)

    @functools.cached_property
    def _row(self) -> Row:
        if self._reader is None:
            raise LookupError("there is no row with images here")
        return self._reader.find(self._item.prompt_id).row(self._item.prompt_id)

    def column(self, name: str) -> Any:
        """A cell; of images, as `images`, or the one where the cell is no list."""
        cell = self.cells[name]
        if self._reader is None or name != self._reader.access.named("images_column"):
            return cell
        images = self.images()
        return images if isinstance(cell, list) else next(iter(images), None)

    def row(self) -> dict[str, Any]:
        """All cells, with ``image_sizes`` and ``resized_image_sizes``."""
        sizes = {"image_sizes": self.image_sizes(), "resized_image_sizes": self.resized_image_sizes()}
        return {**sizes, **self.cells}

    def prompt(self) -> str:
        """The question."""
        return self._row.problem if self._reader is not None else ""

    def messages(self) -> Any:
        """The question as TRL gives it: its cell where that is a conversation."""
        return self._question if isinstance(self._question, list) else self.prompt()

    def completion(self) -> Any:
        """The response as TRL gives it: a conversation where the question is one."""
        text = self._item.response
        return [{"role": "assistant", "content": text}] if isinstance(self._question, list) else text

    @property
    def _question(self) -> Any:
        if self._reader is None:
            return None
        from mssr.data.rows import cell

        return cell(self.cells, self._reader.access.named("problem_column"))

    def images(self) -> list[Image]:
        """The images in RGB, upright, in their original size."""
        return [image.decode() for image in self._row.images]

    def image_sizes(self) -> Sizes:
        return [image.size() for image in self._row.images]

    def resized_image_sizes(self) -> Sizes:
        """As the model sees them."""
        assert self._reader is not None
        return self._reader.resized(self.image_sizes())

    def data_source(self) -> Any:
        """The cell of that name, else the name of the source."""
        if "data_source" in self.cells or self._reader is None:
            return self.cells.get("data_source", "")
        return self._reader.find(self._item.prompt_id).source_name(self._item.prompt_id)

    def extra_info(self) -> Any:
        """The cell of that name, else an empty dict."""
        return self.cells.get("extra_info", {})
