"""samples/step-000010.jsonl: questions, responses and scores of a step, of training and validation sets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mssr.runs.jsonl import read_records, to_lines


def write_samples(path: Path, samples: Iterable[dict[str, Any]], split: str) -> None:
    """Put a split's samples into a step's file, beside the other splits'.

    A step that is computed again after a resume replaces its own.
    """
    others = [x for x in read_records(path) if x["split"] != split] if path.is_file() else []
    path.write_text(to_lines([*others, *samples]), encoding="utf-8")


def last_samples(run_dir: Path, split: str) -> tuple[str, list[dict[str, Any]]]:
    """Name of the last step that has some of a split, and these."""
    for path in sorted((run_dir / "samples").glob("step-*.jsonl"), reverse=True):
        samples = [x for x in read_records(path) if x["split"] == split]
        if samples:
            return path.stem, samples
    return "", []
