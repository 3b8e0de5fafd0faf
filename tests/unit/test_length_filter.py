"""Lengths come from headers, once; the cache is used, refreshed and never trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mssr.config.data import DataConfig
from mssr.data import index, lengths
from mssr.data.cache import DataCache
from mssr.data.dataset import PromptDataset
from mssr.data.encoder import PromptEncoder
from mssr.data.images import ImageSource
from mssr.data.loading import LoadedPrompts, load_prompts
from mssr.errors import UserError
from tests.conftest import Workspace
from tests.unit import data_forms as forms

pytestmark = pytest.mark.unit

PIXELS = {"min_pixels": 3136, "max_pixels": 50176}


@pytest.fixture(scope="module")
def processor(workspace: Workspace) -> Any:
    from mssr.models.loading import load_processor
    from mssr.runs.config import load_config

    return load_processor(load_config(workspace.config).model)


@pytest.fixture
def load(processor: Any, tmp_path: Path):
    def run(source: Any, **changes: Any) -> LoadedPrompts:
        settings = {"cache_dir": str(tmp_path / "cache")} | PIXELS
        config = DataConfig(**(settings | changes))
        return load_prompts(source, config, PromptEncoder(processor, config), tmp_path / "bad_rows.jsonl")

    return run


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many rows were read and how many lengths computed."""
    counts = {"rows": 0, "lengths": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return call

    monkeypatch.setattr(index, "read_row", counted("rows", index.read_row))
    monkeypatch.setattr(PromptEncoder, "length", counted("lengths", PromptEncoder.length))
    return counts


def settle(*paths: Path) -> None:
    """Make files look old enough for their hash to be kept."""
    for path in paths:
        os.utime(path, (1e9, 1e9))


def taken(work: dict[str, int]) -> tuple[int, int]:
    result = (work["rows"], work["lengths"])
    work.update(rows=0, lengths=0)
    return result


def test_lengths_are_those_of_the_encoder(load, processor: Any, tmp_path: Path) -> None:
    """Several images, one and none; turned by EXIF; too small and too large."""
    exif = forms.Image.Exif()
    exif[0x0112] = 6
    images = [
        forms.encoded(image=forms.picture(400, 100), exif=exif),
        forms.encoded("PNG", forms.picture(20, 30)),
        forms.encoded(image=forms.picture(700, 300)),
    ]
    rows = [{"images": [{"bytes": i, "path": None}], "problem": "size?", "answer": "1"} for i in images]
    sources = [
        str(forms.mmrl30k(tmp_path)),
        str(forms.text_only(tmp_path)),
        str(forms.write_parquet(tmp_path / "sizes.parquet", rows)),
    ]
    loaded = load(sources)
    encoder = PromptEncoder(processor, loaded.dataset.config)
    dataset = loaded.dataset
    assert len(loaded.lengths) == len(dataset) == 12
    for prompt_id, length in zip(dataset.ids, loaded.lengths, strict=True):
        assert len(encoder.encode(dataset.row(prompt_id)).token_ids) == length, dataset.where(prompt_id)


def test_nothing_is_decoded(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_: ImageSource) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageSource, "decode", decode)
    assert len(load(str(forms.mmrl30k(tmp_path))).dataset) == 4


def test_the_second_run_reads_no_row(load, work: dict[str, int], tmp_path: Path) -> None:
    path = forms.mmrl30k(tmp_path)
    settle(path)
    first = load(str(path))
    assert taken(work) == (4, 4)
    second = load(str(path))
    assert taken(work) == (0, 0)
    assert second.dataset.ids == first.dataset.ids and list(second.lengths) == list(first.lengths)
    # A limit is applied to what is known; another name of the same bytes is the same data.
    assert load(str(path), max_prompt_length=int(max(first.lengths)) - 1).overlong >= 1
    path.rename(tmp_path / "renamed.parquet")
    assert load(str(tmp_path / "renamed.parquet")).dataset.ids == first.dataset.ids
    assert taken(work) == (0, 0)


def test_what_decides_the_length_is_part_of_the_key(
    load, work: dict[str, int], tmp_path: Path, workspace: Workspace
) -> None:
    path = str(forms.mmrl30k(tmp_path))
    template = tmp_path / "template.jinja"
    template.write_text("{{ content }} Think.")
    base = load(path)
    taken(work)
    for changes in (
        {"instruction": "Say it."},
        {"system_prompt": "You are exact."},
        {"min_pixels": 12544},
        {"prompt_template": str(template)},
    ):
        changed = load(path, **changes)
        assert taken(work) == (0, 4), changes
        assert list(changed.lengths) != list(base.lengths), changes
    template.write_text("{{ content }} Think longer than that.")
    load(path, prompt_template=str(template))
    assert taken(work) == (0, 4)
    load(path, max_pixels=100352)
    assert taken(work) == (0, 4)
    load(path, answer_column="problem")
    assert taken(work)[0] == 4
    load(path, shuffle=False, max_bad_fraction=0.5)
    assert taken(work) == (0, 0)


def test_a_changed_file_is_read_again(load, work: dict[str, int], tmp_path: Path) -> None:
    path = forms.text_only(tmp_path)
    load(str(path))
    taken(work)
    text = path.read_text().replace("0 + 0?", "9 + 9?")
    path.write_text(text)
    assert load(str(path)).dataset.row(load(str(path)).dataset.ids[0]).problem == "9 + 9?"
    assert taken(work)[0] >= 5


def test_changed_image_files_are_read_again(load, work: dict[str, int], tmp_path: Path) -> None:
    rows = [{"problem": f"q{i}", "answer": "1", "images": f"{i}.png"} for i in range(2)]
    path = forms.write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "0.png").write_bytes(forms.encoded("PNG", forms.picture(56, 56)))
    options = {"image_dir": str(tmp_path), "max_bad_fraction": 0.5}
    first = load(str(path), **options)
    assert (len(first.dataset), first.bad) == (1, 1)
    taken(work)
    (tmp_path / "1.png").write_bytes(forms.encoded("PNG", forms.picture(56, 56)))
    (tmp_path / "0.png").write_bytes(forms.encoded("PNG", forms.picture(112, 112)))
    second = load(str(path), **options)
    assert taken(work) == (2, 2)
    assert len(second.dataset) == 2 and second.lengths[0] > first.lengths[0]


def test_damaged_and_foreign_cache_files(load, tmp_path: Path) -> None:
    path = str(forms.mmrl30k(tmp_path))
    expected = load(path)
    files = [f for f in (tmp_path / "cache").rglob("*") if f.suffix == ".arrow"]
    assert len(files) == 2 and not list((tmp_path / "cache").rglob("*.tmp"))
    kept = [f.read_bytes() for f in files]
    for file, content in zip(files, kept, strict=True):
        for damage in (
            b"",
            b"no arrow file",
            content[: len(content) // 2],
            *(k for k in kept if k != content),
        ):
            file.write_bytes(damage)
            assert list(load(path).lengths) == list(expected.lengths)
            assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written(load, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    loaded = load(str(forms.mmrl30k(tmp_path)), cache_dir=str(tmp_path / "file"))
    assert len(loaded.dataset) == 4
    assert len(loaded.notes) == 1 and "data.cache_dir" in loaded.notes[0]


def test_the_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MSSR_CACHE", str(tmp_path / "by_variable"))
    assert DataCache().directory == tmp_path / "by_variable"
    assert DataCache(str(tmp_path / "by_key")).directory == tmp_path / "by_key"
    monkeypatch.delenv("MSSR_CACHE")
    assert DataCache().directory == Path.home() / ".cache" / "mssr"


def test_runs_at_the_same_time(tmp_path: Path) -> None:
    """Two processes check the same data; all see the same, and the cache is whole afterwards."""
    path = forms.mmrl30k(tmp_path)
    program = (
        "import sys; from mssr.data.dataset import PromptDataset; from mssr.config.data import DataConfig\n"
        "for _ in range(20):\n"
        "    d = PromptDataset(sys.argv[1], DataConfig(cache_dir=sys.argv[2])); i = d.check()\n"
        "    d.cache.save('rows', d.parts[0]._key(), i[0].table)\n"
        "print(*d.ids)"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "cache")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    outputs = {run.communicate()[0] for run in runs}
    assert all(run.returncode == 0 for run in runs) and len(outputs) == 1 and outputs != {""}


def test_workers_read_ids_only(load, work: dict[str, int], tmp_path: Path, monkeypatch) -> None:
    """They neither check nor hash rows, and without a cache they find the same ids."""
    path = forms.mmrl30k(tmp_path)
    settle(path)
    loaded = load(str(path))
    taken(work)
    without = PromptDataset(str(path), DataConfig(cache_dir=str(tmp_path / "none")))
    assert without.ids == loaded.dataset.ids

    def hashed(*_: object) -> str:
        raise AssertionError("a row was hashed")

    monkeypatch.setattr(index, "content_id", hashed)
    worker = PromptDataset(str(path), loaded.dataset.config)
    assert worker.ids == loaded.dataset.ids and taken(work) == (0, 0)
    assert worker.row(worker.ids[2]).problem == "<image>One."


def test_overlong_prompts_are_listed(load, tmp_path: Path) -> None:
    path = forms.write_jsonl(
        tmp_path / "a.jsonl", [{"problem": "long " * n, "answer": "1"} for n in (1, 200, 2, 300)]
    )
    loaded = load(str(path), max_prompt_length=250)
    listed = [json.loads(x) for x in (tmp_path / "overlong.jsonl").read_text().splitlines()]
    assert loaded.overlong == len(listed) == 2 and len(loaded.dataset) == 2
    assert [x["where"].rsplit(" ", 1)[1] for x in listed] == ["1", "3"]
    assert all(x["length"] > 250 and x["id"] not in loaded.dataset for x in listed)
    assert "2 overlong" in loaded.summary()


def test_a_source_that_is_dropped_whole(load, tmp_path: Path) -> None:
    short = forms.text_only(tmp_path)
    long = forms.write_jsonl(tmp_path / "long.jsonl", [{"problem": "word " * 400, "answer": "1"}])
    with pytest.raises(UserError, match=r"long.jsonl: no prompt left"):
        load([str(short), str(long)], max_prompt_length=250)


def test_fingerprint_of_a_template_that_fails_on_probes(processor: Any) -> None:
    config = DataConfig(prompt_template="{{ content }} {{ '<image>' }}")
    assert len(lengths.encoder_fingerprint(PromptEncoder(processor, config))) == 32
