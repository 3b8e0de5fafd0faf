"""The row behind a response, for functions that ask for more than its answer.

The driver sends ids only. The reward processes open the data sets themselves, memory-mapped.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mssr.config.data import DataConfig
from mssr.rewards.base import RewardInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from mssr.config import ModelConfig
    from mssr.data.dataset import PromptDataset
    from mssr.data.encoder import PromptEncoder
    from mssr.data.rows import Row


@dataclass(frozen=True)
class RowAccess:
    """Where the rows of a run are. It travels to the reward processes; without sources there are no rows."""

    sources: tuple[tuple[Any, DataConfig, str], ...] = ()
    """The arguments of each `PromptDataset`."""
    columns: frozenset[str] = frozenset()
    """Those that all of them have."""
    config: DataConfig = field(default_factory=DataConfig)
    """Names the columns that are read in any case."""
    model: ModelConfig | None = None
    """Its processor decides to what size images are resized."""

    @classmethod
    def of(cls, datasets: Sequence[PromptDataset], model: ModelConfig) -> RowAccess:
        """To the rows of open data sets."""
        columns = frozenset.intersection(*(frozenset(d.column_names) for d in datasets))
        sources = tuple((d.sources, d.config, d.prefix) for d in datasets)
        return cls(sources, columns, datasets[0].parts[0].config, model)

    @functools.cached_property
    def datasets(self) -> list[PromptDataset]:
        from mssr.data.dataset import PromptDataset

        return [PromptDataset(*arguments, every_column=True) for arguments in self.sources]

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        """Knows the sizes in which the model sees images."""
        from mssr.data.encoder import PromptEncoder
        from mssr.models.loading import load_processor

        assert self.model is not None
        return PromptEncoder(load_processor(self.model), self.sources[0][1])

    def open(self, sized: bool) -> None:
        """Read ids, and with ``sized`` the processor, now and not in every process that is forked with them.

        Raises:
            UserError: a data set cannot be opened.
        """
        for dataset in self.datasets:
            len(dataset)
        if sized:
            _ = self.encoder


NO_ROWS = RowAccess()


class RowView:
    """A response and its row; each part of that is read when it is asked for.

    Where there are no rows, the question is empty, and asking for images raises LookupError.
    """

    def __init__(self, item: RewardInput, access: RowAccess) -> None:
        self.item, self._access = item, access

    @functools.cached_property
    def _dataset(self) -> PromptDataset | None:
        if not self._access.sources:
            return None
        for dataset in self._access.datasets:
            if self.item.prompt_id in dataset:
                return dataset
        raise LookupError(f"the row of prompt {self.item.prompt_id!r} is in none of the data sets")

    @functools.cached_property
    def cells(self) -> dict[str, Any]:
        """Column names to cells, as the data has them."""
        if self._dataset is None:
            return {"answer": self.item.answer}
        return self._dataset.cells(self.item.prompt_id)

    @functools.cached_property
    def _row(self) -> Row:
        if self._dataset is None:
            raise LookupError("there is no row with images here")
        return self._dataset.row(self.item.prompt_id)

    def answer_text(self) -> str:
        """The answer as text: a user's function beside may want the cell."""
        if isinstance(self.item.answer, str):
            return self.item.answer
        from mssr.data.rows import answer_text

        return answer_text(self.item.answer)

    def column(self, name: str) -> Any:
        """A cell; of images, as `images`, or the one where the cell is no list."""
        cell = self.cells[name]
        if self._dataset is None or name != self._access.config.images_column:
            return cell
        return self.images() if isinstance(cell, list) else next(iter(self.images()), None)

    def data_source(self) -> Any:
        """The column of that name; without, what the user called the source."""
        name = "" if self._dataset is None else self._dataset.source_name(self.item.prompt_id)
        return self.cells.get("data_source", name)

    def extra_info(self) -> Any:
        return self.cells.get("extra_info", {})

    def prompt(self) -> str:
        """As the model saw it, with one placeholder for each image."""
        return "" if self._dataset is None else self._access.encoder.chat_text(self._row)

    def question(self) -> str:
        return "" if self._dataset is None else self._row.question

    def conversation(self) -> list[Any] | None:
        """The cell of the question where that is a list of messages."""
        if self._dataset is None:
            return None
        from mssr.data.rows import cell

        found = cell(self.cells, self._access.config.problem_column)
        return found if isinstance(found, list) else None

    def images(self) -> list[Image]:
        """In RGB, upright, in their original size."""
        return [image.decode() for image in self._row.images]

    def image_sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels of each, as stored."""
        return [image.size() for image in self._row.images]

    def resized_image_sizes(self) -> list[tuple[int, int]]:
        """As the model sees them."""
        return [self._access.encoder.resized(*size) for size in self.image_sizes()]
