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
from typing import Any

import numpy as np

from mssr.algorithms import Algorithm, plugins
from mssr.config import Config, flatten, to_dict
from mssr.trainer.collect import RolloutCollector

FILE = "init_rollouts.jsonl"
_STEP = -1
"""Seeds of this pass are those of a step that no training step has."""
_DEPENDS_ON = (
    "seed model. data. reward. algorithm.baseline.init_rollouts rollout.engine rollout.temperature "
    "rollout.max_response_length"
).split()
_INDEPENDENT_OF = (
    "data.val",
    "data.image_cache_gib",
    "data.max_bad_fraction",
    "data.shuffle",
    "reward.workers",
)


def initialize_values(
    config: Config,
    algorithm: Algorithm,
    collector: RolloutCollector,
    note: Callable[[str], None],
    stop: Callable[[], bool],
) -> bool:
    """Generate what is missing, then give every prompt its first value.

    Args:
        note: told how far it is.
        stop: asked between parts whether to stop.

    Returns:
        False if it was stopped; what was generated is in the file.
    """
    n = algorithm.init_rollouts
    cache = _Cache(config.run_dir / FILE, _fingerprint(config))
    ids = collector.dataset.ids
    missing = [i for i in ids if len(cache.scores.get(i, [])) != n]
    part = max(1, config.rollout.rollouts_per_step // n)
    for start in range(0, len(missing), part):
        if stop():
            return False
        found = collector.generate(collector.requests(missing[start : start + part], _STEP, n))
        scores = found.rewards.scores.tolist()
        for k in range(0, len(scores), n):
            group = found.rollouts[k : k + n]
            cache.add(group[0].prompt_id, [r.text for r in group], scores[k : k + n])
        note(f"first values: {len(ids) - len(missing) + min(start + part, len(missing))}/{len(ids)} prompts")
    successes = np.array([sum(cache.scores[i]) for i in ids])
    algorithm.initialize(ids, successes, np.full(len(ids), n))
    note(f"first values: mean reward of the base model {successes.mean() / n:.3f} ({len(ids)} prompts x {n})")
    return True


class _Cache:
    """init_rollouts.jsonl: a line that says what it depends on, then a line a prompt."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.scores: dict[str, list[float]] = {}
        self._path = path
        if path.is_file():
            self._read(fingerprint)
        if not path.is_file():
            path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n")

    def _read(self, fingerprint: str) -> None:
        lines = self._path.read_text().rstrip("\n").split("\n")
        records: list[dict[str, Any]] = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                break  # cut off by a crash; what follows it cannot be
        if not records or records[0].get("fingerprint") != fingerprint:
            # Another model, data set or reward: kept, but not used.
            os.replace(self._path, self._path.with_suffix(".discarded.jsonl"))
            return
        for record in records[1:]:
            self.scores[record["id"]] = record["scores"]
        if len(records) < len(lines):
            kept = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
            partial = self._path.with_suffix(".partial")
            partial.write_text(kept)
            os.replace(partial, self._path)

    def add(self, prompt_id: str, responses: list[str], scores: list[float]) -> None:
        record = {"id": prompt_id, "scores": scores, "responses": responses}
        with self._path.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.scores[prompt_id] = scores


def _fingerprint(config: Config) -> str:
    """Of everything that decides responses and scores of the base model."""
    tree = {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if key.startswith(tuple(_DEPENDS_ON)) and not key.startswith(_INDEPENDENT_OF)
    }
    if plugins.is_spec(config.reward.name):
        tree["reward file"] = Path(config.reward.name.rpartition(":")[0]).read_text()
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
