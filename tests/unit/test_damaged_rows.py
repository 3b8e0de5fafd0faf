"""500 damaged rows: each is loaded or listed with a reason; none crashes, none vanishes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mssr.config.data import DataConfig
from mssr.data.encoder import PromptEncoder
from mssr.data.loading import LoadedPrompts, load_prompts
from mssr.errors import UserError
from tests.conftest import Workspace
from tests.unit import data_forms as forms

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")]

ROWS = 500


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def turned(seed: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return forms.encoded(image=forms.picture(80, 40, seed), exif=exif)


def animated(seed: int) -> bytes:
    frames = [forms.picture(40, 40, seed + k) for k in range(2)]
    return forms.encoded("GIF", frames[0], save_all=True, append_images=frames[1:])


def jpeg(seed: int) -> bytes:
    return forms.encoded(image=forms.picture(seed=seed))


def png(seed: int) -> bytes:
    return forms.encoded("PNG", forms.picture(seed=seed))


# (cell of the images column from a seed, what the reason says; None if the row is good)
IMAGE_CASES: list[tuple[Callable[[int], Any], str | None]] = [
    (lambda s: text(jpeg(s)), None),
    (lambda s: text(jpeg(s)[: 300 + s]), "image 0 cannot be read"),
    (lambda s: text(png(s)[: 300 + s]), "image 0 cannot be read"),
    (lambda s: text(forms.png_header(0, 0) + bytes([s % 256])), "0x0"),
    (lambda s: text(forms.encoded("PNG", forms.picture(1, 20000, s))), "aspect ratio"),
    (lambda s: text(forms.encoded(image=forms.picture(seed=s).convert("CMYK"))), None),
    (lambda s: text(forms.encoded("PNG", forms.picture(seed=s).convert("P"))), None),
    (lambda s: text(forms.encoded("PNG", Image.new("I;16", (40, 40), 256 * s))), None),
    (lambda s: text(animated(s)), None),
    (lambda s: text(turned(s)), None),
    (lambda s: f"png_{s}.jpg", None),  # a PNG under a wrong name
    (lambda s: text(forms.png_header(20000, 20000) + bytes([s % 256])), "pixels"),
    (lambda s: f"gone_{s}.jpg", "does not exist"),
    (lambda s: [None], "missing"),
    (lambda s: [s], "an image is int"),
    (lambda s: {"bytes": None, "path": None}, "missing"),
    (lambda s: [text(jpeg(s)), {"a": 1}], "missing"),
    (lambda s: [text(jpeg(s))] * 17, "at most 16"),
    (lambda s: text(b"\x89PNG\r\n\x1a\n" + bytes(40)), "image 0 cannot be read"),
    (lambda s: "A" * 3000, "header is damaged"),
    (lambda s: "Q" * 3000, "known format"),
    (lambda s: [[text(jpeg(s))]], None),
    (lambda s: {"image": {"path": None, "bytes": text(jpeg(s))}, "label": 1}, None),
    (lambda s: {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + text(jpeg(s))}}, None),
    (lambda s: text(b"\0\0\0\x18ftypheic" + bytes(60)), "pip install pillow-heif"),
    (lambda s: "https://x.org/a.png", "download it first"),
]
LINE_CASES: list[tuple[Callable[[int], Any], str | None]] = [
    (lambda s: {"problem": None, "answer": str(s)}, "problem is empty"),
    (lambda s: {"problem": f"q{s}", "answer": None}, "answer is empty"),
    (lambda s: {"problem": s, "answer": "1"}, "problem is int"),
    (lambda s: {"problem": [f"q{s}"], "answer": "1"}, "problem is list"),
    (lambda s: {"problem": f"q{s}", "answer": {"x": 1}}, "answer is a list or dict"),
    (lambda s: {"problem": f"q{s} \ud83d", "answer": "1"}, "problem is no valid text"),
    (lambda s: {"problem": f"q{s}", "answer": "\ud83d"}, "answer is no valid text"),
    (lambda s: f'{{"problem": "q{s}", "answer": "1", "answer": "2"}}', "the key 'answer' twice"),
    (lambda s: {"problem": f"<video>q{s}", "answer": "1"}, "videos are not read"),
    (lambda s: {"problem": [{"role": "user", "content": f"q{s}"}], "answer": "1"}, None),
    (lambda s: {"problem": [{"role": "tool", "content": f"q{s}"}], "answer": "1"}, "role 'tool'"),
    (lambda s: {"problem": f"q{s}", "answer": "<answer> </answer>"}, "answer is empty"),
    (lambda s: {"problem": "  ", "answer": str(s)}, "problem is empty"),
    (lambda s: {"problem": f"<image>q{s}", "answer": "1"}, "1 <image> marks but 0 images"),
    (lambda s: {"problem": f"q{s} <|image_pad|>", "answer": "1"}, "stands for pixels"),
    (lambda s: {"answer": str(s)}, "problem is empty"),
    (lambda s: f'{{"problem": "cut {s}', "no JSON"),
    (lambda s: f"[{s}]", "not an object"),
    (lambda s: {"problem": f"long {s} " * 300, "answer": "1"}, "overlong"),
    (lambda s: {"problem": "twice", "answer": "1"}, "twice"),
    (lambda s: {"problem": f"number {s}", "answer": 1.5}, None),
]


@pytest.fixture(scope="module")
def encoder(workspace: Workspace) -> PromptEncoder:
    from mssr.models.loading import load_processor
    from mssr.runs.config import load_config

    config = load_config(workspace.config)
    return PromptEncoder(load_processor(config.model), config.data)


def load(path: Path, encoder: PromptEncoder, out: Path, **changes: Any) -> LoadedPrompts:
    settings = {"max_bad_fraction": 1.0, "max_prompt_length": 1000, "cache_dir": str(out / "cache")}
    config = DataConfig(image_dir=str(path.parent), **(settings | changes))
    return load_prompts(str(path), config, encoder, out / "bad_rows.jsonl", by_rule="math")


def listed(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_500_damaged_rows(encoder: PromptEncoder, tmp_path: Path) -> None:
    rows: list[Any] = []
    expected: list[str | None] = []
    for seed in range(ROWS):
        case = seed % (len(IMAGE_CASES) + len(LINE_CASES))
        if case < len(IMAGE_CASES):
            make, why = IMAGE_CASES[case]
            if case == 10:
                (tmp_path / f"png_{seed}.jpg").write_bytes(png(seed))
            rows.append({"problem": f"q{seed}", "answer": "1", "images": make(seed)})
        else:
            make, why = LINE_CASES[case - len(IMAGE_CASES)]
            rows.append(make(seed))
        expected.append(why)
    first_twice = next(n for n, why in enumerate(expected) if why == "twice")
    expected[first_twice] = None
    path = forms.write_jsonl(tmp_path / "damaged.jsonl", rows)

    for run in ("first", "from the cache"):
        out = tmp_path / "run"
        out.mkdir(exist_ok=True)
        loaded = load(path, encoder, out)
        bad, overlong = listed(out / "bad_rows.jsonl"), listed(out / "overlong.jsonl")
        assert loaded.rows == ROWS == len(loaded.dataset) + loaded.bad + loaded.overlong + loaded.duplicates
        assert (len(bad), len(overlong)) == (loaded.bad + loaded.duplicates, loaded.overlong), run
        reasons = {int(b["where"].rsplit(" ", 1)[1]): b["reason"] for b in bad}
        reasons |= {int(o["where"].rsplit(" ", 1)[1]): "overlong" for o in overlong}
        assert all(o["length"] > 1000 for o in overlong)
        for number, why in enumerate(expected):
            if why is None:
                assert number not in reasons, (number, reasons.get(number))
            elif why == "twice":
                assert f"those of row {first_twice}" in reasons[number]
            else:
                assert why in reasons[number], (number, why, reasons[number])
        (out / "bad_rows.jsonl").unlink()
        (out / "overlong.jsonl").unlink()
    for prompt_id, length in zip(loaded.dataset.ids, loaded.lengths, strict=True):
        row = loaded.dataset.row(prompt_id)
        assert all(i.decode().mode == "RGB" for i in row.images)
        if int(row.where.rsplit(" ", 1)[1]) < 60:
            assert len(encoder.encode(row).token_ids) == length, row.where


def test_damaged_images_in_parquet(encoder: PromptEncoder, tmp_path: Path) -> None:
    rows, expected = [], []
    for seed, (make, why) in enumerate(IMAGE_CASES):
        cell = make(seed)
        if isinstance(cell, str) and len(cell) > 40:
            image = {"bytes": base64.b64decode(cell), "path": None}
            rows.append({"images": [image], "problem": f"q{seed}", "answer": "1"})
            expected.append(why)
    for name, cells in {"problem": [None, "a"], "answer": ["1", None]}.items():
        rows += [{"images": [], "problem": "b", "answer": "1"} | {name: cell} for cell in cells]
    expected += ["problem is empty", None, None, "answer is empty"]
    loaded = load(forms.write_parquet(tmp_path / "a.parquet", rows), encoder, tmp_path)
    reasons = {int(b["where"].rsplit(" ", 1)[1]): b["reason"] for b in listed(tmp_path / "bad_rows.jsonl")}
    assert set(reasons) == {n for n, why in enumerate(expected) if why}
    assert all(why in reasons[n] for n, why in enumerate(expected) if why)
    assert loaded.rows == len(rows) == len(loaded.dataset) + loaded.bad
    for i in loaded.dataset.ids:
        encoder.images(loaded.dataset.row(i))


def test_the_fraction_stops_the_run(encoder: PromptEncoder, tmp_path: Path) -> None:
    rows = [{"problem": f"q{i}", "answer": "1" if i else ""} for i in range(4)]
    path = forms.write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a.jsonl row 0: column answer is empty; 1 of 4 rows are bad"):
        load(path, encoder, tmp_path, max_bad_fraction=0.2)
    assert load(path, encoder, tmp_path, max_bad_fraction=0.25).bad == 1


def test_csv_rows(encoder: PromptEncoder, tmp_path: Path) -> None:
    """An unclosed quote, missing and surplus fields and broken UTF-8 are one bad row each."""
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"problem,answer\n"
        b"good one,1\n"
        b'"never closed,2\n'
        b"good two,3\n"
        b"only one field\n"
        b"a,b,c\n"
        b"bad \xff\xfe bytes,4\n"
        b'"two\nlines",5\n'
        b"\n"
        b'5" pipe,6\n'
    )
    loaded = load(path, encoder, tmp_path)
    assert [loaded.dataset.row(i).answer for i in loaded.dataset.ids] == ["1", "3", "5", "6"]
    assert (loaded.rows, loaded.bad) == (8, 4)
    reasons = [b["reason"] for b in listed(tmp_path / "bad_rows.jsonl")]
    assert "no CSV" in reasons[0] and "1 fields" in reasons[1] and "3 fields" in reasons[2]
    assert "UTF-8" in reasons[3]


def test_a_failure_in_a_worker_names_the_row(encoder: PromptEncoder, tmp_path: Path) -> None:
    """A PNG with right checksums and too few pixels passes the cheap check."""
    rows = [{"problem": "q", "answer": "1", "images": text(forms.png_header(56, 56))}]
    loaded = load(forms.write_jsonl(tmp_path / "a.jsonl", rows), encoder, tmp_path)
    with pytest.raises(UserError, match=r"a.jsonl row 0: image 0 cannot be read"):
        encoder.images(loaded.dataset.row(loaded.dataset.ids[0]))


def test_answers_are_unwrapped(encoder: PromptEncoder, tmp_path: Path) -> None:
    wrapped = {
        "<answer> 5 </answer>": "5",
        "<think>a</think> <answer>B</answer>\n": "B",
        "<ANSWER>x\ny</ANSWER>": "x\ny",
        "a <answer> tag": "a <answer> tag",
        " 7": " 7",
    }
    rows = [{"problem": f"q{i}", "answer": a} for i, a in enumerate(wrapped)]
    loaded = load(forms.write_jsonl(tmp_path / "a.jsonl", rows), encoder, tmp_path)
    expected = list(wrapped.values())
    assert loaded.dataset.answers(loaded.dataset.ids) == expected
    assert [loaded.dataset.row(i).answer for i in loaded.dataset.ids] == expected
