"""What was found out about data files, kept on disk: Arrow tables under names that are hashes.

Everything here may vanish, be damaged or belong to another version at any time: then it is found out
again. Files appear whole (written under another name, then renamed), so that runs may share the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import feather

from mssr.models.files import sha256

VERSION = 3
"""Part of every name: raise it when the meaning of a file changes."""

SETTLED_S = 2.0
"""A file that changed so recently may change again with the same time stamp."""


class DataCache:
    """The folder, $MSSR_CACHE or ~/.cache/mssr if none is given. What cannot be written is not kept;
    ``problem`` then says why."""

    def __init__(self, directory: str | None = None) -> None:
        chosen = directory or os.environ.get("MSSR_CACHE") or "~/.cache/mssr"
        self.directory = Path(chosen).expanduser()
        self.problem: str | None = None

    def load(self, kind: str, key: str) -> pa.Table | None:
        """The table kept under this key, None if there is none that can be read."""
        path = self._path(kind, key)
        try:
            table = feather.read_table(path, memory_map=False)
            table.validate(full=True)
        except (OSError, pa.ArrowException):
            return None
        return table if (table.schema.metadata or {}).get(b"mssr") == path.name.encode() else None

    def save(self, kind: str, key: str, table: pa.Table) -> None:
        path = self._path(kind, key)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        named = table.replace_schema_metadata({**(table.schema.metadata or {}), b"mssr": path.name.encode()})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            feather.write_feather(named, str(temporary), compression="uncompressed")
            os.replace(temporary, path)
        except OSError as error:
            self.problem = f"{self.directory} cannot be written ({error.strerror or error})"
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def content_key(self, files: Sequence[Path]) -> str:
        """A hash of the bytes of files; those of a file that has not changed are not read again."""
        return digest_of([self._file_hash(path) for path in files])

    def _file_hash(self, path: Path) -> str:
        state = settled_state(path)
        known = None if state is None else self.load("files", state)
        if known is not None:
            return str(known["hash"][0].as_py())
        found = sha256(path)
        if state is not None:
            self.save("files", state, pa.table({"hash": [found]}))
        return found

    def _path(self, kind: str, key: str) -> Path:
        return self.directory / kind / f"{digest_of(VERSION, kind, key)}.arrow"


def digest_of(*parts: Any) -> str:
    """32 hexadecimal digits: a hash of values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def settled_state(path: Path) -> str | None:
    """A hash of name, size and time of the last change; None for a file that may change again unnoticed."""
    stat = path.stat()
    settled = time.time() - stat.st_mtime > SETTLED_S
    return digest_of(str(path.resolve()), stat.st_size, stat.st_mtime_ns) if settled else None


def file_states(paths: Iterable[str]) -> dict[str, list[int]]:
    """[size, time of the last change in ns] of files, [-1, -1] of one that is not there."""
    states = {}
    for path in paths:
        try:
            stat = os.stat(path)
            states[path] = [stat.st_size, stat.st_mtime_ns]
        except (OSError, ValueError):
            states[path] = [-1, -1]
    return states
