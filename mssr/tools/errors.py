"""Every error: errors.txt, for `mssr explain` and ``python -m mssr.tools.errors > docs/errors.md``.

Its lines are headings, or ``message | cause | what to do``, the last only where the message does not say it.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mssr.errors import UserError

HEAD = """# Every error

Written by `python -m mssr.tools.errors > docs/errors.md` from [`errors.txt`](../mssr/tools/errors.txt), which
`mssr explain` reads, too: give it a message, or on stdin what a command printed. `{name}` is what varies,
`{...}` one of several ends. A message may begin with what it is about, and may quote another one of these.
"""
NAME = re.compile(r"\{[\w.]+\}")


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the list."""

    group: str
    message: str
    cause: str
    cure: str = ""


@functools.cache
def entries() -> dict[Entry, re.Pattern[str]]:
    """All of them, in the order of the file, each with a pattern of the messages that it is about."""
    found, group = {}, ""
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            group = line.removeprefix("# ")
        elif line:
            entry = Entry(group, *line.split(" | "))
            found[entry] = re.compile("(.*?)".join(map(re.escape, NAME.split(entry.message))))
    return found


def find(message: str) -> list[Entry]:
    """The entry that has most of a message in its words, then those of what it quotes; none where none fits.

    What stands before a colon may be the setting, file or row that it is about.
    """
    ends = [message[colon.end() :] for colon in re.finditer("^|: ", message)]
    tried = ((entry, pattern.fullmatch(end)) for entry, pattern in entries().items() for end in ends)
    if not (fits := [(entry, match) for entry, match in tried if match]):
        return []
    best, match = max(fits, key=lambda fit: len(NAME.sub("", fit[0].message)))
    return list(dict.fromkeys([best, *(entry for part in match.groups() for entry in find(part))]))


def explain(message: Sequence[str]) -> None:
    """`mssr explain`: print cause and cure of a message, or of all on stdin; a UserError if there is none."""
    lines = [" ".join(message)] if message else sys.stdin.read().splitlines()
    errors = [text for line in lines if (text := line.partition("mssr: error: ")[2])] or lines
    found = dict.fromkeys(entry for text in errors for entry in find(text.strip()))
    if not found:
        raise UserError("mssr explain: no error of mssr is like that; docs/errors.md has all of them")
    for entry in found:
        print(entry.message, f"  why: {entry.cause}", *[f"  do:  {entry.cure}"] * bool(entry.cure), sep="\n")


def reference() -> str:
    """The page: a list a group."""
    page = HEAD
    for group in dict.fromkeys(entry.group for entry in entries()):
        page += f"\n## {group}\n\n"
        for entry in entries():
            if entry.group == group:
                cure = f" **Do:** {entry.cure}" if entry.cure else ""
                page += f"- ``{entry.message}``<br>{entry.cause}{cure}\n"
    return page


if __name__ == "__main__":
    print(reference(), end="")
