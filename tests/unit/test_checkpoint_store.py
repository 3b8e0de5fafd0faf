"""Checkpoints on disk: complete or not there, checked before use, and the right ones kept."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mssr.errors import TrainingError, UserError
from mssr.models.files import sha256
from mssr.runs.checkpoint import CheckpointStore, read_state, resolve
from mssr.runs.events import EventLog
from mssr.runs.manifest import read_manifest, verify

pytestmark = pytest.mark.unit


class Saved:
    """The ranks' part of a checkpoint, written at once."""

    def __init__(self, directory: str, failure: Exception | None = None, ready: bool = True) -> None:
        self.directory, self.failure, self.ready = Path(directory), failure, ready
        self.directory.mkdir()
        (self.directory / "__0_0.distcp").write_bytes(b"weights" * 100)

    def done(self) -> bool:
        return self.ready

    def result(self) -> dict[str, str]:
        if self.failure:
            raise self.failure
        return {p.name: sha256(p) for p in self.directory.iterdir()}


def save(store: CheckpointStore, step: int, accuracy: float | None = None) -> Path:
    store.begin(step, {"step": step}, Saved, {"seed": 0}, accuracy)
    return store.finish()


def names(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.directory.iterdir())


def found(store: CheckpointStore, tell: Callable[[str], None] = print) -> dict[str, Any] | None:
    path = store.find("auto", tell)
    return None if path is None else read_state(path)


def test_old_ones_go_when_the_next_is_complete(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1), save(store, 2)
    store.begin(3, {"step": 3}, Saved, {})
    assert {"step-000001", "step-000002"} <= set(names(store))
    assert (store.directory / "latest").read_text() == "step-000002"
    store.finish()
    assert names(store) == ["latest", "step-000002", "step-000003"]
    assert found(store) == {"step": 3}
    assert store.find("never", print) is None
    assert store.find(str(store.directory / "step-000002"), print) == store.directory / "step-000002"


def test_the_best_by_validation_is_kept_besides(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step, accuracy in enumerate([float("nan"), 0.2, 0.7, None, 0.5, 0.7, 0.1]):
        save(store, step, accuracy)
    assert names(store) == ["best", "latest", "step-000005", "step-000006"]
    assert (store.directory / "best").read_text() == "step-000005"  # of equals the later
    assert resolve(store.directory / "best") == store.directory / "step-000005"
    assert resolve(tmp_path) == store.directory / "step-000006"
    assert read_manifest(store.directory / "step-000005").val_accuracy == 0.7


def test_a_failure_while_saving_leaves_the_previous_one_in_force(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    full = OSError(28, "No space left on device")
    store.begin(2, {"step": 2}, lambda d: Saved(d, failure=full), {})
    with pytest.raises(OSError, match="No space"):
        store.finish()
    assert names(store) == ["latest", "step-000001"]  # also the space is free again

    def at_once(directory: str) -> Saved:
        raise full

    with pytest.raises(OSError, match="No space"):
        store.begin(2, {"step": 2}, at_once, {})
    assert names(store) == ["latest", "step-000001"] and not store.writing
    assert found(store) == {"step": 1}
    save(store, 2)
    assert found(store) == {"step": 2}


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    save(CheckpointStore(tmp_path, keep=1), 1)
    CheckpointStore(tmp_path, keep=1).begin(2, {"step": 2}, Saved, {})  # and no more
    store = CheckpointStore(tmp_path, keep=1)
    assert found(store) == {"step": 1}
    save(store, 2)
    assert names(store) == ["latest", "step-000002"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


FILES = ["manifest.json", "trainer.json", "trainer.safetensors", "actor/__0_0.distcp"]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_one_is_told_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    newest = save(store, 2)
    damage(newest / name)
    told: list[str] = []
    assert found(store, told.append) == {"step": 1}
    assert len(told) == 1 and name in told[0] and told[0].endswith("going on from step-000001")
    with pytest.raises(UserError, match="step-000002"):
        store.find(str(newest), print)
    damage(store.directory / "step-000001" / name)
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):  # never silently afresh
        store.find("auto", print)


def test_every_file_has_its_checksum(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path, keep=1), 1)
    assert sorted(verify(path).files) == sorted(FILES[1:])
    assert {"mssr", "python", "torch"} <= verify(path).versions.keys()


def test_going_back_to_an_older_one_does_not_delete_it(tmp_path: Path) -> None:
    """After a damaged step 4 the run goes on from step 2, and its next checkpoint is of step 3."""
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 4)
    save(store, 3)
    assert found(store) == {"step": 3}
    assert "step-000003" in names(store)


def test_a_pointer_to_nothing_and_a_path_to_nothing_are_errors(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    assert store.find("auto", print) is None
    with pytest.raises(UserError, match="no such directory"):
        store.find(str(tmp_path / "nowhere"), print)
    store.directory.mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        resolve(tmp_path)
    (store.directory / "latest").write_text("step-000009")
    with pytest.raises(UserError, match="step-000009 is neither"):
        store.find("auto", print)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    path = save(CheckpointStore(tmp_path, keep=1), 1)
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        verify(path)


def test_events_go_to_screen_and_file_and_restarts_are_bounded(tmp_path: Path) -> None:
    screen: list[str] = []
    events = EventLog(tmp_path, screen.append, max_restarts=2)
    events.step = 7
    events.record("checkpoint_failed", "No space left")
    for _ in range(2):
        events.restart("engine_died", "engine 0: died")
    with pytest.raises(TrainingError, match=r"trainer\.max_restarts=2"):
        events.restart("engine_died", "engine 0: died")
    lines = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [x["event"] for x in lines] == ["checkpoint_failed"] + ["engine_died"] * 3
    assert {x["step"] for x in lines} == {7} and len(screen) == 4
    assert "checkpoint failed: No space left" in screen[0]
    events.progress()
    events.restart("engine_died", "engine 0: died")  # counted afresh


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/mssr-was-here",))


class Attribute:
    """Pickled as some releases of Python 3.11 pickle the member of an enum."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.of, self.name)


def test_the_index_of_a_checkpoint_may_come_from_another_release_of_python() -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

    from mssr.actor.checkpoint import _Unpickler

    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    index = io.BytesIO(pickle.dumps(Attribute(_MEM_FORMAT_ENCODING, member.name)))
    assert _Unpickler(index).load() is member
    for of, name in ((Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (Path("a"), "unlink")):
        index = io.BytesIO(pickle.dumps(Attribute(of, name)))
        with pytest.raises(pickle.UnpicklingError, match=f"may not ask for {name}"):
            _Unpickler(index).load()


def test_the_index_of_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from mssr.actor.checkpoint import SafeReader, load_model_state

    state = {"w": __import__("torch").ones(3)}
    dcp.save({"model": state}, checkpoint_id=str(tmp_path / "actor"), no_dist=True)
    back = {"w": state["w"] * 0}
    load_model_state(back, str(tmp_path / "actor"))
    assert back["w"].tolist() == [1.0, 1.0, 1.0]
    (tmp_path / "actor" / ".metadata").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(pickle.UnpicklingError, match=r"may not hold posix\.system"):
        SafeReader(str(tmp_path / "actor")).read_metadata()
    assert not Path("/tmp/mssr-was-here").exists()
