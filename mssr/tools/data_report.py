"""`mssr data`: what the trainer will see, before any training: counts, lengths, answers, prompts.

The page is one file, pictures included, so that it can be sent to somebody.
"""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mssr.config import Config
from mssr.config.checks import advice
from mssr.config.loading import load_config
from mssr.config.secrets import redact
from mssr.data.encoder import PromptEncoder
from mssr.data.loading import LoadedPrompts
from mssr.data.rows import BadRow, Row
from mssr.models.loading import check_model_path
from mssr.rewards.extraction import unwrap
from mssr.runs.html import BASE_STYLE, data_uri
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


def data_report(config_file: str | Path, overrides: Sequence[str] = (), out: str | None = None) -> Path:
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
    path = Path(out) if out else config.run_dir / "data.html"
    path.write_text(_page(config, data.encoder, splits))
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


def _page(config: Config, encoder: PromptEncoder, splits: Mapping[str, LoadedPrompts]) -> str:
    title = html.escape(redact(f"Data of {config.experiment_name}"))
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
{BASE_STYLE} pre {{ white-space: pre-wrap; background: #f5f5f5;
padding: .6rem }} img {{ max-width: 100%; max-height: 320px; border: 1px solid #ddd; margin-right: .5rem }}
article {{ border-top: 2px solid #ccc; padding: .6rem 0 }} mark {{ background: #dbe9ff }}
</style></head><body><h1>{title}</h1>
{"".join(_split(encoder, *split, config.data.max_prompt_length) for split in splits.items())}
</body></html>
"""


def _split(encoder: PromptEncoder, name: str, loaded: LoadedPrompts, longest: int) -> str:
    dataset = loaded.dataset
    ids = dataset.ids
    answers = dataset.answers(ids)
    kinds = _table("answers look like", Counter(map(answer_kind, answers)).most_common())
    reasons = _table("rows left out because", _reasons(loaded.dropped)) if loaded.dropped else ""
    examples = "".join(
        f"<tr><td>{html.escape(redact(row.where))}</td><td>{html.escape(redact(row.reason))}</td></tr>"
        for row in loaded.dropped[:20]
    )
    if examples:
        examples = f"<details><summary>the first of them</summary><table>{examples}</table></details>"
    shown = [ids[i] for i in np.unique(np.linspace(0, len(ids) - 1, SHOWN).astype(int))]
    prompts = "".join(_prompt(encoder, dataset.row(i)) for i in shown)
    return f"""<h2>{name}: {html.escape(redact(loaded.summary()))}</h2>
{_histogram(np.asarray(loaded.lengths), longest)}{kinds}{reasons}{examples}
<h3>Prompts, exactly as the model gets them</h3>{prompts}"""


def _table(title: str, rows: Sequence[tuple[str, int]]) -> str:
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{count}</td></tr>" for name, count in rows)
    return f"<table><tr><th>{title}</th><th>rows</th></tr>{cells}</table>"


def _histogram(lengths: np.ndarray, longest: int) -> str:
    """Prompt lengths as an SVG."""
    counts, edges = np.histogram(lengths, bins=BINS)
    width, height, top = 720, 160, max(int(counts.max()), 1)
    bar = width / BINS
    bars = "".join(
        f'<rect x="{k * bar:.1f}" y="{height - height * c / top:.1f}" width="{bar - 1:.1f}" '
        f'height="{height * c / top:.1f}" fill="#4a7fc1">'
        f"<title>{edges[k]:.0f} to {edges[k + 1]:.0f} tokens: {c}</title></rect>"
        for k, c in enumerate(counts)
    )
    middle = f"median {np.median(lengths):.0f}, 95% below {np.percentile(lengths, 95):.0f}"
    return (
        f"<p>Prompt length in tokens: {lengths.min()} to {lengths.max()}, {middle}, limit {longest}.</p>"
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="prompt lengths">'
        f"{bars}</svg>"
    )


def _prompt(encoder: PromptEncoder, row: Row) -> str:
    text = re.sub(r"(&lt;\|.*?\|&gt;)", r"<mark>\1</mark>", html.escape(encoder.chat_text(row)))
    images = encoder.images(row)
    pictures = "".join(f'<img alt="image" src="{data_uri(_png(image), "png")}">' for image in images)
    sizes = ", ".join(f"{i.width} x {i.height}" for i in images) or "no image"
    tokens = len(encoder.encode(row).token_ids)
    where = html.escape(redact(row.where))
    return (
        f"<article><p><b>{html.escape(row.id)}</b> ({where}): {tokens} tokens, {sizes}, "
        f"answer <code>{html.escape(row.answer)}</code></p>{pictures}<pre>{text}</pre></article>"
    )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
