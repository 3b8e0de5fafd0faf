"""Every error: errors.txt, for `mssr explain` and ``python -m mssr.tools.errors > docs/errors.md``.

A line of it that is no heading is ``message | cause | what to do``, the last only where the message does not
say it. In a message ``{name}`` is what varies, as in the f-string of the code, and ``{...}`` one of several
ends.
"""

from __future__ import annotations

import functools
import re
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mssr.errors import UserError

HEAD = """# Every error

What commands and runs say in one line, by its text, with cause and cure. `mssr explain` reads the same list:

```bash
mssr explain "data file train.parquet does not exist"
mssr explain < output.txt  # all errors in what was printed
```

`{name}` stands for what varies, `{...}` for one of several endings. A message may begin with the setting,
file or row that it is about, and may quote another one: then look for that one, too.

Written by `python -m mssr.tools.errors > docs/errors.md` from [`errors.txt`](../mssr/tools/errors.txt).
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the list."""

    group: str
    message: str
    cause: str
    cure: str = ""

    def texts(self) -> list[str]:
        """What stands around the names of the message."""
        texts = [""]
        for text, name, *_ in string.Formatter().parse(self.message):
            texts[-1] += text
            texts += [""] * (name is not None)
        return texts


@functools.cache
def entries() -> tuple[Entry, ...]:
    """All of them, in the order of the file."""
    found, group = [], ""
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            group = line.removeprefix("# ")
        elif line:
            found.append(Entry(group, *line.split(" | ")))
    return tuple(found)


def find(message: str) -> list[Entry]:
    """The entry that has most of a message in its words, then those of what it quotes; none where none fits.

    What stands before a colon may be the setting, file or row that it is about.
    """
    ends = [message[colon.end() :] for colon in re.finditer("^|: ", message)]
    fits = [
        (entry, match) for entry in entries() for end in ends if (match := _pattern(entry).fullmatch(end))
    ]
    if not fits:
        return []
    best, match = max(fits, key=lambda fit: len("".join(fit[0].texts())))
    return list(dict.fromkeys([best, *(entry for part in match.groups() for entry in find(part))]))


@functools.cache
def _pattern(entry: Entry) -> re.Pattern[str]:
    return re.compile("(.*?)".join(map(re.escape, entry.texts())))


def explain(message: Sequence[str]) -> None:
    """`mssr explain`: print cause and cure of a message, or of all that stdin has.

    Raises:
        UserError: none of it is in the list.
    """
    lines = [" ".join(message)] if message else sys.stdin.read().splitlines()
    errors = [line for line in lines if "mssr: error: " in line]
    found = dict.fromkeys(entry for line in errors or lines for entry in find(line.strip()))
    if not found:
        raise UserError("mssr explain: no error of mssr is like that; docs/errors.md has all of them")
    for entry in found:
        print(entry.message, f"  why: {entry.cause}", *[f"  do:  {entry.cure}"] * bool(entry.cure), sep="\n")


def reference() -> str:
    """The page: a list a group."""
    lines = [HEAD]
    for group in dict.fromkeys(entry.group for entry in entries()):
        lines += [f"## {group}", ""]
        for entry in entries():
            if entry.group == group:
                message = entry.message.replace("{{", "{").replace("}}", "}")
                quote = "``" if "`" in message else "`"
                cure = f" **Do:** {entry.cure}" if entry.cure else ""
                lines.append(f"- {quote}{message}{quote}<br>{entry.cause}{cure}")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
