"""What the pages of mssr share: each is one file that needs nothing else and can be sent to somebody."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

BASE_STYLE = (
    "body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; color: #222 }\n"
    "table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; text-align: left;\n"
    "border-bottom: 1px solid #ddd; vertical-align: top }"
)


def render(room: str, template: str, filters: Mapping[str, Callable[[Any], Any]], **values: Any) -> str:
    """A page from ``mssr/<room>/<template>``; in HTML all values are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mssr", room),
        autoescape=template.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(base_style=BASE_STYLE, **values)


def data_uri(data: bytes, kind: str) -> str:
    """Address of an image that is in the page itself; ``kind`` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
