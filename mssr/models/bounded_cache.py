"""What was used most recently, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """A mapping that forgets what was not asked for the longest. Threads may share it.

    Args:
        max_bytes: of all values together; what is larger alone is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: K) -> V | None:
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            return self._items[key][0]

    def put(self, key: K, value: V, nbytes: int) -> None:
        """Keep a value, in place of the one that the key had."""
        with self._lock:
            self._remove(key)
            if nbytes > self._max_bytes:
                return
            self._items[key] = value, nbytes
            self._bytes += nbytes
            while self._bytes > self._max_bytes:
                self._remove(next(iter(self._items)))

    def pop(self, key: K) -> V | None:
        """The value, kept no longer."""
        with self._lock:
            return self._remove(key)

    def _remove(self, key: K) -> V | None:
        if key not in self._items:
            return None
        value, nbytes = self._items.pop(key)
        self._bytes -= nbytes
        return value
