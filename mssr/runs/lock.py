"""A directory that one process writes to at a time."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from mssr.errors import UserError

LOCK_FILE = ".lock"


@dataclass(frozen=True)
class HeldDirectory:
    """A directory that this process holds, until `release`, the end of a ``with``, or its own end."""

    path: Path
    notes: tuple[str, ...]
    """Lines for the user."""
    lock: BaseFileLock | None
    """None where the file system knows no locks."""

    def release(self) -> None:
        """Let another process have the directory."""
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> HeldDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def hold_directory(path: Path, key: str) -> HeldDirectory:
    """Make a directory with ``logs`` in it and hold it.

    The kernel lets go when the process ends, be it by kill -9: the library sees to it that no child keeps the
    open file.

    Args:
        key: the option that names the directory, for messages.

    Raises:
        UserError: it cannot be made, or another process holds it.
    """
    file = path / LOCK_FILE
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
        note = f"{file} cannot be locked ({error.strerror}): see to it that no second run writes to {path}"
        return HeldDirectory(path, (note,), None)
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        file.write_text(f"{os.getpid()} {socket.gethostname()}\n")
    return HeldDirectory(path, (), lock)
