"""Sources -> the prompts of a run. Every row is kept, or counted and listed with the reason why not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mssr.config.data import DataConfig
from mssr.data.dataset import PromptDataset
from mssr.data.encoder import PromptEncoder
from mssr.data.lengths import prompt_lengths
from mssr.data.rows import BadRow
from mssr.errors import UserError

OVERLONG_FILE = "overlong.jsonl"


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """The usable prompts of a set, and how many rows are not among them."""

    dataset: PromptDataset
    rows: int
    """Rows of the sources: prompts + bad + overlong + duplicates."""
    bad: int
    """Rows that could not be used; listed in bad_rows.jsonl."""
    overlong: int
    """Prompts longer than data.max_prompt_length, dropped; listed in overlong.jsonl."""
    duplicates: int
    """Rows with the content of another row, dropped; listed in bad_rows.jsonl."""
    lengths: np.ndarray
    """(prompts,) int32 tokens, in the order of the data set's ids."""
    dropped: tuple[BadRow, ...] = ()
    """The rows that are not used, as they are listed."""
    notes: tuple[str, ...] = ()
    """What the user should hear once, one sentence each."""

    def summary(self) -> str:
        counts = ((self.bad, "bad"), (self.overlong, "overlong"), (self.duplicates, "duplicate"))
        dropped = [f"{n} {what}" for n, what in counts if n]
        sources = ""
        if len(self.dataset.parts) > 1:
            sizes = {label: len(ids) for label, ids in self.dataset.ids_by_source().items()}
            sources = " = " + " + ".join(f"{n} {label}" for label, n in sizes.items())
        text = f"{len(self.dataset)} prompts{sources}"
        return text + (f" ({', '.join(dropped)} dropped)" if dropped else "")


def load_prompts(
    sources: Any,
    config: DataConfig,
    encoder: PromptEncoder,
    bad_rows_file: Path,
    prefix: str = "",
    by_rule: str = "",
) -> LoadedPrompts:
    """Open sources, check every row and drop what cannot be trained on.

    Only image headers are read, and only the first time: ids, outcomes and lengths are kept under
    ``data.cache_dir`` by content.

    Args:
        sources, prefix: see `PromptDataset`.
        bad_rows_file: gets bad and duplicate rows, ``OVERLONG_FILE`` beside it overlong ones.
        by_rule: name of the rule that compares responses with the truths, which then must be text; empty
            for a function of a user, which gets the truths as they are.

    Raises:
        UserError: a source cannot be opened, more than ``data.max_bad_fraction`` of the rows are
            bad (the list is written first), or no prompt of a source is left.
    """
    dataset = PromptDataset(sources, config, prefix)
    dataset.response_prefix = encoder.response_prefix if by_rule else ""
    lengths, refused = _measure(dataset, encoder, by_rule)
    bad, duplicates = dataset.bad_rows + refused, dataset.duplicates
    _append(bad_rows_file, [asdict(row) for row in (*bad, *duplicates)])
    rows = dataset.total_rows
    if len(bad) > config.max_bad_fraction * rows:
        raise UserError(
            f"{bad[0].where}: {bad[0].reason}; {len(bad)} of {rows} rows are bad, listed in {bad_rows_file} "
            "(data.max_bad_fraction allows some)"
        )
    longest = config.max_prompt_length
    found = dict(zip(dataset.ids, lengths[dataset.numbers].tolist(), strict=True))
    kept = {i: length for i, length in found.items() if 0 <= length <= longest}  # -1: refused
    overlong = [{"where": dataset.where(i), "id": i, "length": n} for i, n in found.items() if n > longest]
    _append(bad_rows_file.with_name(OVERLONG_FILE), overlong)
    dataset.keep(kept)
    assert rows == len(kept) + len(bad) + len(overlong) + len(duplicates)
    _refuse_empty_sources(dataset, bad, len(overlong))
    why = "{length} tokens, longer than data.max_prompt_length"
    too_long = [BadRow(one["where"], why.format(**one)) for one in overlong]
    return LoadedPrompts(
        dataset,
        rows=rows,
        bad=len(bad),
        overlong=len(overlong),
        duplicates=len(duplicates),
        lengths=np.array(list(kept.values()), np.int32),
        dropped=(*bad, *duplicates, *too_long),
        notes=tuple(dataset.notes),
    )


def _measure(dataset: PromptDataset, encoder: PromptEncoder, by_rule: str) -> tuple[np.ndarray, list[BadRow]]:
    """Check the data set and leave its usable rows. Returns the lengths in tokens of the rows of all sources,
    -1 where there is none, and usable rows that encoder or rule refuse."""
    lengths: list[np.ndarray] = []
    bad: list[BadRow] = []
    for part, index in zip(dataset.parts, dataset.check(), strict=True):
        part_lengths, refused = prompt_lengths(part, index, encoder)
        if by_rule:
            why = f"column {part.config.answer_column} is a list or dict, not text for reward.name={by_rule}"
            refused = {int(n): why for n in np.flatnonzero(index.structured)} | refused
        part_lengths[list(refused)] = -1
        lengths.append(part_lengths)
        bad += [BadRow(part.table.where(number), refused[number]) for number in sorted(refused)]
    return np.concatenate(lengths), bad


def _refuse_empty_sources(dataset: PromptDataset, bad: Sequence[BadRow], overlong: int) -> None:
    for part, ids in zip(dataset.parts, dataset.ids_by_source().values(), strict=True):
        if not ids:
            first = f" (the first: {bad[0].where}: {bad[0].reason})" if bad else ""
            longest = f"data.max_prompt_length={dataset.config.max_prompt_length}"
            raise UserError(
                f"{part.source.name}: no prompt left of {dataset.total_rows} rows, {len(bad)} are bad"
                f"{first}, {overlong} are longer than {longest} tokens"
            )


def _append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    if records:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
