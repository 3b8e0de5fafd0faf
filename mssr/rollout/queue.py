"""The requests that an engine is to answer; more may come while it works."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

from mssr.rollout.heartbeat import beat
from mssr.types import Rollout, RolloutRequest

Numbered = tuple[int, RolloutRequest]
"""A request and its number in the call that it belongs to."""
Finished = list[tuple[int, Rollout]]
"""Rollouts that ended, each with the number of its request."""


class RequestQueue:
    """Filled by one thread, emptied by an engine in another.

    Args:
        requests: the first ones.
        open: whether `put` may bring more before `close`.
    """

    def __init__(self, requests: Iterable[Numbered] = (), open: bool = False) -> None:
        self.taken = 0
        """Requests that the engine has taken so far."""
        self._waiting = deque(requests)
        self._open = open
        self._changed = threading.Condition()

    def put(self, requests: Iterable[Numbered]) -> None:
        """Append requests."""
        with self._changed:
            assert self._open
            self._waiting.extend(requests)
            self._changed.notify()

    def close(self) -> None:
        """No more will come."""
        with self._changed:
            self._open = False
            self._changed.notify()

    def take(self, most: int | None = None, wait: bool = False) -> list[Numbered]:
        """The next requests, in their order.

        Args:
            most: no more than so many.
            wait: until there is one, or none will come; an empty list then means the end.
        """
        with self._changed:
            while wait and self._open and not self._waiting:
                beat()  # an engine without work is alive
                self._changed.wait(timeout=1.0)
            count = len(self._waiting) if most is None else min(most, len(self._waiting))
            self.taken += count
            return [self._waiting.popleft() for _ in range(count)]
