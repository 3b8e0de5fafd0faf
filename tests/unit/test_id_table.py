"""The table of ids: rows in order of first occurrence, crowded slots, keys that never change."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
