"""The table of ids: rows in order of first occurrence, crowded slots, keys that never change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mssr.algorithms import BetaBaseline, id_table
from mssr.algorithms import baseline as baseline_module
from mssr.algorithms.id_table import IdTable

pytestmark = pytest.mark.unit


@given(st.lists(st.lists(st.text(st.characters(), max_size=3), max_size=40), max_size=8))
@settings(derandomize=True, deadline=None)
def test_ids_are_numbered_by_first_occurrence(batches: list[list[str]]) -> None:
    table = IdTable()
    reference: dict[str, int] = {}
    for ids in batches:
        known = [reference.get(i, -1) for i in ids]
        assert table.find(table.keys(ids)).tolist() == known
        for i in ids:
            reference.setdefault(i, len(reference))
        assert table.insert(table.keys(ids)).tolist() == [reference[i] for i in ids]
        assert len(table) == len(reference)
    assert table.find(table.keys(list(reference))).tolist() == list(range(len(reference)))
    assert table.find(table.keys(["none of these"])).tolist() == [-1]


def test_keys_that_crowd_the_same_slots_are_kept_apart() -> None:
    rng = np.random.default_rng(0)
    # The last slots of any table, so that a search goes on at its beginning; halves often agree.
    keys = rng.integers(0, [30, 9], (3000, 2), np.uint64)
    keys[:, 0] = np.uint64(2**64 - 1) - keys[:, 0]
    table = IdTable()
    reference: dict[tuple[int, int], int] = {}
    for start in range(0, 3000, 17):
        part = keys[start : start + 17]
        rows = [reference.setdefault(tuple(k), len(reference)) for k in part.tolist()]
        assert table.insert(part).tolist() == rows
    assert len(table) == len(reference) < 300
    np.testing.assert_array_equal(table.all_keys.tolist(), list(reference))
    assert not table.all_keys.flags.writeable
    copy = IdTable.from_keys(table.all_keys)
    np.testing.assert_array_equal(copy.find(keys), table.find(keys))
    with pytest.raises(ValueError, match="twice"):
        IdTable.from_keys(np.concatenate([table.all_keys, table.all_keys[5:6]]))
    with pytest.raises(ValueError, match="int64"):
        IdTable.from_keys(np.zeros((3, 2), np.int64))


def test_a_list_of_ids_that_was_changed_gets_its_new_keys() -> None:
    table, ids = IdTable(), ["x", "y"]
    first = table.keys(ids)
    assert table.keys(list(ids)) is first and not first.flags.writeable  # those of the last call are kept
    table.insert(first)
    assert table.find(table.keys(ids)).tolist() == [0, 1]
    ids[0] = "z"
    assert table.find(table.keys(ids)).tolist() == [-1, 1]
    table.insert(table.keys(["z"]))
    assert table.find(table.keys(ids)).tolist() == [2, 1]
    assert table.find(first).tolist() == [0, 1]


def test_keys_do_not_change_between_versions() -> None:
    # They are in checkpoints: BLAKE2b of the UTF-8 bytes, its first 16 bytes.
    key = IdTable().keys(["ü"]).astype("<u8").tobytes()
    assert key.hex() == "53741fc17e026c2e04b276879d30ca17"
    assert len(np.unique(IdTable().keys(["a", "a ", "A", "\ud800", "\ud801", ""]), axis=0)) == 6


@pytest.mark.parametrize("remembered", [0, 1000])
def test_long_lists_are_worked_on_piece_by_piece(monkeypatch: pytest.MonkeyPatch, remembered: int) -> None:
    """By 7 ids at a time, as by 65,536: nothing is lost between the pieces or found in two."""
    ids = [f"p{k % 40}" for k in range(61)]
    whole = IdTable()
    keys, rows = whole.keys(ids), whole.insert(whole.keys(ids))
    monkeypatch.setattr(id_table, "_CHUNK", 7)
    monkeypatch.setattr(id_table, "_REMEMBERED", remembered)
    table = IdTable()
    np.testing.assert_array_equal(table.keys(ids), keys)
    assert table.insert(table.keys(ids)).tolist() == rows.tolist() == [k % 40 for k in range(61)]
    copy = IdTable.from_keys(whole.all_keys)
    assert copy.find(keys).tolist() == table.find(keys).tolist() == rows.tolist()
    assert copy.find(copy.keys(["none"] * 9)).tolist() == [-1] * 9
    with pytest.raises(ValueError, match="twice"):
        IdTable.from_keys(np.concatenate([whole.all_keys, whole.all_keys[:1]]))
    odd: list = [*ids, 7]
    with pytest.raises(ValueError, match="must be strings, not 7"):
        table.keys(odd)


def test_many_prompts_are_worked_on_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 5 at a time, as by 65,536: values, a state that is loaded, and what is wrong in its last piece."""
    ids, rewards = [f"p{k}" for k in range(13)], [k % 4 / 4 for k in range(13)]
    whole = BetaBaseline()
    whole.update(ids, rewards, 0.9)
    values, mean, state = whole.values(ids), whole.mean(), whole.state_dict()
    assert mean == pytest.approx(values.mean(dtype=np.float64), abs=1e-7)
    monkeypatch.setattr(baseline_module, "_CHUNK", 5)
    np.testing.assert_array_equal(whole.values(ids), values)
    copy = BetaBaseline()
    copy.load_state_dict(state)
    assert copy.mean() == mean
    np.testing.assert_array_equal(copy.values(ids[::-1]), values[::-1])
    for wrong in ([-1.0, 2.0], [np.nan, 1.0], [0.0, 0.0]):
        state["counts"][12] = wrong
        with pytest.raises(ValueError, match="no Beta distribution"):
            BetaBaseline().load_state_dict(state)
