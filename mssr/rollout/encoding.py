"""Prompts that are encoded while the engine is at work on those before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from mssr.rollout.queue import Numbered

T = TypeVar("T")

PIECE = 4
"""Requests whose prompts a thread encodes in one go."""
AHEAD = 4
"""Pieces for each thread that are encoded and not yet taken, or in work: their pixels are in memory."""


class EncodingAhead(Generic[T]):
    """Requests on their way into an engine, in their order, while their prompts are encoded.

    Args:
        encode: ids of prompts -> an input of the engine for each; threads call it.
        threads: how many; 0: everything is encoded by `put`, so that what an engine computes together does
            not depend on time.
    """

    def __init__(self, encode: Callable[[Sequence[str]], list[T]], threads: int) -> None:
        self._encode, self._threads = encode, threads
        self._pool = ThreadPoolExecutor(threads) if threads else None
        self._waiting: deque[Numbered] = deque()
        self._pieces: deque[tuple[list[Numbered], Future[list[T]]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._pieces or self._waiting)

    def close(self) -> None:
        """What is not taken by now never will be."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def put(self, requests: Sequence[Numbered]) -> None:
        """Append requests."""
        self._waiting += requests
        self._begin()

    def take(self, wait: bool) -> list[tuple[Numbered, T]]:
        """The next requests that are encoded, each with its input; perhaps none.

        Args:
            wait: for the first ones.

        Raises:
            UserError: a prompt cannot be encoded.
        """
        ready: list[tuple[Numbered, T]] = []
        while self._pieces and (self._pieces[0][1].done() or (wait and not ready)):
            piece, inputs = self._pieces.popleft()
            ready += zip(piece, inputs.result(), strict=True)
            self._begin()
        return ready

    def _begin(self) -> None:
        while self._waiting and len(self._pieces) < AHEAD * (self._threads or 1):
            count = min(PIECE, len(self._waiting)) if self._pool else len(self._waiting)
            piece = [self._waiting.popleft() for _ in range(count)]
            ids = [request.prompt_id for _, request in piece]
            if self._pool:
                inputs = self._pool.submit(self._encode, ids)
            else:
                inputs = Future()
                inputs.set_result(self._encode(ids))
            self._pieces.append((piece, inputs))
