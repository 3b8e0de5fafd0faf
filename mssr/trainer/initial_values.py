"""``algorithm.baseline.init_rollouts``: responses of the base model that give prompts their first values.

Every training prompt gets its responses, none is left out. They are appended to init_rollouts.jsonl as
they come, so that a start that was interrupted goes on where it stopped, and a later one reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mssr.algorithms import Algorithm, plugins
from mssr.config import Config, flatten, to_dict
from mssr.config.options import describe, nearest
from mssr.models.files import replace_text
from mssr.runs.jsonl import append_record, read_records, to_lines
from mssr.trainer.collect import RolloutCollector

FILE = "init_rollouts.jsonl"
_STEP = -1
"""Seeds of this pass are those of a step that no training step has."""


def initialize_values(
    config: Config,
    algorithm: Algorithm,
    collector: RolloutCollector,
    note: Callable[[str], None],
    stop: Callable[[], bool],
) -> None:
    """Generate what is missing, then give every prompt its first value.

    Args:
        note: told how far it is.
        stop: asked between parts whether to stop; what was generated stays in the file.
    """
    n = algorithm.init_rollouts
    cache = _Cache(config.run_dir / FILE, _fingerprint(config))
    ids = collector.dataset.ids
    missing = [i for i in ids if len(cache.scores.get(i, [])) != n]
    part = max(1, config.rollout.rollouts_per_step // n)
    for start in range(0, len(missing), part):
        if stop():
            return
        found = collector.generate(collector.requests(missing[start : start + part], _STEP, n))
        scores = found.rewards.scores.tolist()
        for k in range(0, len(scores), n):
            group = found.rollouts[k : k + n]
            cache.add(group[0].prompt_id, [r.text for r in group], scores[k : k + n])
        note(f"first values: {len(ids) - len(missing) + min(start + part, len(missing))}/{len(ids)} prompts")
    successes = np.array([sum(cache.scores[i]) for i in ids])
    algorithm.initialize(ids, successes, np.full(len(ids), n))
    note(f"first values: mean reward of the base model {successes.mean() / n:.3f} ({len(ids)} prompts x {n})")


class _Cache:
    """init_rollouts.jsonl: a line that says what it depends on, then a line a prompt."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.scores: dict[str, list[float]] = {}
        self._path = path
        header = {"fingerprint": fingerprint}
        records = read_records(path, skip_damaged=True) if path.is_file() else []
        if records[:1] != [header]:
            if path.is_file():  # of another model, data set or reward: kept, but not used
                os.replace(path, path.with_suffix(".discarded.jsonl"))
            records = [header]
        for record in records[1:]:
            self.scores[record["id"]] = record["scores"]
        replace_text(path, to_lines(records))  # without what a crash has cut off

    def add(self, prompt_id: str, responses: list[str], scores: list[float]) -> None:
        append_record(self._path, {"id": prompt_id, "scores": scores, "responses": responses})
        self.scores[prompt_id] = scores


def _fingerprint(config: Config) -> str:
    """Of everything that decides responses and scores of the base model."""
    known = describe(Config)
    tree = {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if (option := nearest(known, key)) and option.first_values
    }
    if plugins.is_spec(config.reward.name):
        tree["reward file"] = Path(config.reward.name.rpartition(":")[0]).read_text()
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
