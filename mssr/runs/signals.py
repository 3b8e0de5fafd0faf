"""Ctrl-C and SIGTERM: end soon, with a checkpoint or whatever else keeps the work."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from mssr.errors import EXIT_SIGINT, EXIT_SIGTERM


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered; a second SIGINT ends at once.

    Args:
        tell: called with a sentence for the user when the first one arrives.
        how: the beginning of that sentence.
    """

    def __init__(self, tell: Callable[[str], None], how: str = "stopping with a checkpoint") -> None:
        self.exit_code: int | None = None
        self._tell = tell
        self._how = how
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.install()
        return self

    def install(self) -> None:
        """Take the signals, again if a library has taken them meanwhile."""
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._remember)
            self._previous.setdefault(number, previous)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.exit_code is not None

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.exit_code = EXIT_SIGTERM if number == signal.SIGTERM else EXIT_SIGINT
        self._tell(f"{self._how}; Ctrl-C again stops at once")
