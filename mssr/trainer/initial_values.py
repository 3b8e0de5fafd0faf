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
from mssr.errors import TrainingError
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

    Raises:
        TrainingError: no response has a score.
    """
    n = algorithm.init_rollouts
    file = config.run_dir / FILE
    known = _known_scores(file, _fingerprint(config))
    ids = collector.dataset.ids
    missing = [i for i in ids if len(known.get(i, [])) != n]
    part = max(1, config.rollout.rollouts_per_step // n)
    for start in range(0, len(missing), part):
        if stop():
            return
        requests = collector.requests(missing[start : start + part], _STEP, n)
        rollouts, rewards, _ = collector.generate(requests)
        for k in range(0, len(rollouts), n):
            prompt_id, texts = rollouts[k].prompt_id, [r.text for r in rollouts[k : k + n]]
            known[prompt_id] = [s if s == s else None for s in rewards.scores[k : k + n].tolist()]
            append_record(file, {"id": prompt_id, "scores": known[prompt_id], "responses": texts})
        note(f"first values: {len(ids) - len(missing) + min(start + part, len(missing))}/{len(ids)} prompts")
    scores = {i: found for i in ids if (found := [s for s in known[i] if s is not None])}
    if not scores:
        raise TrainingError("first values: no response of the base model has a score; see events.jsonl")
    successes, trials = np.array([(sum(found), len(found)) for found in scores.values()]).T
    algorithm.initialize(list(scores), successes, trials)
    mean = successes.sum() / trials.sum()
    note(f"first values: mean reward of the base model {mean:.3f} ({len(ids)} prompts x {n})")


def _known_scores(file: Path, fingerprint: str) -> dict[str, list[float | None]]:
    """Scores by prompt, null for none; the first line of the file says what they depend on."""
    header = {"fingerprint": fingerprint}
    records = read_records(file, skip_damaged=True) if file.is_file() else []
    if records[:1] != [header]:
        if file.is_file():  # of another model, data set or reward: kept, but not used
            os.replace(file, file.with_suffix(".discarded.jsonl"))
        records = [header]
    replace_text(file, to_lines(records))  # without what a crash has cut off
    return {record["id"]: record["scores"] for record in records[1:]}


def _fingerprint(config: Config) -> str:
    """Of everything that decides responses and scores of the base model."""
    known = describe(Config)
    tree = {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if (option := nearest(known, key)) and option.first_values
    }
    files = [name.rpartition(":")[0] for name in config.reward.names if plugins.is_spec(name)]
    if files:
        tree["reward file"] = "".join(Path(file).read_text() for file in files)
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
