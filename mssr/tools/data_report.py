"""`mssr data`: what the trainer will see, before any training: counts, lengths, answers, prompts.

The page is one file, pictures included, so that it can be sent to somebody.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mssr.config.secrets import redact
from mssr.data.encoder import PromptEncoder
from mssr.data.loading import LoadedPrompts
from mssr.data.rows import BadRow, Row
from mssr.models.loading import check_model_path
from mssr.rewards.extraction import unwrap
from mssr.runs.config import advice, load_config
from mssr.runs.html import data_uri, render
from mssr.trainer.data import load_data

SHOWN = 12
"""Prompts on the page, of each split, spread over the data."""
BINS = 30
KINDS = (
    ("choice letter", r"\(?[A-H]\)?\.?"),
    ("whole number", r"[-+−]?\d{1,3}(,\d{3})+|[-+−]?\d+"),
    ("decimal number", r"[-+−]?\d*\.\d+"),
    ("percent", r"[-+−]?[\d.,]+\s*\\?%"),
    ("fraction", r"[-+−]?\d+/\d+|.*\\[dt]?frac.*"),
    ("yes or no", r"yes|no|true|false"),
    ("number with unit", r"[-+−]?[\d.,]+\s*\S+"),
    ("LaTeX", r".*[\\^_{}$].*"),
    ("one word", r"\w+"),
)


def data_report(config_file: str | Path, overrides: Sequence[str] = (), out: Path | None = None) -> Path:
    """Check the data of a config as a training would, print the counts, write the page; returns its path.

    Raises:
        UserError: the input is wrong; the same words as a training would have.
    """
    config = load_config(config_file, overrides, note=print)
    check_model_path(config.model)
    for line in advice(config):
        print(f"note: {line}")
    config.run_dir.mkdir(parents=True, exist_ok=True)
    data = load_data(config)
    for line in [*data.notes, *data.item_notes]:
        print(f"note: {line}")
    splits = {"train": data.train}
    for one in data.val:
        if one.rows is not None:
            splits[f"validation {one.set.name}".strip()] = one.rows
        else:
            print(f"validation {one.set.name}: {one.summary}")
    for name, loaded in splits.items():
        print(f"{name}: {loaded.summary()}")
        for reason, count in _reasons(loaded.dropped):
            print(f"  {count} x {reason}")
    if config.trainer.epochs is not None:
        print(f"trainer.epochs={config.trainer.epochs}: {data.config.trainer.steps} steps")
    path = out or config.run_dir / "data.html"
    described = [
        _split(data.encoder, name, loaded, config.data.max_prompt_length) for name, loaded in splits.items()
    ]
    title = redact(f"Data of {config.experiment_name}")
    path.write_text(render("tools", "data.html", {"redact": redact}, title=title, splits=described))
    print(f"written: {path}")
    return path


def _reasons(dropped: Sequence[BadRow]) -> list[tuple[str, int]]:
    """Kinds of reasons, the most frequent first; numbers in them are put together."""
    return Counter(re.sub(r"\d+", "N", row.reason) for row in dropped).most_common(10)


def answer_kind(answer: str) -> str:
    """What an answer looks like: decides whether exact_match, math, choice or number suits it."""
    text = unwrap(answer).strip().strip("$").strip()
    for name, pattern in KINDS:
        if re.fullmatch(pattern, text, re.IGNORECASE | re.DOTALL):
            return name
    return "text"


def _split(encoder: PromptEncoder, name: str, loaded: LoadedPrompts, longest: int) -> dict[str, Any]:
    """What the page says of a set."""
    ids, lengths = loaded.dataset.ids, np.asarray(loaded.lengths)
    counts, edges = np.histogram(lengths, bins=BINS)
    shown = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, SHOWN).astype(int))]
    return {
        "name": name,
        "summary": redact(loaded.summary()),
        "lengths": f"{lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}, 95% below "
        f"{np.percentile(lengths, 95):.0f}, limit {longest}",
        "bars": [
            {"first": first, "last": last, "count": count}
            for first, last, count in zip(edges, edges[1:], counts.tolist(), strict=False)
        ],
        "kinds": Counter(map(answer_kind, loaded.dataset.answers(ids))).most_common(),
        "reasons": _reasons(loaded.dropped),
        "dropped": loaded.dropped[:20],
        "prompts": [_prompt(encoder, loaded.dataset.row(i)) for i in shown],
    }


def _prompt(encoder: PromptEncoder, row: Row) -> dict[str, Any]:
    images = encoder.images(row)
    texts = re.split(r"(<\|.*?\|>)", encoder.chat_text(row))
    return {
        "row": row,
        "tokens": len(encoder.encode(row).token_ids),
        "sizes": [image.size for image in images],
        "pictures": [data_uri(_png(image), "png") for image in images],
        "texts": [(text, k % 2 == 1) for k, text in enumerate(texts)],
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
