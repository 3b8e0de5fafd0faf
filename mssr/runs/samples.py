"""Which responses a run records for its report, and reading them back.

``chosen`` in a line of a samples file says why the report shows it: ``best`` and ``worst`` of its step,
``changed`` (the verdict is another than at the validation before), or ``followed``. Followed are the prompts
with the smallest hashes, so that the same ones come again at every visit and no state says which.
"""

from __future__ import annotations

import html
import zlib
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mssr.runs.html import cut, data_uri
from mssr.runs.jsonl import read_records

TRAIN, EXTREMES = 16, 4
"""Rollouts recorded of a step; of these the best and worst, so many each."""
FOLLOWED, CHANGED = 32, 8
"""Validation prompts that are followed; and others whose verdict changed, so many in each direction."""
IMAGE_SIDE = 256
"""Longest side of a recorded image in pixels."""
MOST_CHARACTERS, MOST_BYTES = 3000, 7_500_000
"""Of a text in the report; and of all samples there: older ones stay in their files."""
ROW_BYTES = 600
"""What a sample takes beside its texts, roughly."""


def choose_train(prompt_ids: Sequence[str], scores: np.ndarray, advantages: np.ndarray) -> dict[int, str]:
    """Index -> why, in the order of the step: extremes by score, then advantage, and followed prompts.

    Args:
        scores, advantages: (B,) of the rollouts.
    """
    order = np.lexsort((advantages, scores)).tolist()
    extremes = min(EXTREMES, len(order) // 2)
    chosen = dict.fromkeys(order[len(order) - extremes :], "best") | dict.fromkeys(order[:extremes], "worst")
    for index in sorted(range(len(order)), key=lambda i: (_hash(prompt_ids[i]), i)):
        if len(chosen) == TRAIN:
            break
        chosen.setdefault(index, "followed")
    return dict(sorted(chosen.items()))


def choose_validation(
    prompt_ids: Sequence[str], scores: np.ndarray, earlier: Mapping[str, float | None]
) -> dict[int, str]:
    """Index -> why, of the first response to each prompt.

    Args:
        scores: (B,), NaN where there is none.
        earlier: score of the first response to a prompt at the validation before.
    """
    firsts: dict[str, int] = {}
    for index, prompt_id in enumerate(prompt_ids):
        firsts.setdefault(prompt_id, index)
    ordered = sorted(firsts, key=_hash)
    chosen = {firsts[i]: "followed" for i in ordered[:FOLLOWED]}
    changes: dict[bool, list[int]] = {True: [], False: []}
    for prompt_id in ordered[FOLLOWED:]:
        before, now = earlier.get(prompt_id), scores[firsts[prompt_id]]
        if before is not None and not np.isnan(now) and (before > 0) != (now > 0):
            changes[bool(now > 0)].append(firsts[prompt_id])
    chosen |= dict.fromkeys([*changes[True][:CHANGED], *changes[False][:CHANGED]], "changed")
    return dict(sorted(chosen.items()))


def earlier_scores(run_dir: Path, split: str, step: int) -> dict[str, float | None]:
    """Prompt -> score of its first response, in the last samples of a split before a step."""
    found: dict[str, float | None] = {}
    for path in sorted((run_dir / "samples").glob("step-*.jsonl"), reverse=True):
        if step_of(path) < step and not found:
            for record in read_records(path, skip_damaged=True):
                if record["split"] == split:
                    found.setdefault(record["id"], record["score"])
    return found


def samples_file(run_dir: Path, step: int) -> Path:
    return run_dir / "samples" / f"step-{step:06d}.jsonl"


def step_of(path: Path) -> int:
    """The inverse of `samples_file`."""
    return int(path.stem.removeprefix("step-"))


def recorded_prompts(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """The prompts of the report, those with most visits first, and how many older samples are left out.

    A prompt has its images as addresses, and its visits by step: score, verdict (``right``, ``wrong`` or
    ``no score``), whether that is another than at the visit before, and what the samples file says.
    """
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    room, left_out = MOST_BYTES, 0
    for path in sorted((run_dir / "samples").glob("step-*.jsonl"), reverse=True):
        records = read_records(path, skip_damaged=True)
        # Up to version 0.2 samples did not say.
        for record in reversed([r for r in records if "chosen" in r] or records[:TRAIN]):
            key = record["split"], record["id"]
            visit = {"chosen": ""} | record | {"step": step_of(path)}
            visit |= {k: cut(str(record[k]), MOST_CHARACTERS) for k in ("question", "response")}
            prompt = prompts.get(key) or visit | {"images": _addresses(run_dir, record), "visits": []}
            new = [] if key in prompts else [visit["question"], *prompt["images"]]
            room -= ROW_BYTES + sum(len(html.escape(text).encode()) for text in (visit["response"], *new))
            if room < 0:
                left_out += 1
            else:
                prompts.setdefault(key, prompt)["visits"].insert(0, visit)
    for prompt in prompts.values():
        _add_verdicts(prompt["visits"])
    return sorted(prompts.values(), key=lambda p: (-len(p["visits"]), p["split"], p["id"])), left_out


def _add_verdicts(visits: Sequence[dict[str, Any]]) -> None:
    before: set[str] = set()
    for _, responses in groupby(visits, key=lambda visit: visit["step"]):
        now = list(responses)  # several in a step say nothing of a change
        for visit in now:
            score = visit["score"]
            visit["verdict"] = "no score" if score is None else "right" if score > 0 else "wrong"
            differs = bool(before) and visit["verdict"] not in before
            visit["changed"] = differs or visit["chosen"] == "changed"
        before = {visit["verdict"] for visit in now}


def _addresses(run_dir: Path, record: Mapping[str, Any]) -> list[str]:
    files = [run_dir / name for name in record.get("images", ())]
    return [data_uri(file.read_bytes(), "jpeg") for file in files if file.is_file()]


def _hash(prompt_id: str) -> int:
    return zlib.crc32(prompt_id.encode())
