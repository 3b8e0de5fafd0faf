"""Signs of life of a worker: who waits for it can tell a long computation from a hung one.

Code that works through many small pieces calls `beat` at each of them. Standard library only, because it
is called from everywhere in a worker.
"""

from __future__ import annotations

import faulthandler
import tempfile
import time

_last = time.monotonic()


def beat() -> None:
    """Work goes on."""
    global _last
    _last = time.monotonic()


def silent_s() -> float:
    """Seconds since the last beat of this process."""
    return time.monotonic() - _last


def stacks() -> str:
    """Where every thread of this process is."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
