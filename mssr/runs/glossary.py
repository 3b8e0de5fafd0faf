"""Every metric: glossary.txt, for the report and ``python -m mssr.runs.glossary > docs/metrics.md``.

A line of it that is no heading is ``key | unit | meaning | what is normal | what to do when it is not``; in a
key ``*`` stands for any text, and the first line that fits counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

HEAD = """# Every metric

Written by `python -m mssr.runs.glossary > docs/metrics.md` from
[`glossary.txt`](../mssr/runs/glossary.txt), which the report of a run reads too. The keys are those of
`metrics.jsonl`; a run has those that its config asks for. `*` stands for a name.

"Normal" is what runs of this project on tasks with scores of 0 and 1 look like, and no law.
"""


@dataclass(frozen=True, slots=True)
class Metric:
    """A line of the glossary."""

    group: str
    key: str
    unit: str
    meaning: str
    normal: str
    otherwise: str


@functools.cache
def metrics() -> tuple[Metric, ...]:
    """All of them, in the order of the file."""
    found, group = [], ""
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            group = line.removeprefix("# ")
        elif line:
            found.append(Metric(group, *line.split(" | ")))
    return tuple(found)


@functools.cache
def find(key: str) -> Metric | None:
    """The line of a key; None for one that nobody has described."""
    return next((metric for metric in metrics() if fnmatchcase(key, metric.key)), None)


def reference() -> str:
    """The page: a table a group."""
    lines = [HEAD]
    for group in dict.fromkeys(metric.group for metric in metrics()):
        lines += [f"## {group}", "", "| key | unit | meaning | normal | if not |", "| --- " * 5 + "|"]
        for m in metrics():
            if m.group == group:
                cells = (f"`{m.key}`", m.unit, m.meaning, m.normal, m.otherwise)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
