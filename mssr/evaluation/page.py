"""items.html: a page to read items: image, question, responses, what was extracted, truth, verdict.

One file without any outside resource; its form is the template page.html. Responses are text of a model and
may hold anything, ``<script>`` included: all of them are escaped, and the page's policy lets no script run
but its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from mssr.data.images import image_sources, reason
from mssr.evaluation.items import STATUSES
from mssr.runs.html import cut, data_uri, render, thumbnail

ImageOf = Callable[[str, str], bytes | Sequence[bytes] | None]
"""(benchmark, item id) -> the item's encoded image, or several, or None where there is none."""
MAX_IMAGES = 4
"""Shown of an item."""


def items_page(
    records: Sequence[Mapping[str, Any]],
    title: str,
    image_of: ImageOf | None,
    *,
    max_items: int = 300,
    max_samples: int = 4,
    max_characters: int = 12_000,
    image_side: int = 448,
) -> str:
    """The page of an evaluation, of bounded size; items.jsonl has everything.

    Args:
        records: of items.jsonl, sorted by benchmark, id and sample.
        title: the model.
        image_of: asked for the items on the page only.
        max_items: of more, a choice that is spread over benchmarks and verdicts.
        max_samples: responses shown of an item.
        max_characters: of a question or response; from a longer one the middle is left out.
        image_side: longest side of an image in pixels; larger ones are made smaller.
    """
    items = [list(rows) for _, rows in groupby(records, key=lambda row: (row["benchmark"], row["id"]))]
    counts = Counter(row["status"] for row in records)
    return render(
        "evaluation",
        "page.html",
        {"cut": partial(cut, most=max_characters)},
        title=title,
        responses=len(records),
        items=len(items),
        chosen=[(rows, _pictures(rows[0], image_of, image_side)) for rows in _choose(items, max_items)],
        most_samples=max_samples,
        statuses={status: counts[status] for status in STATUSES},
        benchmarks=sorted({rows[0]["benchmark"] for rows in items}),
    )


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


def _pictures(row: Mapping[str, Any], image_of: ImageOf | None, side: int) -> dict[str, list[str]]:
    """Addresses of an item's images, and notes on those that are not shown or cannot be read."""
    data = image_of(row["benchmark"], row["id"]) if image_of else None
    images = [data] if isinstance(data, bytes) else list(data or [])
    addresses, notes = [], [] if images else ["no image"]
    for image in images[:MAX_IMAGES]:
        try:
            addresses.append(data_uri(thumbnail(image_sources(image)[0].decode(), side), "jpeg"))
        except Exception as error:  # PIL raises many types for a broken file
            notes.append(f"image cannot be shown: {reason(error)}")
    if len(images) > MAX_IMAGES:
        notes.append(f"{len(images) - MAX_IMAGES} more images")
    return {"addresses": addresses, "notes": notes}
