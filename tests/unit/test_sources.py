"""Every form of data gives the rows that are in it, through one code path."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from mssr.data import index
from mssr.data.cache import DataCache
from mssr.data.dataset import PromptDataset
from mssr.data.index import SourceRows
from mssr.data.sources import Source, open_table, parse_sources
from mssr.data_config import DataConfig
from mssr.errors import UserError
from tests.unit import data_forms as forms

pytestmark = pytest.mark.unit


@pytest.fixture
def rows(tmp_path: Path):
    """Open sources and return their rows, checked."""

    def read(source: Any, **changes: Any) -> list[Any]:
        dataset = PromptDataset(source, DataConfig(cache_dir=str(tmp_path / "cache"), **changes))
        dataset.check()
        assert dataset.bad_rows == []
        return [dataset.row(i) for i in dataset.ids]

    return read


def test_vision_r1_rl(rows, tmp_path: Path) -> None:
    found = rows(str(forms.vision_r1_rl(tmp_path)))
    assert [r.answer for r in found] == ["0", "10", "20", "30"]
    assert [r.images[0].decode().size for r in found] == [(56, 56), (84, 56), (112, 56), (140, 56)]


def test_geometry3k(rows, tmp_path: Path) -> None:
    root = forms.geometry3k(tmp_path)
    assert [r.problem for r in rows(f"{root}@test")] == [f"<image>Find x in test {i}." for i in range(3)]
    assert len(rows(str(root))) == len(rows(f"{root}@train")) == 4
    assert [r.answer for r in rows(f"{root}@train[1:3]")] == [r"\sqrt{1}", r"\sqrt{2}"]
    assert len(rows(f"{root}@train+test")) == 7
    with pytest.raises(UserError, match=r"no split 'dev', it has .*validation"):
        open_table(f"{root}@dev")


def test_mmrl30k(rows, tmp_path: Path) -> None:
    assert [len(r.images) for r in rows(str(forms.mmrl30k(tmp_path)))] == [2, 2, 1, 0]


def test_mathvista(rows, tmp_path: Path) -> None:
    columns = {"id_column": "pid", "problem_column": "query", "images_column": "decoded_image"}
    found = rows(f"{forms.mathvista(tmp_path)}@testmini", **columns)
    assert [r.id for r in found] == ["0", "1", "2"] and all(len(r.images) == 1 for r in found)


def test_text_only(rows, tmp_path: Path) -> None:
    assert [(r.answer, r.images) for r in rows(str(forms.text_only(tmp_path)))][:2] == [("0", ()), ("2", ())]


def test_tsv_keeps_the_text_of_its_cells(rows, tmp_path: Path) -> None:
    columns = {"id_column": "index", "problem_column": "question", "images_column": "image"}
    found = rows(str(forms.onevision_tsv(tmp_path)), **columns)
    assert [r.answer for r in found] == ["007", "NA", "1.50", "true"]
    assert found[1].problem == 'Line one\nline "two"\tof 1'
    assert all(r.images[0].decode().size == (60, 60) for r in found)


def test_the_same_rows_in_every_container(rows, tmp_path: Path) -> None:
    """Parquet, JSON, JSONL, CSV, saved data sets and folders give the same prompts."""
    data = [{"problem": f"Wie groß ist {i}?", "answer": f"ä{i}"} for i in range(6)]
    saved = datasets.Dataset.from_list(data)
    saved.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.json").write_text(json.dumps(data, indent=1, ensure_ascii=False))
    (tmp_path / "ascii.json").write_text(" " + json.dumps(data))
    forms.write_jsonl(tmp_path / "lines.json", data)
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(x, ensure_ascii=False) for x in data))
    (tmp_path / "a.csv").write_bytes(
        b"problem,answer\r\n" + "".join(f"{x['problem']},{x['answer']}\r\n" for x in data).encode()
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=saved, test=saved.select([0])).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "folder").mkdir()
    forms.write_jsonl(tmp_path / "folder" / "train_1.jsonl", data[:4])
    forms.write_jsonl(tmp_path / "folder" / "train_2.jsonl", data[4:])
    expected = [(x["problem"], x["answer"]) for x in data]
    names = (
        "a.parquet a.parquet@train a.json ascii.json lines.json a.jsonl a.csv saved dict dict@train folder"
    )
    ids = []
    for name in names.split():
        found = rows(str(tmp_path / name))
        assert [(r.problem, r.answer) for r in found] == expected, name
        ids.append([r.id for r in found])
    assert all(i == ids[0] for i in ids)  # the id is of the content, wherever it is from
    for name in ("a.parquet@train[2:4]", "a.jsonl@train[2:4]", "saved@train[2:4]", "dict@train[2:4]"):
        assert [r.answer for r in rows(str(tmp_path / name))] == ["ä2", "ä3"], name
    assert rows(str(tmp_path / "folder"))[5].where.endswith("train_2.jsonl row 1")


def test_image_cells_of_every_form(rows, tmp_path: Path) -> None:
    data = forms.encoded(image=forms.picture(30, 20))
    text = base64.b64encode(data).decode()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.jpg").write_bytes(data)
    cells = [
        [text],
        text,
        "data:image/jpeg;base64," + text,
        {"bytes": text, "path": None},
        "one.jpg",
        ["one.jpg"],
        {"path": "one.jpg"},
        {"bytes": None, "path": str(tmp_path / "pictures" / "one.jpg")},
        '["one.jpg"]',
        "['one.jpg']",
    ]
    source = [{"problem": f"p{i}", "answer": "1", "images": cell} for i, cell in enumerate(cells)]
    path = forms.write_jsonl(tmp_path / "cells.jsonl", source)
    found = rows(str(path), image_dir=str(tmp_path / "pictures"))
    assert [[i.read() for i in r.images] for r in found] == [[data]] * len(cells)
    none = [{"problem": f"p{i}", "answer": "1", "images": c} for i, c in enumerate([None, [], "", "[]"])]
    assert all(r.images == () for r in rows(str(forms.write_jsonl(tmp_path / "none.jsonl", none))))


def test_mixed_sources_have_ids_of_their_own(rows, tmp_path: Path) -> None:
    a = forms.write_jsonl(
        tmp_path / "a.jsonl", [{"id": i, "problem": f"a{i}", "answer": "1"} for i in range(3)]
    )
    b = forms.write_jsonl(
        tmp_path / "b.jsonl", [{"id": i, "problem": f"b{i}", "answer": "2"} for i in range(2)]
    )
    config = DataConfig(id_column="id", cache_dir=str(tmp_path / "cache"))
    both = PromptDataset([str(a), {"path": str(b), "weight": 3}], config)
    turned = PromptDataset([{"path": str(b), "weight": 3}, str(a)], config)
    assert len(both) == 5 and set(both.ids) == set(turned.ids)
    assert PromptDataset(str(a), config).ids == ["0", "1", "2"]
    (label_a, ids_a), (label_b, ids_b) = both.ids_by_source().items()
    assert both.weights == {label_a: 1.0, label_b: 3.0} and label_a.startswith("a-")
    assert both.source_of(ids_b[0]) == label_b and both.row(ids_b[1]).problem == "b1"
    assert both.answers([ids_b[0], ids_a[2], ids_b[0]]) == ["2", "1", "2"]
    assert PromptDataset([str(a), str(b)], config).weights is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "''"),
        ([], "expected a source"),
        ([3], "3 is not the name"),
        ([{"path": "a", "wieght": 1}], "wieght"),
        ([{"weight": 1}], "no path"),
        ([{"path": "a", "weight": 0}], "above 0"),
        ([{"path": "a", "weight": "2"}], "not a number"),
        (["a", "a"], "listed twice"),
    ],
)
def test_wrong_lists_of_sources(value: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        parse_sources(value, "data.train")
    assert "data.train" in str(error.value)


def test_weights_are_for_training() -> None:
    with pytest.raises(UserError, match=r"data\.val.*only data\.train"):
        parse_sources([{"path": "a", "weight": 2}], "data.val")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_text('[{"problem": "a", "answer": "b"}, {"pro')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "header.csv").write_text("problem,answer\n")
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "nothing").mkdir()
    forms.text_only(tmp_path)
    for name, words in {
        "cut.json": "cut.json cannot be opened",
        "empty.jsonl": "is empty",
        "header.csv": "has no rows",
        "notes.txt": "expected one of .parquet",
        "nothing": "cannot be opened",
        "text.jsonl@test": "leave @test out",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            open_table(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_a_name_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub names go through the library's own loading; what it says becomes one line."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nand many more lines")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(UserError, match=r"data org/name@train cannot be opened: Couldn't reach the Hub$"):
        open_table("org/name@train")


def test_reading_leaves_no_memory_behind(tmp_path: Path) -> None:
    """Rows that were read do not stay in the memory of the process, and read the same again."""
    import psutil

    data = [{"problem": f"p{i}", "answer": str(i), "images": bytes([i]) * 2**20} for i in range(48)]
    datasets.Dataset.from_list(data).save_to_disk(str(tmp_path / "saved"))
    table = open_table(str(tmp_path / "saved"))

    def read() -> int:
        assert all(table.cells(n) == row for n, row in enumerate(data))
        return psutil.Process().memory_info().rss

    after_reading = read()
    table.release()
    assert after_reading - psutil.Process().memory_info().rss > 30 * 2**20
    assert read() > 0


def test_pages_are_given_back_where_the_file_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a small one never: it costs more than the rows."""
    data = [{"problem": f"p{i}", "answer": str(i), "images": []} for i in range(40)]
    datasets.Dataset.from_list(data).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    rows = SourceRows(Source(str(tmp_path / "saved")), config, DataCache(config.cache_dir))
    released: list[int] = []
    monkeypatch.setattr(rows.table, "release", lambda: released.append(1))

    def read() -> int:
        released.clear()
        for number in range(40):
            rows.row(number, str(number))
        return len(released)

    assert read() == 0 < rows.table.mapped_bytes < index.RELEASE_BYTES
    monkeypatch.setattr(index, "RELEASE_BYTES", rows.table.mapped_bytes - 1)
    assert read() > 0
