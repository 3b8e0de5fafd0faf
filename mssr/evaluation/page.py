"""items.html: a page to read items: image, question, responses, what was extracted, truth, verdict.

One file without any outside resource. Responses are text of a model and may hold anything, ``<script>``
included: all of them are escaped, and the page's policy lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from mssr.data.images import image_sources, reason
from mssr.evaluation.items import STATUSES
from mssr.runs.html import BASE_STYLE, data_uri

ImageOf = Callable[[str, str], bytes | Sequence[bytes] | None]
"""(benchmark, item id) -> the item's encoded image, or several, or None where there is none."""


@dataclass(frozen=True, slots=True)
class PageOptions:
    """What bounds the size of the page; items.jsonl has everything."""

    max_items: int = 300
    """Items on the page; of more, a choice that is spread over benchmarks and verdicts."""
    max_samples: int = 4
    """Responses shown of an item."""
    max_characters: int = 12_000
    """Of a question or response; from a longer one the middle is left out."""
    image_side: int = 448
    """Longest side of an image in pixels; larger ones are made smaller."""
    max_images: int = 4
    """Images shown of an item."""


_STYLE = """
article { border-top: 2px solid #ccc; padding: .6rem 0; display: grid; grid-template-columns: 320px 1fr;
gap: 0 1.2rem } article > header { grid-column: 1 / -1 } img { max-width: 100%; border: 1px solid #ddd }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6rem; margin: .3rem 0;
max-height: 28rem; overflow-y: auto } nav { position: sticky; top: 0; background: #fff; padding: .6rem 0;
border-bottom: 1px solid #ccc; display: flex; gap: 1rem; flex-wrap: wrap; align-items: center }
.status { font-weight: 600; color: #b3261e } .right .status { color: #187a33 }
.tags { color: #666 } [hidden] { display: none !important }
@media (max-width: 800px) { article { display: block } }
"""
_SCRIPT = """
const find = (id) => document.getElementById(id);
const cards = [...document.querySelectorAll("article")].map((card) => ({
  card,
  text: card.querySelector(".fixed").textContent.toLowerCase() + card.dataset.search,
  samples: [...card.querySelectorAll("section")].map((s) => [s, s.textContent.toLowerCase()]),
}));
function filter() {
  const status = find("status").value, benchmark = find("benchmark").value;
  const words = find("text").value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const { card, text, samples } of cards) {
    let some = false;
    for (const [sample, own] of samples) {
      const fits = (!status || sample.dataset.status === status)
        && words.every((word) => text.includes(word) || own.includes(word));
      sample.hidden = !fits;
      some ||= fits;
    }
    card.hidden = !some || (benchmark !== "" && card.dataset.benchmark !== benchmark);
    shown += card.hidden ? 0 : 1;
  }
  find("shown").textContent = shown + " of " + cards.length + " items";
}
for (const id of ["status", "benchmark", "text"]) find(id).addEventListener("input", filter);
filter();
"""


def items_page(
    records: Sequence[Mapping[str, Any]],
    title: str,
    image_of: ImageOf | None,
    options: PageOptions,
) -> str:
    """The page of an evaluation.

    Args:
        records: of items.jsonl, sorted by benchmark, id and sample.
        title: the model.
        image_of: asked for the items on the page only.
    """
    items = [list(rows) for _, rows in groupby(records, key=lambda row: (row["benchmark"], row["id"]))]
    chosen = _choose(items, options.max_items)
    counts = Counter(row["status"] for row in records)
    benchmarks = sorted({rows[0]["benchmark"] for rows in items})
    note = f"{len(records)} responses to {len(items)} items."
    if len(chosen) < len(items):
        note += (
            f" This page has {len(chosen)} of the items, spread over benchmarks and verdicts; items.jsonl "
            "has all."
        )
    statuses = [(s, f"{s.replace('_', ' ')} ({counts[s]})") for s in STATUSES]
    articles = "\n".join(_article(rows, image_of, options) for rows in chosen)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title><style>
{BASE_STYLE}{_STYLE}</style></head><body><h1>Evaluation of {html.escape(title)}</h1><p>{note}</p>
<nav><label>verdict {_select("status", statuses)}</label>
<label>benchmark {_select("benchmark", [(b, b) for b in benchmarks])}</label>
<label>text <input id="text" type="search"></label><span id="shown"></span></nav>
{articles}
<script>{_SCRIPT}</script></body></html>
"""


def _choose(items: Sequence[list[Mapping[str, Any]]], most: int) -> list[list[Mapping[str, Any]]]:
    """At most so many items, in their order: an equal share of every benchmark and first verdict.

    A share that a kind cannot fill goes to the others, so that rare verdicts are all there; of a kind
    with more, items that are evenly spaced.
    """
    if len(items) <= most:
        return list(items)
    kinds: dict[tuple[str, str], list[int]] = {}
    for index, rows in enumerate(items):
        kinds.setdefault((rows[0]["benchmark"], rows[0]["status"]), []).append(index)
    left = most
    chosen: list[int] = []
    # The smallest first, so that what they leave is known to the larger ones.
    for done, kind in enumerate(sorted(kinds, key=lambda kind: (len(kinds[kind]), kind))):
        members = kinds[kind]
        share = min(len(members), left // (len(kinds) - done))
        left -= share
        chosen += [members[k] for k in np.linspace(0, len(members) - 1, share).astype(int)]
    return [items[index] for index in sorted(chosen)]


def _article(rows: Sequence[Mapping[str, Any]], image_of: ImageOf | None, options: PageOptions) -> str:
    """An item with its responses."""
    first = rows[0]
    tags = ", ".join(f"{key}: {value}" for key, value in sorted(first["tags"].items()))
    shown = rows[: options.max_samples]
    more = (
        f"<p>{len(rows) - len(shown)} more samples are in items.jsonl.</p>" if len(rows) > len(shown) else ""
    )
    name = f"{first['benchmark']} {first['id']}"
    samples = "".join(_sample(row, len(rows), options) for row in shown)
    return (
        f'<article data-benchmark="{html.escape(first["benchmark"])}" '
        f'data-search="{html.escape(f" {name} {tags}".lower())}">'
        f'<header><b>{html.escape(name)}</b> <span class="tags">{html.escape(tags)}</span></header>'
        f"<div>{_pictures(first, image_of, options)}</div>"
        f'<div><div class="fixed"><pre>{_text(first["question"], options)}</pre>'
        f"<p>truth: <code>{_text(first['answer'], options)}</code></p></div>{samples}{more}</div></article>"
    )


def _sample(row: Mapping[str, Any], samples: int, options: PageOptions) -> str:
    """A response and its verdict."""
    number = f"sample {row['sample']}: " if samples > 1 else ""
    extracted = row["extracted"]
    found = (
        "nothing extracted" if extracted is None else f"extracted: <code>{_text(extracted, options)}</code>"
    )
    status = row["status"].replace("_", " ")
    return (
        f'<section class="{row["status"]}" data-status="{row["status"]}"><p>{number}'
        f'<span class="status">{status}</span> by {html.escape(row["rule"])}, {found}, '
        f"{row['response_tokens']} tokens, finish reason {html.escape(row['finish_reason'])}</p>"
        f"<pre>{_text(row['response'], options)}</pre></section>"
    )


def _text(text: str, options: PageOptions) -> str:
    """Escaped, and cut in the middle if it is long: the answer stands at the end."""
    cut = len(text) - options.max_characters
    if cut > 0:
        half = options.max_characters // 2
        end = text[len(text) - (options.max_characters - half) :]
        text = f"{text[:half]}\n[... {cut} characters left out ...]\n{end}"
    return html.escape(text)


def _pictures(row: Mapping[str, Any], image_of: ImageOf | None, options: PageOptions) -> str:
    """The images of an item; one that cannot be read is named and does not stop the page."""
    data = image_of(row["benchmark"], row["id"]) if image_of else None
    images = [data] if isinstance(data, bytes) else list(data or [])
    if not images:
        return '<p class="tags">no image</p>'
    parts = []
    for image in images[: options.max_images]:
        try:
            address = data_uri(_jpeg(image, options.image_side), "jpeg")
            parts.append(f'<img alt="image of the item" src="{address}">')
        except Exception as error:  # PIL raises many types for a broken file
            parts.append(f'<p class="tags">image cannot be shown: {html.escape(reason(error))}</p>')
    if len(images) > options.max_images:
        parts.append(f'<p class="tags">{len(images) - options.max_images} more images</p>')
    return "".join(parts)


def _jpeg(data: bytes, side: int) -> bytes:
    image = image_sources(data)[0].decode()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def _select(name: str, choices: Sequence[tuple[str, str]]) -> str:
    options = "".join(f'<option value="{html.escape(v)}">{html.escape(text)}</option>' for v, text in choices)
    return f'<select id="{name}"><option value="">all</option>{options}</select>'
