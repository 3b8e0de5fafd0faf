"""`mssr data`: the page shows what a training would see."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from mssr.data.prompt_source import PromptSource
from mssr.runs.config import load_config
from mssr.tools.cli import main
from mssr.tools.data_report import answer_kind
from tests.conftest import Workspace, make_rows, write_rows

pytestmark = pytest.mark.unit


def test_the_page_shows_counts_reasons_and_prompts(
    workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(8, "t", seed=1)
    rows[1]["problem"] = ""
    rows[2]["problem"] = "long " * 300
    rows[3]["answer"] = "<answer>x</answer> <b>"
    write_rows(tmp_path / "train.parquet", rows)
    out = tmp_path / "page.html"
    arguments = [f"data.train={tmp_path / 'train.parquet'}", f"trainer.run_dir={tmp_path / 'run'}"]
    options = ["--out", str(out), "data.max_bad_fraction=0.5", f"data.cache_dir={tmp_path / 'cache'}"]
    assert main(["data", str(workspace.config), *arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert "train: 6 prompts (1 bad, 1 overlong dropped)" in printed
    assert "column problem is empty" in printed and "tokens, longer than data.max_prompt_length" in printed
    page = out.read_text()
    assert "6 prompts (1 bad, 1 overlong dropped)" in page and "validation: 4 prompts" in page
    assert "column problem is empty" in page and "&lt;answer&gt;x&lt;/answer&gt; &lt;b&gt;" in page
    assert "<b>t1</b>" not in page and "<b>t7</b>" in page
    # The images are those that the engine gets, in their final size.
    source = PromptSource(load_config(workspace.config, arguments))
    row, encoder = source.row("t5"), source.encoder
    text, images = encoder.chat_text(row), encoder.images(row)
    shown = re.search(r"<b>t5</b>.*?</article>", page, re.DOTALL)
    assert shown is not None
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", shown[0])
    sizes = [Image.open(io.BytesIO(base64.b64decode(p))).size for p in pictures]
    assert sizes == [image.size for image in images] and len(sizes) == 2
    assert text.count("<|image_pad|>") == 2 == shown[0].count("&lt;|image_pad|&gt;")


def test_wrong_data_is_one_line(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(workspace.config), "data.train=nowhere.parquet"]) == 2
    error = capsys.readouterr().err
    assert "nowhere.parquet" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("B", "choice letter"),
        ("(c)", "choice letter"),
        ("-12", "whole number"),
        ("1,200", "whole number"),
        ("$3.5$", "decimal number"),
        ("50%", "percent"),
        (r"\frac{1}{2}", "fraction"),
        ("3/4", "fraction"),
        ("Yes", "yes or no"),
        ("12 cm", "number with unit"),
        ("x^2", "LaTeX"),
        ("triangle", "one word"),
        ("two words", "text"),
        ("<answer>7</answer>", "whole number"),
    ],
)
def test_kinds_of_answers(answer: str, kind: str) -> None:
    assert answer_kind(answer) == kind
