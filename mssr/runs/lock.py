"""A directory that one process writes to at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from mssr.errors import UserError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def hold_directory(path: Path, key: str) -> Iterator[tuple[str, ...]]:
    """Make a directory with ``logs`` in it and hold it; yields lines for the user.

    The kernel lets go when the process ends, be it by kill -9: the library sees to it that no child keeps the
    open file.

    Args:
        key: the option that names the directory, for messages.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """
    file = path / LOCK_FILE
    notes: tuple[str, ...] = ()
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be made ({error.strerror})") from error
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        pid, _, host = file.read_text(errors="replace").strip().partition(" ")
        holder = f"process {pid} on {host}" if host else "another process"
        raise UserError(
            f"{key}: {path} is in use by {holder}; let it end or stop it, or choose another {key}"
        ) from None
    except OSError as error:
        # The file system knows no locks.
        reason = error.strerror
        notes = (f"{file} cannot be locked ({reason}): see to it that no second run writes to {path}",)
    else:
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            file.write_text(f"{os.getpid()} {socket.gethostname()}\n")
    try:
        yield notes
    finally:
        lock.release()
