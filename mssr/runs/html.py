"""What the pages of mssr share: each is one file that needs nothing else and can be sent to somebody."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def render(room: str, template: str, filters: Mapping[str, Callable[[Any], Any]], **values: Any) -> str:
    """A page from ``mssr/<room>/<template>``; in HTML all values are escaped.

    ``base_style`` is for all pages, ``charts_style`` and ``charts_script`` for `mssr.runs.charts`.
    A page names the ``sha256`` of its script in its policy, so that what a response holds is never run.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mssr", room),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"sha256": _sha256, "code": _code, **filters}
    files = {"base_style": "pages.css", "charts_style": "charts.css", "charts_script": "charts.js"}
    shared = {name: Path(__file__).with_name(file).read_text("utf-8") for name, file in files.items()}
    return environment.get_template(template).render(**shared, **values)


def _code(text: str) -> Any:
    """What stands in backticks as code."""
    import markupsafe

    return markupsafe.Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", str(markupsafe.escape(text))))


def _sha256(text: str) -> str:
    """As a policy for the content of a page names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def data_uri(data: bytes, kind: str) -> str:
    """Address of an image that is in the page itself; ``kind`` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail(image: Image.Image, side: int) -> bytes:
    """A JPEG whose longest side has at most so many pixels."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def cut(text: str, most: int) -> str:
    """A long text without its middle: the answer stands at the end."""
    left_out = len(text) - most
    if left_out <= 0:
        return text
    return f"{text[: most // 2]}\n[... {left_out} characters left out ...]\n{text[most // 2 + left_out :]}"
