"""responses.jsonl: what the model answered, part by part as it came, so that an evaluation can go on.

The first line says what decides the responses (model, prompts, sampling, versions). A part is a slice of the
requests that was generated together; its last line says that it is whole. What follows the last whole part
was cut off by a crash: it is removed and generated again, in a batch as it was, so that an interruption
changes nothing, also where the arithmetic of a batch depends on its members.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mssr.errors import UserError
from mssr.models.files import replace_text

FILE = "responses.jsonl"
FORMAT = 1
Key = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Response:
    """One answer of the model. Example: ``Response("mmk12", "17", 0, "... \\boxed{B}", 91, "stop")``"""

    benchmark: str
    id: str
    """Of the item."""
    sample: int
    text: str
    tokens: int
    finish_reason: str
    """"stop" or "length"."""

    @property
    def key(self) -> Key:
        return self.benchmark, self.id, self.sample

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class ResponseFile:
    """The responses of an evaluation directory, those of earlier calls included.

    Args:
        decides: name -> hash of what the responses depend on.

    Raises:
        UserError: the directory holds responses that were made otherwise, or a file that is none of ours.
    """

    def __init__(self, directory: Path, decides: Mapping[str, str]) -> None:
        self.path = directory / FILE
        self.found: dict[Key, Response] = {}
        if self.path.is_file() and self.path.stat().st_size:
            self._read(dict(decides))
        else:
            replace_text(self.path, json.dumps({"format": FORMAT, "decides": dict(decides)}) + "\n")

    def append(self, part: Sequence[Response]) -> None:
        """Keep a part."""
        lines: list[dict[str, Any]] = [asdict(response) for response in part]
        lines[-1]["ends_part"] = True
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.found |= {r.key: r for r in part}

    def _read(self, decides: dict[str, str]) -> None:
        header, *lines = self.path.read_bytes().splitlines(keepends=True)
        try:
            old = json.loads(header)
            version, before = old["format"], dict(old["decides"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged; remove it, or choose another --out") from error
        if version != FORMAT:
            raise UserError(f"{self.path} has format {version}, and this version reads {FORMAT}")
        changed = [key for key in sorted(before | decides) if before.get(key) != decides.get(key)]
        if changed:
            raise UserError(
                f"--out: {self.path.parent} holds responses with other {', '.join(changed)} than now; choose "
                "another --out"
            )
        whole = position = len(header)
        part: list[Response] = []
        for line in lines:
            position += len(line)
            try:
                record = json.loads(line)
                ends = record.pop("ends_part", False)
                part.append(Response(**record))
            except (ValueError, TypeError, AttributeError):
                break
            if ends and line.endswith(b"\n"):
                self.found |= {r.key: r for r in part}
                part, whole = [], position
        os.truncate(self.path, whole)
