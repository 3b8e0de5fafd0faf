"""How links of docs/ are read when the site is made (mkdocs.yml): the same links hold on GitHub, too.

A link from docs/ to a Markdown file elsewhere in the repository leads to a page that the site has of that
file, in ``repository/``. A link to any other file or folder outside docs/ stays one into the repository
that the site lies in.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([\w./-]+)(#[\w-]+)?\)")
OUTSIDE = "outside:"
"""Marks a link that mkdocs is to leave alone: to it, this is another scheme of addresses."""


def on_files(files: Any, config: Any) -> Any:
    """Add the Markdown files outside docs/ that its pages lead to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    known = set(waiting)
    while waiting:
        page = waiting.pop()
        for path, _ in LINK.findall(page.read_text()):
            target = (page.parent / path).resolve()
            if target.suffix == ".md" and target.exists() and target not in known:
                known.add(target)
                waiting.append(target)
                files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = Path(page.file.abs_src_path)
    if not source.is_relative_to(DOCS):
        page.meta["search"] = {"boost": 0.5}  # a page that explains comes before one that measures
    built = Path(config.site_dir, page.file.dest_uri)

    def link(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        target = (source.parent / path).resolve()
        if not target.exists():
            return match[0]  # mkdocs says so
        if target.is_file() and (target.is_relative_to(DOCS) or target.suffix == ".md"):
            here = os.path.dirname(page.file.src_uri)
            return f"]({os.path.relpath(_uri(target), here)}{anchor})"
        return f"]({OUTSIDE}{os.path.relpath(target, built.parent)}{anchor})"

    return LINK.sub(link, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    return html.replace(f'="{OUTSIDE}', '="')


def _uri(file: Path) -> str:
    """By which the site knows a file."""
    if file.is_relative_to(DOCS):
        return str(file.relative_to(DOCS))
    return str("repository" / file.relative_to(ROOT))
