"""Data set -> the prompts of a run: bad rows listed, overlong prompts dropped, with counts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mssr.data_config import DataConfig
from mssr.data.dataset import BadRow, PromptDataset
from mssr.data.encoder import PromptEncoder
from mssr.errors import UserError


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """The usable prompts of one source."""

    dataset: PromptDataset
    bad: int
    """Rows that could not be used; listed in bad_rows.jsonl."""
    overlong: int
    """Prompts longer than data.max_prompt_length, dropped."""

    def summary(self) -> str:
        dropped = [f"{n} {what}" for n, what in ((self.bad, "bad"), (self.overlong, "overlong")) if n]
        return f"{len(self.dataset)} prompts" + (f" ({', '.join(dropped)} dropped)" if dropped else "")


def load_prompts(
    source: str, config: DataConfig, encoder: PromptEncoder, bad_rows_file: Path, prefix: str = ""
) -> LoadedPrompts:
    """Open a source, check every row and drop what cannot be trained on. No image is decoded.

    Raises:
        UserError: the source cannot be opened, more than ``data.max_bad_fraction`` of its rows are
            bad (the list is written first), or no prompt is left.
    """
    dataset = PromptDataset(source, config, prefix)
    rows = len(dataset) + len(dataset.bad_rows)
    kept: list[str] = []
    overlong = 0
    for row, sizes in dataset.check():
        try:
            length = encoder.length(row, sizes)
        except ValueError as error:  # an aspect ratio that the resizing refuses
            dataset.bad_rows.append(BadRow(row.where, str(error)))
            continue
        if length > config.max_prompt_length:
            overlong += 1
        else:
            kept.append(row.id)
    bad = dataset.bad_rows
    if bad:
        with bad_rows_file.open("a") as file:
            file.writelines(json.dumps({"where": b.where, "reason": b.reason}) + "\n" for b in bad)
    if len(bad) > config.max_bad_fraction * rows:
        raise UserError(
            f"{bad[0].where}: {bad[0].reason}; {len(bad)} of {rows} rows are bad, listed in {bad_rows_file} "
            "(data.max_bad_fraction allows some)"
        )
    if not kept:
        raise UserError(
            f"{source}: no prompt left of {rows} rows, {overlong} are longer than "
            f"data.max_prompt_length={config.max_prompt_length} tokens"
        )
    dataset.keep(kept)
    return LoadedPrompts(dataset, len(bad), overlong)
