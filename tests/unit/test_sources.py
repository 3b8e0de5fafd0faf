"""Every form of data gives the rows that are in it, through one code path."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mssr.config.data import DataConfig
from mssr.data import tables
from mssr.data.cache import DataCache
from mssr.data.dataset import PromptDataset
from mssr.data.index import SourceRows
from mssr.data.sources import Source, open_table, parse_sources
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


def test_forms_of_json(rows, tmp_path: Path) -> None:
    """One object may be a table, and a file's ending says little; what has no plain meaning is refused."""
    data = [{"problem": f"p{i}", "answer": f"ä{i}", "images": []} for i in range(3)]
    columns = {name: [row[name] for row in data] for name in data[0]}
    text = json.dumps(data, ensure_ascii=False)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
    pretty = "\n".join(json.dumps(row, indent=1) for row in data)
    forms_of = {
        "array.jsonl": text.encode(),
        "array_lines.jsonl": json.dumps(data, indent=2).encode(),
        "pretty.jsonl": pretty.encode(),
        "pretty.json": b"\xef\xbb\xbf" + pretty.encode(),
        "wrapped.json": json.dumps({"version": "1.0", "data": data}).encode(),
        "only_key.json": json.dumps({"geometry": data}, indent=1).encode(),
        "columns.json": json.dumps(columns).encode(),
        "numbered.json": json.dumps(
            {k: {str(i): v for i, v in enumerate(c)} for k, c in columns.items()}
        ).encode(),
        "index.json": json.dumps({str(i): row for i, row in enumerate(data)}).encode(),
        "split.json": json.dumps({"columns": list(data[0]), "data": [[*r.values()] for r in data]}).encode(),
        **{f"{name}.jsonl": lines.encode(name) for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")},
        "utf16.csv": ("problem,answer\n" + "".join(f"{r['problem']},{r['answer']}\n" for r in data)).encode(
            "utf-16"
        ),
    }
    for name, content in forms_of.items():
        (tmp_path / name).write_bytes(content)
        found = [(r.problem, r.answer) for r in rows(str(tmp_path / name))]
        assert found == [(r["problem"], r["answer"]) for r in data], name
    one = json.dumps({"messages": [{"role": "user", "content": "q"}], "answer": "1"})
    (tmp_path / "one.json").write_text(one)  # a row, not a table of messages
    assert [r.problem for r in rows(str(tmp_path / "one.json"))] == ["q"]
    for name, content, words in (
        ("two.json", {"train": data, "data": data}, r"several tables \(train, data\)"),
        ("uneven.json", columns | {"answer": ["1"]}, "3 problem, 1 answer, 3 images"),
        ("numbers.json", [1, 2], r"row 0: JSON int, not an object\); read are an object a line"),
        ("text.json", "a", "no row that is a JSON object"),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=words) as error:
            open_table(str(tmp_path / name))
        assert name in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "more.json").write_text(text + " 3")
    with pytest.raises(UserError, match="text behind the JSON array"):
        open_table(str(tmp_path / "more.json"))


@pytest.mark.parametrize("form", ["[%s]", '{"data": [%s]}'])
def test_a_damaged_row_within_one_value(tmp_path: Path, form: str) -> None:
    """It costs no other row."""
    good, twice = '{"problem": "q", "answer": "1"}', '{"problem": "p", "answer": "1", "answer": "2"}'
    (tmp_path / "a.json").write_text(form % f"{good}, {twice}")
    dataset = PromptDataset(str(tmp_path / "a.json"), DataConfig(cache_dir=str(tmp_path / "cache")))
    dataset.check()
    assert [dataset.row(i).problem for i in dataset.ids] == ["q"]
    assert [row.reason for row in dataset.bad_rows] == ["the key 'answer' twice in a JSON object"]


def test_headers_of_csv(rows, tmp_path: Path) -> None:
    (tmp_path / "spaces.csv").write_text('problem, answer , "images"\n"a, b", "c, d",\n  e,f, \n')
    assert [(r.problem, r.answer) for r in rows(str(tmp_path / "spaces.csv"))] == [
        ("a, b", "c, d"),
        ("e", "f"),
    ]
    (tmp_path / "exact.csv").write_text("problem,answer\n a, b\n")
    assert [(r.problem, r.answer) for r in rows(str(tmp_path / "exact.csv"))] == [(" a", " b")]
    (tmp_path / "broken.csv").write_bytes(b"problem,\xffanswer\n1,2\n")
    with pytest.raises(UserError, match=r"broken\.csv cannot be opened: no UTF-8 text"):
        open_table(str(tmp_path / "broken.csv"))
    (tmp_path / "twice.tsv").write_text("problem\tanswer\tanswer\t\t\n1\t2\t3\t\t\n")
    with pytest.raises(UserError, match=r"twice\.tsv has 2 columns 'answer'"):
        open_table(str(tmp_path / "twice.tsv"))


@pytest.mark.parametrize("name", ["https://x.org/a.json", "s3://b/a.parquet", "hf://datasets/a/b@train"])
def test_addresses(name: str) -> None:
    with pytest.raises(UserError, match=r"is an address; download it") as error:
        open_table(name)
    assert name in str(error.value)


def test_a_file_address(rows, tmp_path: Path) -> None:
    path = forms.write_jsonl(tmp_path / "a b.jsonl", [{"problem": "q", "answer": "1"}])
    assert len(rows(f"file://{str(path).replace(' ', '%20')}")) == 1


def unread(images: Any) -> list[dict[str, Any]]:
    return [{"problem": f"q{i}", "answer": "1", "picture": images} for i in range(3)]


JPEG = forms.encoded()
IMAGE_LIKE = [
    {"bytes": JPEG, "path": None},
    [{"bytes": JPEG, "path": None}],
    JPEG,
    base64.b64encode(JPEG).decode(),
    "data:image/png;base64," + base64.b64encode(JPEG).decode(),
    "figures/a.PNG",
    ["a.webp"],
    [{"image": "a.jpeg", "label": 1}],
    b"\0\0\0\x18ftypheic" + bytes(40),
]


@pytest.mark.parametrize("images", IMAGE_LIKE, ids=range(len(IMAGE_LIKE)))
def test_images_that_nobody_reads(rows, tmp_path: Path, images: Any) -> None:
    """Training without them, silently, would be the worst. An empty column of images does not excuse it."""
    path = str(tmp_path / "saved")
    datasets.Dataset.from_list(unread(images)).save_to_disk(path)
    with pytest.raises(UserError, match=r"no column 'images' .*a column 'picture' with images; set data"):
        rows(path)
    assert len(rows(path, images_column=None)) == 3
    datasets.Dataset.from_list([r | {"images": []} for r in unread(images)]).save_to_disk(path + "2")
    with pytest.raises(
        UserError, match=r"no usable image in column 'images' .*a column 'picture' with images"
    ):
        rows(path + "2")


@pytest.mark.parametrize(
    "other", ["text.", b"RIFF$\0\0\0WAVEfmt ", {"bytes": b"x", "path": "a.wav"}, 3, ["a"], None]
)
def test_other_columns_are_no_images(rows, tmp_path: Path, other: Any) -> None:
    datasets.Dataset.from_list(unread(other)).save_to_disk(str(tmp_path / "saved"))
    assert len(rows(str(tmp_path / "saved"))) == 3


def test_truths_as_text_and_as_they_are(tmp_path: Path) -> None:
    data = {
        "box": [1, 2.5],
        "one": ["x"],
        "gap": 3.0,
        "part": 0.5,
        "large": 1e300,
        "map": {"a": 1},
        "text": "t",
    }
    path = forms.write_jsonl(tmp_path / "a.jsonl", [{"problem": k, "answer": v} for k, v in data.items()])
    dataset = PromptDataset(str(path), DataConfig(cache_dir=str(tmp_path / "cache")))
    (index_of,) = dataset.check()
    assert dataset.answers(dataset.ids) == ["[1, 2.5]", "x", "3", "0.5", "1e+300", '{"a": 1}', "t"]
    assert dataset.answers(dataset.ids, as_cells=True) == list(data.values())
    assert index_of.structured.tolist() == [True, False, False, False, False, True, False]


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
        [["one.jpg"]],
        {"image": "one.jpg"},
        [{"image": {"bytes": None, "path": "one.jpg"}, "label": 1}],
        [{"type": "image", "image": f"file://{tmp_path}/pictures/one.jpg"}],
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + text}},
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
    columns = pa.table([["q"], ["1"], ["2"]], names=["problem", "answer", "answer"])
    pq.write_table(columns, tmp_path / "twice.parquet")
    forms.text_only(tmp_path)
    for name, words in {
        "cut.json": "cut.json cannot be opened",
        "empty.jsonl": "is empty",
        "header.csv": "has no rows",
        "notes.txt": "expected one of .parquet",
        "twice.parquet": "cannot be opened: .*answer",
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
        for number in reversed(range(40)):
            rows.row(number, str(number))
        return len(released)

    assert read() == 0 < rows.table.mapped_bytes < tables.RELEASE_BYTES
    monkeypatch.setattr(tables, "RELEASE_BYTES", rows.table.mapped_bytes - 1)
    assert read() > 0
