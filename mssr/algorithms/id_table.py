"""String ids -> row numbers, for many millions of ids: 24 to 32 bytes each, whatever their length."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, NDArray

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]

_CHUNK = 1 << 16  # ids that are looked up at once: the temporaries stay in the cache
_REMEMBERED = 1 << 15  # longest list of ids whose keys are kept for the next call


class IdTable:
    """Numbers distinct ids 0, 1, 2, ... in the order in which they are inserted; none is ever removed.

    An id is known by its *key*, 128 bits of its BLAKE2b digest: among n ids two share one with probability
    n^2 / 2^129, 1.5e-25 for ten million. Open addressing with linear probing: a slot holds a row number
    or -1, the search for a key starts at the slot that the key's top bits name, and at least half of the
    slots are free. Nothing here is a Python object for each id. Up to 2^30 ids.
    """

    def __init__(self) -> None:
        self._size = 0
        self._keys: Keys = np.empty((0, 2), np.uint64)  # with spare rows at the end
        self._slots = np.full(2, -1, np.int32)
        self._last: tuple[tuple[str, ...], Keys] | None = None  # ids and keys of the last short list
        self._last_found: tuple[int, Rows] | None = None  # their rows, when there were so many in all

    @classmethod
    def from_keys(cls, keys: ArrayLike) -> IdTable:
        """A table whose row i is the (n, 2) uint64 key i.

        Raises:
            ValueError: The array has another shape or type, or a key occurs twice.
        """
        array = np.asarray(keys)
        if not is_keys(array):
            raise ValueError(f"keys must be (n, 2) uint64, not {array.dtype} of shape {array.shape}")
        if (_first_of_equals(array) != np.arange(len(array))).any():
            raise ValueError("the keys of ids must be distinct, but some occur twice")
        table = cls()
        table._append(array)
        return table

    def __len__(self) -> int:
        return self._size

    @property
    def all_keys(self) -> Keys:
        """(n, 2) uint64 keys in the order of their rows: a read-only view, which later ids do not change."""
        view = self._keys[: self._size]
        view.flags.writeable = False
        return view

    def keys(self, ids: Sequence[str] | Keys) -> Keys:
        """(B, 2) uint64 keys of B ids; read-only, the same on every machine. Keys are given back as they are.

        Those of the last call are remembered, because a training step asks several times for its ids.

        Raises:
            ValueError: ``ids`` is a single string, or one of them is no string.
        """
        if is_keys(ids):
            return ids
        if isinstance(ids, str):
            raise ValueError(f"ids must be a sequence of prompt ids, not the single string {ids!r}")
        # A copy, as the caller may change a list between two calls.
        content = tuple(ids) if len(ids) <= _REMEMBERED else None
        if self._last is not None and self._last[0] == content:
            return self._last[1]
        try:
            keys = _digests(ids)
        except TypeError:  # 7 and "7" would silently be two prompts
            wrong = next(i for i in ids if not isinstance(i, str))
            raise ValueError(f"prompt ids must be strings, not {wrong!r}") from None
        if content is not None:
            self._last, self._last_found = (content, keys), None
        return keys

    def find(self, keys: Keys) -> Rows:
        """(B,) int64 row of each of the (B, 2) keys, -1 for one that was never inserted; read-only."""
        remembered = self._last is not None and self._last[1] is keys
        if remembered and self._last_found is not None and self._last_found[0] == self._size:
            return self._last_found[1]
        rows = np.full(len(keys), -1, np.int64)
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK]
            left, slot = np.arange(start, start + len(chunk)), self._home(chunk)
            while len(left):
                row = self._slots[slot]
                taken = row >= 0  # a search that meets a free slot has ended
                left, slot, row = left[taken], slot[taken], row[taken]
                # `take` is six times as fast as an index.
                stored, sought = self._keys.take(row, axis=0), keys.take(left, axis=0)
                same = (stored[:, 0] == sought[:, 0]) & (stored[:, 1] == sought[:, 1])
                rows[left[same]] = row[same]
                left, slot = left[~same], self._next(slot[~same])
        rows.flags.writeable = False
        if remembered:
            self._last_found = self._size, rows
        return rows

    def insert(self, keys: Keys) -> Rows:
        """(B,) int64 row of each of the (B, 2) keys, new ones numbered by their first occurrence."""
        rows, size = self.find(keys).copy(), self._size
        unseen = np.flatnonzero(rows < 0)
        first = _first_of_equals(keys[unseen])
        is_first = first == np.arange(len(unseen))
        self._append(keys[unseen[is_first]])
        rows[unseen] = (size - 1 + np.cumsum(is_first))[first]
        return rows

    def _append(self, keys: Keys) -> None:
        """Give distinct new keys the next rows."""
        first, size = self._size, self._size + len(keys)
        self._keys = grown(self._keys, first, size)
        self._keys[first:size] = keys
        self._size = size
        if 2 * size > len(self._slots):
            del self._slots  # before the new one is there: it is rebuilt from the keys
            self._slots = np.full(1 << (2 * size - 1).bit_length(), -1, np.int32)
            first = 0
        for start in range(first, size, _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, size))
            slot = self._home(self._keys[start : start + len(rows)])
            while len(rows):
                free = self._slots[slot] < 0
                self._slots[slot[free]] = rows[free]  # of several rows for one slot, one gets it
                lost = self._slots[slot] != rows
                rows, slot = rows[lost], self._next(slot[lost])

    def _home(self, keys: Keys) -> NDArray[np.int64]:
        return (keys[:, 0] >> np.uint64(65 - len(self._slots).bit_length())).astype(np.int64)

    def _next(self, slot: NDArray[np.int64]) -> NDArray[np.int64]:
        return (slot + 1) & (len(self._slots) - 1)


def is_keys(ids: object) -> TypeGuard[Keys]:
    """Whether these are keys and no strings."""
    return isinstance(ids, np.ndarray) and ids.dtype == np.uint64 and ids.shape[1:] == (2,)


def grown(array: NDArray[Any], used: int, size: int) -> NDArray[Any]:
    """An array of at least ``size`` rows, the first ``used`` as they were; the same if it has them already.

    Doubling keeps the cost of growing linear; spare pages stay untouched.
    """
    if size <= len(array):
        return array
    larger = np.empty((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[:used] = array[:used]
    return larger


def _first_of_equals(keys: Keys) -> Rows:
    """(m,) index of the first key that equals each of m keys."""
    halves = np.sort(keys[:, 0])
    if (halves[1:] != halves[:-1]).all():  # as good as always
        return np.arange(len(keys))
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # equal keys stay in their order
    in_order = keys[order]
    starts = np.append(True, (in_order[1:] != in_order[:-1]).any(axis=1))
    first = np.empty(len(keys), np.int64)
    first[order] = order[starts][np.cumsum(starts) - 1]
    return first


def _digests(ids: Sequence[str] | NDArray[Any]) -> Keys:
    keys = np.empty((len(ids), 2), np.uint64)
    for start in range(0, len(ids), _CHUNK):
        part = ids[start : start + _CHUNK]
        try:
            # Whole digests, cut afterwards: asking for short ones costs more than it saves.
            digests = [blake2b(i).digest() for i in map(str.encode, part)]
        except UnicodeEncodeError:  # a lone surrogate, which JSON may hold and UTF-8 refuses
            digests = [blake2b(i.encode("utf-8", "surrogatepass")).digest() for i in part]
        keys[start : start + len(part)] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 8)[:, :2]
    keys.flags.writeable = False
    return keys
