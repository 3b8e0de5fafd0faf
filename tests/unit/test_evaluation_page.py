"""items.html: escaped, filterable, self-contained and of bounded size."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mssr.evaluation.page import items_page
from tests.unit.evaluation_records import a_record as make

pytestmark = pytest.mark.unit


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 60).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


class Reader(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]


def test_everything_is_escaped() -> None:
    evil = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onclick=alert(3) &amp;"
    row = make(
        evil,
        benchmark=evil,
        question=evil,
        answer=evil,
        response=evil,
        extracted=evil,
        rule=evil,
        finish_reason=evil,
        tags={evil: evil},
    )
    page = items_page([row], evil, None)
    reader = Reader(page)
    assert reader.tags["script"] == 1 and reader.tags["img"] == 0 and reader.tags["section"] == 1
    assert not any(name.startswith("on") for _, attributes in reader.attributes for name in attributes)
    assert reader.all("article")[0]["data-benchmark"] == evil
    # It is all there to be read: title (2), option of the filter, name (2), tags (2), six more fields.
    assert reader.text.count(evil) == 13


def test_the_page_needs_nothing_else_and_runs_only_its_own_script() -> None:
    page = items_page([make("1")], "m", lambda *_: png(8, 8))
    assert not re.search(r"https?://|@import|url\(", page)
    sources = [a["src"] or "" for a in Reader(page).all("img")]
    assert len(sources) == 1 and sources[0].startswith("data:image/jpeg;base64,")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = Reader(page).all("meta")[1]["content"] or ""
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_an_item_with_its_verdict() -> None:
    rows = [
        make("7", "wrong", answer="9", extracted=None, response="no idea", sample=0),
        make("7", "truncated", finish_reason="length", response_tokens=2048, sample=1),
    ]
    reader = Reader(items_page(rows, "model-x", None))
    text = " ".join(reader.text.split())
    assert reader.tags["article"] == 1
    assert [a["data-status"] for a in reader.all("section")] == ["wrong", "truncated"]
    assert "sample 0: wrong by choice, nothing extracted, 10 tokens, finish reason stop" in text
    assert "sample 1: truncated by choice, extracted: 8, 2048 tokens, finish reason length" in text
    assert "mmk12 7 subject: physics" in text and "truth: 9" in text and "no image" in text
    assert "wrong (1)" in text and "truncated (1)" in text and "judge failed (0)" in text
    assert "2 responses to 1 items." in text and "model-x" in text


def test_images_are_small_jpegs_and_damaged_ones_are_named() -> None:
    images: dict[str, Any] = {
        "large": png(2000, 1000),
        "clear": png(64, 32, "RGBA"),
        "two": [png(10, 20), png(30, 20)],
        "none": None,
        "bad": b"<b>no image",
        "many": [png(8, 8)] * 6,
    }
    rows = [make(name) for name in images]
    page = items_page(rows, "m", lambda benchmark, item: images[item], image_side=100)
    articles = dict(zip(images, re.findall(r"<article.*?</article>", page, re.DOTALL), strict=True))

    def sizes(name: str) -> list[tuple[int, int]]:
        data = re.findall(r"data:image/jpeg;base64,([^\"]+)", articles[name])
        opened = [Image.open(io.BytesIO(base64.b64decode(d))) for d in data]
        assert all(image.format == "JPEG" for image in opened)
        return [image.size for image in opened]

    assert sizes("large") == [(100, 50)] and sizes("clear") == [(64, 32)]
    assert sizes("two") == [(10, 20), (30, 20)] and sizes("none") == [] and "no image" in articles["none"]
    assert (
        sizes("bad") == [] and "image cannot be shown" in articles["bad"] and "<b>no" not in articles["bad"]
    )
    assert len(sizes("many")) == 4 and "2 more images" in articles["many"]


def test_of_many_items_every_kind_is_shown() -> None:
    rows = [make(f"{i:04}", "wrong" if i % 3 else "right") for i in range(900)]
    rows += [make(f"j{i}", "judge_failed") for i in range(2)]
    rows += [make(f"{i:04}", "right", benchmark="mathvista") for i in range(300)]
    asked = []

    def image_of(benchmark: str, item: str) -> None:
        asked.append(item)

    page = items_page(rows, "m", image_of, max_items=62)
    reader = Reader(page)
    assert reader.tags["article"] == 62 == len(asked)
    assert "1202 responses to 1202 items. This page has 62 of the items" in reader.text
    kinds = Counter(
        (article["data-benchmark"], section["data-status"])
        for article, section in zip(reader.all("article"), reader.all("section"), strict=True)
    )
    assert kinds == {
        ("mmk12", "judge_failed"): 2,
        ("mmk12", "right"): 20,
        ("mmk12", "wrong"): 20,
        ("mathvista", "right"): 20,
    }
    # Spread from the first to the last, in their order, and the counts are of all.
    assert asked[0] == "0000" and "0899" in asked and "0299" in asked and "wrong (600)" in reader.text


def test_long_texts_and_many_samples_are_cut() -> None:
    rows = [make("1", response="a" * 5000 + "middle" + "z" * 5000, sample=k) for k in range(9)]
    page = items_page(rows, "m", None, max_characters=1000, max_samples=2)
    assert "a" * 500 + "\n[... 9006 characters left out ...]\n" + "z" * 500 in page
    assert "middle" not in page and Reader(page).tags["section"] == 2
    assert "7 more samples are in items.jsonl." in page
    assert len(page) < 10_000


DOM = """
class Element {
  constructor(data) { this.dataset = data; this.hidden = false; this.value = ""; this.textContent = ""; }
  addEventListener(_, call) { this.call = call; }
}
const parts = Object.fromEntries(["status", "benchmark", "text", "shown"].map((id) => [id, new Element({})]));
const articles = ITEMS.map(([data, fixed, sections]) => {
  const card = new Element(data);
  const inner = sections.map(([d, text]) => Object.assign(new Element(d), {textContent: text}));
  card.querySelector = () => ({textContent: fixed});
  card.querySelectorAll = () => inner;
  return card;
});
globalThis.document = {getElementById: (id) => parts[id], querySelectorAll: () => articles};
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's script in node")
def test_the_filters(tmp_path: Path) -> None:
    rows = [
        make("1", "right", question="A triangle ABC"),
        make("2", "wrong", sample=0, response="the Triangle is right-angled"),
        make("2", "extraction_failed", sample=1, response="dunno"),
        make("3", "wrong", benchmark="mathvista", tags={"task": "charts"}),
    ]
    page = items_page(rows, "m", None)
    # The data of the page's own elements, as its script would find them.
    items = []
    for article in re.findall(r"<article.*?</article>", page, re.DOTALL):
        reader = Reader(article)
        data = {k[5:]: v for k, v in reader.all("article")[0].items() if k.startswith("data-")}
        fixed = re.search(r'<div class="fixed">(.*?)</div>', article, re.DOTALL)
        sections = re.findall(r"<section.*?</section>", article, re.DOTALL)
        assert fixed is not None
        items.append(
            [
                data,
                Reader(fixed[1]).text,
                [[{"status": Reader(s).all("section")[0]["data-status"]}, Reader(s).text] for s in sections],
            ]
        )
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script is not None
    cases = [
        ({}, ["1", "2.0", "2.1", "3"]),
        ({"status": "wrong"}, ["2.0", "3"]),
        ({"status": "wrong", "benchmark": "mathvista"}, ["3"]),
        ({"text": "TRIANGLE"}, ["1", "2.0"]),
        ({"text": "triangle angled"}, ["2.0"]),
        ({"text": "charts"}, ["3"]),
        ({"text": "mmk12 dunno"}, ["2.1"]),
        ({"status": "judge_failed"}, []),
    ]
    program = (
        f"const ITEMS = {json.dumps(items)};{DOM}{script[1]}"
        + """
    const results = CASES.map((values) => {
      for (const id of ["status", "benchmark", "text"]) parts[id].value = values[id] ?? "";
      parts.text.call();
      const shown = articles.map((a) => a.hidden ? [] : a.querySelectorAll().map((s) => !s.hidden));
      return [shown, parts.shown.textContent];
    });
    console.log(JSON.stringify(results));
    """.replace("CASES", json.dumps([values for values, _ in cases]))
    )
    (tmp_path / "page.js").write_text(program)
    done = subprocess.run(["node", str(tmp_path / "page.js")], capture_output=True, text=True, check=True)
    names = [["1"], ["2.0", "2.1"], ["3"]]
    for (values, expected), (shown, count) in zip(cases, json.loads(done.stdout), strict=True):
        found = [
            name
            for group, flags in zip(names, shown, strict=True)
            for name, flag in zip(group, flags, strict=False)
            if flag
        ]
        assert sorted(found) == expected, values
        assert count == f"{len({name[0] for name in expected})} of 3 items"
