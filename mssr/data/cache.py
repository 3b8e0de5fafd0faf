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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

VERSION = 2
"""Part of every name: raise it when the meaning of a file changes."""

SETTLED_S = 2.0
"""A file that changed so recently may change again with the same time stamp: its hash is not kept."""


class DataCache:
    """The folder. What cannot be written is not kept; ``problem`` then says why.

    Args:
        directory: None for $MSSR_CACHE or ~/.cache/mssr.
    """

    def __init__(self, directory: str | None = None) -> None:
        chosen = directory or os.environ.get("MSSR_CACHE") or "~/.cache/mssr"
        self.directory = Path(chosen).expanduser()
        self.problem: str | None = None

    def load(self, kind: str, key: str) -> Any | None:
        """The `pyarrow.Table` kept under this key, None if there is none that can be read."""
        import pyarrow as pa

        try:
            with pa.OSFile(str(self._path(kind, key)), "rb") as file:
                table = pa.ipc.open_file(file).read_all()
            metadata = table.schema.metadata or {}
            if metadata.get(b"mssr") != _name(kind, key).encode():
                return None
            table.validate(full=True)
            return table
        except (OSError, pa.ArrowException):
            return None

    def save(self, kind: str, key: str, table: Any) -> None:
        import pyarrow as pa

        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), b"mssr": _name(kind, key).encode()}
        )

        def write(path: Path) -> None:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)

        self._write(self._path(kind, key), write)

    def content_key(self, files: Sequence[Path]) -> str:
        """A hash of the bytes of files; those of a file that has not changed are not read again."""
        digest = hashlib.blake2b(digest_size=16)
        for path in files:
            digest.update(self._file_hash(path).encode())
        return digest.hexdigest()

    def _file_hash(self, path: Path) -> str:
        stat = path.stat()
        known = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
        memo = self._path("files", digest_of(known), ".json")
        try:
            record = json.loads(memo.read_text())
            if record["file"] == known and isinstance(record["hash"], str):
                return record["hash"]
        except (OSError, ValueError, KeyError, TypeError):
            pass  # not known, or damaged
        with path.open("rb") as file:
            value = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if time.time() - stat.st_mtime > SETTLED_S:
            text = json.dumps({"file": known, "hash": value})
            self._write(memo, lambda temporary: temporary.write_text(text))
        return value

    def _path(self, kind: str, key: str, suffix: str = ".arrow") -> Path:
        return self.directory / kind / (_name(kind, key) + suffix)

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            os.replace(temporary, path)
        except OSError as error:
            self.problem = f"{self.directory} cannot be written ({error.strerror or error})"
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def digest_of(*parts: Any) -> str:
    """32 hexadecimal digits: a hash of values that JSON can hold."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_states(paths: Sequence[str]) -> list[list[int]]:
    """[size, time of the last change in ns] of files, [-1, -1] of one that is not there."""
    states = []
    for path in paths:
        try:
            stat = os.stat(path)
            states.append([stat.st_size, stat.st_mtime_ns])
        except (OSError, ValueError):
            states.append([-1, -1])
    return states


def _name(kind: str, key: str) -> str:
    return digest_of(VERSION, kind, key)
