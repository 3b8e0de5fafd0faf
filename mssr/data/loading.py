"""Sources -> the prompts of a run. Every row is kept, or counted and listed with the reason why not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mssr.config.data import DataConfig
from mssr.data.dataset import BadRow, PromptDataset
from mssr.data.encoder import PromptEncoder
from mssr.data.lengths import prompt_lengths
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
        sources: the value of data.train or data.val.
        bad_rows_file: bad and duplicate rows are appended to it, overlong ones to ``OVERLONG_FILE``
            beside it.
        prefix: see `PromptDataset`.
        by_rule: name of the rule that compares responses with the truths, which then must be text; empty
            for a function of a user, which gets the truths as they are.

    Raises:
        UserError: a source cannot be opened, more than ``data.max_bad_fraction`` of the rows are
            bad (the list is written first), or no prompt of a source is left.
    """
    dataset = PromptDataset(sources, config, prefix)
    dataset.response_prefix = encoder.response_prefix if by_rule else ""
    indexes = dataset.check()
    bad = dataset.bad_rows
    rows = dataset.total_rows
    lengths: list[np.ndarray] = []
    for part, index in zip(dataset.parts, indexes, strict=True):
        part_lengths, refused = prompt_lengths(part, index, encoder)
        part_lengths = part_lengths.copy()
        if by_rule:
            why = f"column {part.config.answer_column} is a list or dict, not text for reward.name={by_rule}"
            known = {number for number, _ in refused}
            refused += [(int(n), why) for n in np.flatnonzero(index.structured) if n not in known]
        part_lengths[[number for number, _ in refused]] = -1
        lengths.append(part_lengths)
        bad += [BadRow(part.table.where(number), why) for number, why in refused]
    _append(bad_rows_file, [{"where": b.where, "reason": b.reason} for b in bad + dataset.duplicates])
    if len(bad) > config.max_bad_fraction * rows:
        raise UserError(
            f"{bad[0].where}: {bad[0].reason}; {len(bad)} of {rows} rows are bad, listed in {bad_rows_file} "
            "(data.max_bad_fraction allows some)"
        )
    kept: list[str] = []
    kept_lengths: list[int] = []
    overlong: list[dict[str, Any]] = []
    for prompt_id in dataset.ids:
        part_number, number = dataset.position(prompt_id)
        length = int(lengths[part_number][number])
        if length > config.max_prompt_length:
            overlong.append({"where": dataset.where(prompt_id), "id": prompt_id, "length": length})
        elif length >= 0:  # below: refused
            kept.append(prompt_id)
            kept_lengths.append(length)
    _append(bad_rows_file.with_name(OVERLONG_FILE), overlong)
    dataset.keep(kept)
    assert rows == len(kept) + len(bad) + len(overlong) + len(dataset.duplicates)
    for label, ids in dataset.ids_by_source().items():
        if not ids:
            name = dataset.parts[dataset.labels.index(label)].source.name
            first = f" (the first: {bad[0].where}: {bad[0].reason})" if bad else ""
            raise UserError(
                f"{name}: no prompt left of {rows} rows, {len(bad)} are bad{first}, {len(overlong)} are "
                f"longer than data.max_prompt_length={config.max_prompt_length} tokens"
            )
    problem = dataset.cache.problem
    notes = [note for part in dataset.parts for note in part.columns.notes]
    if problem:
        notes.append(f"checked data is not kept for the next run: {problem} (data.cache_dir)")
    too_long = [
        BadRow(o["where"], f"{o['length']} tokens, longer than data.max_prompt_length") for o in overlong
    ]
    return LoadedPrompts(
        dataset,
        rows=rows,
        bad=len(bad),
        overlong=len(overlong),
        duplicates=len(dataset.duplicates),
        lengths=np.array(kept_lengths, np.int32),
        dropped=(*bad, *dataset.duplicates, *too_long),
        notes=tuple(notes),
    )


def _append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    if records:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
