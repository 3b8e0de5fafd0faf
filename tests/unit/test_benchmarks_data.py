"""Where a benchmark's data are found, and that every form of them gives the same items and prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mssr.data.rows import IMAGE_MARK
from mssr.errors import UserError
from mssr.evaluation import registry
from mssr.evaluation.items import Item
from mssr.evaluation.local_data import Location, find
from tests.conftest import Workspace
from tests.unit.benchmark_data import CASES, dataset, rows, write_parquet, write_text
from tests.unit.data_forms import encoded, picture, write_jsonl

pytestmark = pytest.mark.unit

FOLDERS = {
    "mathverse": ("AI4Math", "MathVerse", "testmini"),
    "mathvista": ("AI4Math", "MathVista", "testmini"),
    "mmk12": ("FanqingM", "MMK12", "test"),
    "r1_onevision": ("Fancy-MLLM", "R1-Onevision-Bench", "train"),
    "hallusionbench": ("lmms-lab", "HallusionBench", "image"),
    "geometry3k": ("hiyouga", "geometry3k", "test"),
}


def seen(items: list[Item]) -> list[Any]:
    """What must not depend on the form of the data; pictures by their pixels."""
    return [
        (
            item.id,
            item.question,
            item.answer,
            item.choices,
            item.kind,
            dict(item.tags),
            dict(item.metadata),
            [image.decode().tobytes() for image in item.images],
        )
        for item in items
    ]


def parquet(name: str, root: Path) -> None:
    write_parquet(name, root / f"{name}.parquet")


def json_array(name: str, root: Path) -> None:
    write_text(name, root / FOLDERS[name][1] / f"{FOLDERS[name][2]}.json")


def json_lines(name: str, root: Path) -> None:
    write_text(name, root / f"{FOLDERS[name][1].lower()}.jsonl")


def tsv(name: str, root: Path) -> None:
    write_text(name, root / FOLDERS[name][1] / f"{FOLDERS[name][1]}.tsv")


def saved(name: str, root: Path) -> None:
    dataset(name).save_to_disk(str(root / FOLDERS[name][1]))


def saved_splits(name: str, root: Path) -> None:
    import datasets

    whole = dataset(name)
    splits = {"other": whole.select([0]), FOLDERS[name][2]: whole}
    datasets.DatasetDict(splits).save_to_disk(str(root / FOLDERS[name][0] / FOLDERS[name][1]))


def hub_folder(name: str, root: Path) -> None:
    """As `hf download` leaves it, in two shards."""
    owner, base, split = FOLDERS[name]
    folder = root / owner / base / "data"
    folder.mkdir(parents=True)
    whole = dataset(name)
    whole.select(range(5)).to_parquet(str(folder / f"{split}-00000-of-00002.parquet"))
    whole.select(range(5, len(whole))).to_parquet(str(folder / f"{split}-00001-of-00002.parquet"))


FORMS = [json_array, json_lines, tsv, saved, saved_splits, hub_folder]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    root = tmp_path_factory.mktemp("reference")
    result = {}
    for name in CASES:
        parquet(name, root)
        result[name] = seen(registry.get(name).load(root))
    return result


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", CASES)
def test_every_form_gives_the_same_items(
    name: str, form: Callable[[str, Path], None], tmp_path: Path, reference: dict[str, list[Any]]
) -> None:
    form(name, tmp_path)
    items = seen(registry.get(name).load(tmp_path))
    if name == "geometry3k":  # its ids are hashes of the content as the data have it
        assert [item[1:] for item in items] == [item[1:] for item in reference[name]]
    else:
        assert items == reference[name]


@pytest.mark.parametrize("name", CASES)
def test_items_without_a_picture_are_kept_and_others_have_theirs(
    name: str, reference: dict[str, list[Any]]
) -> None:
    counts = [len(item[-1]) for item in reference[name]]
    expected = []
    for row in rows(name):
        if name == "geometry3k":
            expected.append(len(row["images"]))
        elif name == "mathvista":
            expected.append(int(row["decoded_image"]["bytes"] is not None))
        else:
            cell = row["image"]
            expected.append(int(bool(cell["bytes"] if isinstance(cell, dict) else cell)))
    assert counts == expected
    assert 0 in counts


def test_pixels_are_those_of_the_row(reference: dict[str, list[Any]]) -> None:
    """Whatever the order of reading; PNG keeps them exactly."""
    for k, item in enumerate(reference["mathverse"][:5], 1):
        assert item[-1] == [picture(40 + k, 30, k).tobytes()]


# Prompts --------------------------------------------------------------------------------------------


def item_of(name: str, position: int, root: Path) -> Item:
    write_parquet(name, root / f"{name}.parquet")
    return registry.get(name).load(root)[position]


PROMPTS = [
    (
        "mathverse",
        4,
        "According to the question shown in the image, please first conduct reasoning, and then answer the "
        "question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    ),
    (
        "mathverse",
        5,
        "Please first conduct reasoning, and then answer the question and provide the final value, e.g., 1, "
        "2.5, 300, at the end.\nQuestion: As shown, the angle 6 is unknown, find it.",
    ),
    (
        "mathvista",
        0,
        "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the "
        "end.\nQuestion: What does the chart 1 show?\nChoices:\n(A) Yes\n(B) No",
    ),
    ("mmk12", 0, "<image>\nWhich speed is right in case 1?\nA. 1 m/s\nB. 2 m/s\nC. 3 m/s\nD. 4 m/s"),
    # No picture, so no mark.
    ("mmk12", 5, "Which speed is right in case 6?\nA. 1 m/s\nB. 2 m/s\nC. 3 m/s\nD. 4 m/s"),
    ("r1_onevision", 5, "Question: Find x."),
    ("r1_onevision", 12, "Question: Next?\nChoices:\n(A) 3\n(B) 4"),
    ("r1_onevision", 7, 'Say "why"\tand how:\nfind v.'),
    ("hallusionbench", 0, "Is line 0 longer than the other one?\nPlease answer yes or no."),
    ("geometry3k", 10, "<image><image>Find $x$ in problem 11."),
    ("geometry3k", 9, "Find $x$ in problem 10."),
]


@pytest.mark.parametrize(("name", "position", "question"), PROMPTS)
def test_the_prompt_is_the_official_one(name: str, position: int, question: str, tmp_path: Path) -> None:
    item = item_of(name, position, tmp_path)
    row = registry.get(name).prompt_row(item)
    assert row.problem == item.question == question
    assert (row.id, row.images, row.where) == (item.id, item.images, item.where)


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_encoded_as_in_training(name: str, workspace: Workspace, tmp_path: Path) -> None:
    """The picture before the question (or at its mark), the instruction behind it; nothing is refused."""
    from mssr.data.encoder import PromptEncoder
    from mssr.models.loading import load_processor
    from mssr.runs.config import load_config

    config = load_config(workspace.config, ["data.instruction=Think first."])
    encoder = PromptEncoder(load_processor(config.model), config.data)
    benchmark = registry.get(name)
    for item in benchmark.load(write_parquet(name, tmp_path / f"{name}.parquet").parent):
        row = benchmark.prompt_row(item)
        text = encoder.chat_text(row)
        vision = "<|vision_start|><|image_pad|><|vision_end|>"
        body = text.partition("user\n")[2]
        expected = (
            item.question if IMAGE_MARK in item.question else IMAGE_MARK * len(item.images) + item.question
        )
        assert body.startswith(expected.replace(IMAGE_MARK, vision) + "\nThink first.")
        assert [image.mode for image in encoder.images(row)] == ["RGB"] * len(item.images)


# Where data are found -------------------------------------------------------------------------------


def test_the_order_of_the_search(tmp_path: Path) -> None:
    location = Location("AI4Math/MathVerse", "testmini", "testmini")
    places = [
        tmp_path / "MATH-VERSE.parquet",
        tmp_path / "mathverse.jsonl",
        tmp_path / "mathverse.tsv",
        tmp_path / "MathVerse/testmini.parquet",
        tmp_path / "MathVerse/data/testmini.json",
        tmp_path / "AI4Math/mathverse.parquet",
        tmp_path / "AI4Math/MathVerse/testmini.parquet",
        tmp_path / "AI4Math/MathVerse/MathVerse.tsv",
    ]
    others = [tmp_path / "MathVerse/testmini_text_only.parquet", tmp_path / "mathverse2.parquet"]
    for path in (*places, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for path in places:
        assert find("mathverse", location, tmp_path) == str(path)
        path.unlink()
        if path.parent == tmp_path / "MathVerse/data":
            others[0].unlink()
            path.parent.rmdir()
            path.parent.parent.rmdir()
    # An empty directory is left to `datasets`, whose error says what it misses.
    assert find("mathverse", location, tmp_path) == f"{tmp_path}/AI4Math/MathVerse@testmini"


def test_an_error_lists_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        registry.get("mathverse").load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path), "mathverse{.parquet", "MathVerse/", "AI4Math/", "from the hub"):
        assert part in message
    with pytest.raises(UserError, match=r"--data-dir .* is no directory"):
        registry.get("mathverse").load(tmp_path / "nothing")
    (tmp_path / "MathVerse").mkdir()
    with pytest.raises(UserError, match=r"^mathverse: data .*MathVerse@testmini cannot be opened"):
        registry.get("mathverse").load(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_without_a_directory_the_hub_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mssr.evaluation import local_data

    asked = []

    def refuse(source: str) -> Any:
        asked.append(source)
        raise UserError(f"data {source} cannot be opened: offline")

    monkeypatch.setattr(local_data, "open_table", refuse)
    with pytest.raises(UserError, match=f"^{name}: .* offline .*--data-dir"):
        registry.get(name).load()
    owner, base, split = FOLDERS[name]
    config = ":testmini" if name == "mathverse" else ""
    assert asked == [f"{owner}/{base}{config}@{split}"]


def test_the_limit_takes_the_first_items(tmp_path: Path) -> None:
    write_parquet("mmk12", tmp_path / "mmk12.parquet")
    benchmark = registry.get("mmk12")
    whole = [item.id for item in benchmark.load(tmp_path)]
    assert [item.id for item in benchmark.load(tmp_path, limit=3)] == whole[:3]
    assert [item.id for item in benchmark.load(tmp_path, limit=99)] == whole


def test_the_authors_json_of_hallusionbench_is_read(tmp_path: Path) -> None:
    """No column of images: file names, of which the questions without a figure have none."""
    data = rows("hallusionbench")
    folder = tmp_path / "HallusionBench"
    for row in data:
        picture_bytes = row.pop("image")["bytes"]
        if row["filename"]:
            path = folder / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture_bytes)
    (folder / "HallusionBench.json").write_text(json.dumps(data))
    items = registry.get("hallusionbench").load(tmp_path)
    assert len(items) == 13
    assert [len(item.images) for item in items] == [int(row["filename"] is not None) for row in data]
    assert items[2].images[0].decode().size == (41, 30)


def test_relative_paths_of_pictures_start_at_the_data(tmp_path: Path) -> None:
    data = rows("mathvista")[:2]
    for row in data:
        del row["decoded_image"]
    write_jsonl(tmp_path / "mathvista.jsonl", data)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.jpg").write_bytes(encoded("JPEG", picture(33, 30, 0)))
    with pytest.raises(UserError, match=r"^mathvista: .*mathvista.jsonl row 1: file .*images/2.jpg does not"):
        registry.get("mathvista").load(tmp_path)
    (tmp_path / "images/2.jpg").write_bytes(encoded("JPEG", picture(44, 30, 0)))
    items = registry.get("mathvista").load(tmp_path)
    assert [item.images[0].size() for item in items] == [(33, 30), (44, 30)]


def test_every_spelling_of_no_picture_is_one(tmp_path: Path) -> None:
    nothings = [None, "", [], {"bytes": None, "path": None}, [{"bytes": None, "path": None}]]
    data = [
        {"id": k, "question": "<image>q A. 1 B. 2", "answer": "A", "image": nothing}
        for k, nothing in enumerate(nothings)
    ]
    write_jsonl(tmp_path / "mmk12.jsonl", data)
    items = registry.get("mmk12").load(tmp_path)
    assert [(item.images, item.question) for item in items] == [((), "q A. 1 B. 2")] * len(nothings)


def test_items_hold_no_bytes(tmp_path: Path) -> None:
    item = item_of("mmk12", 0, tmp_path)
    assert item.images[0].data is None and item.images[0].path is None
    assert item.images[0].read().startswith(b"\x89PNG")


# Rows that are none ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mathverse", {"answer": ""}, "column answer is empty"),
        ("mathverse", {"query_cot": None}, "column query_cot is empty"),
        ("mathvista", {"answer_type": "word"}, "answer_type 'word' is none of integer, float, list, text"),
        ("mathvista", {"answer": "Maybe"}, "the answer 'Maybe' is none of the choices"),
        ("mathvista", {"metadata": "geometry"}, "'geometry' is no mapping"),
        ("mmk12", {"question": ["a"]}, "column question is list, not text"),
        ("r1_onevision", {"index": None}, "column index is empty"),
        ("hallusionbench", {"gt_answer": "2"}, "gt_answer '2' is neither 0 nor 1"),
        ("geometry3k", {"answer": " "}, "column answer is empty"),
    ],
)
def test_a_bad_row_is_named_in_one_line(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_text(name, tmp_path / f"{name}.jsonl")
    data = [json.loads(line) for line in path.read_text().splitlines()]
    data[0].update(changes)
    write_jsonl(path, data)
    with pytest.raises(UserError) as caught:
        registry.get(name).load(tmp_path)
    assert str(caught.value).endswith(f"{path} row 0: {message}")


def test_rows_of_the_same_id_are_items_of_their_own(tmp_path: Path) -> None:
    data = [{"id": k, "question": f"q{k}", "answer": "A"} for k in (1, 1, 2, 1)]
    write_jsonl(tmp_path / "mmk12.jsonl", data)
    items = registry.get("mmk12").load(tmp_path)
    assert [item.id for item in items] == ["1", "1-2", "2", "1-3"]


def test_a_missing_column_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "mmk12.jsonl", [{"id": 1, "question": "q"}])
    with pytest.raises(UserError, match=r"mmk12.jsonl row 0: no column answer$"):
        registry.get("mmk12").load(tmp_path)
