"""Signs of life of a worker: who waits for it can tell a long computation from a hung one.

Code that works through many small pieces calls `beat` at each of them. What a worker does beside its calls,
in a thread of its own, beats as another task, so that it hides no call that hangs. Standard library only,
because it is called from everywhere in a worker.
"""

from __future__ import annotations

import faulthandler
import tempfile
import time

CALL, SAVE = "call", "save"
"""Tasks: the call that a worker answers, and the checkpoint that it writes meanwhile."""
_started = time.monotonic()
_last: dict[str, float] = {}


def beat(task: str = CALL) -> None:
    """Work goes on."""
    _last[task] = time.monotonic()


def silent_s(task: str = CALL) -> float:
    """Seconds since the last beat of a task of this process."""
    return time.monotonic() - _last.get(task, _started)


def stacks() -> str:
    """Where every thread of this process is."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
