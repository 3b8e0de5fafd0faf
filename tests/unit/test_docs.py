"""The pages lead somewhere: links, anchors, names of options and configs of every Markdown file."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from mssr.config import Config
from mssr.config.options import describe
from mssr.config.recipes import SETS, find
from mssr.runs.config import load_config
from mssr.tools.cli import _parser

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDERS = ["docs", "examples", "scripts", ".github"]
PAGES = sorted([*ROOT.glob("*.md"), *(page for name in FOLDERS for page in (ROOT / name).rglob("*.md"))])
COMING = {DOCS / "study.md"}
"""Written when the study has run."""
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s]+)\)")


def prose(page: Path) -> str:
    """Without blocks of code, in which nothing is a link or a heading."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@cache
def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site name them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target in COMING or (target.exists() and target.is_relative_to(ROOT)), f"{link}: no such file"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), f"{link}: no such heading"


def test_headings_are_named_as_github_names_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# The judge: `--judge`\n## A [link](x.md)\n## No_score?\n## A link\n```\n# no heading\n```\n"
    )
    assert anchors(page) == {"the-judge---judge", "a-link", "no_score", "a-link-1"}


def test_the_navigation_has_every_page() -> None:
    shown = re.findall(r"^ *- .* (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(page.name for page in DOCS.glob("*.md"))


OTHERS = ("convert.md", "errors.md", "from_others.md", "plugins.md", "CHANGELOG.md")
"""Pages that name options of other projects, or of before. (Of errors.md: test_errors.py.)"""
FREE = ("reward.options.", "algorithm.options.", "algorithm.loss.options.", "cluster.env.")
"""Options under these are of what is chosen."""
FILES = (".html", ".json", ".jsonl", ".md", ".py", ".safetensors", ".sh")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_that_is_named_is_one(page: Path) -> None:
    known = describe(Config)
    sections = "|".join(key for key, about in known.items() if about.section and "." not in key)
    named = re.findall(rf"`((?:{sections})\.[\w.]+)(?:=[^`]*)?`", prose(page))
    wrong = {key for key in named if key not in known and not key.endswith(FILES)}
    assert page.name in OTHERS or not {key for key in wrong if not key.startswith(FREE)}


def commands(page: Path) -> list[list[str]]:
    """The words of each ``mssr`` command that a page shows."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["mssr"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_shown_is_one(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are known; where its config is one of ours, so are its settings, and they go together."""
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        args, rest = _parser().parse_known_args(words)
        assert not [word for word in rest if "=" not in word or word.startswith("-")], words
        config = getattr(args, "config_file", None)
        if words[0] in ("train", "plan", "data") and ("/" in config or config in SETS):
            load_config(find(config), [*args.overrides, *rest])
