"""Validation: responses to sets of prompts, each with its own frequency, sampling and scoring."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.data.dataset import PromptDataset
from mssr.data.encoder import PromptEncoder
from mssr.data.loading import LoadedPrompts, load_prompts
from mssr.data.validation_sets import ValidationSet, validation_sets
from mssr.evaluation import registry
from mssr.evaluation.prompts import Question, write_prompts
from mssr.rewards import Scorer
from mssr.rollout.seeds import request_seed
from mssr.trainer.collect import mean_scores, reward_inputs
from mssr.types import Rollout, RolloutRequest, SamplingParams

Score = Callable[[Sequence[Rollout], Scorer], tuple[np.ndarray, np.ndarray, dict[str, float]]]
"""Rollouts -> (B,) scores for the samples file, (B,) accuracies, and metrics without the set's name."""


@dataclass(frozen=True)
class ValidationPrompts:
    """A set that is ready to be asked, and knows how its responses are scored."""

    set: ValidationSet
    dataset: PromptDataset
    ids: list[str]
    """Those that are asked."""
    score: Score
    summary: str
    notes: tuple[str, ...]
    """What the user should hear once of how they are read, or which cannot be asked as they are."""
    rows: LoadedPrompts | None = None
    """The rows of a set in the form of the training's; None of a benchmark."""


def load_validation(config: Config, encoder: PromptEncoder, bad_rows_file: Path) -> list[ValidationPrompts]:
    """The sets of ``data.val``, ready to be asked.

    Raises:
        UserError: as `load_prompts`; or a benchmark's data are not there.
    """
    found = []
    for one in validation_sets(config.data.val):
        limit = one.limit or config.trainer.val_max_prompts
        if one.benchmark is not None:
            found.append(_benchmark(one, limit, config, encoder))
            continue
        rows = load_prompts(
            one.path, config.data, encoder, bad_rows_file, one.prefix, by_rule=config.reward.rule
        )
        dataset = rows.dataset
        score = partial(_by_reward, dataset)
        ids = dataset.ids[:limit]
        found.append(ValidationPrompts(one, dataset, ids, score, rows.summary(), rows.notes, rows))
    return found


def _by_reward(
    dataset: PromptDataset, rollouts: Sequence[Rollout], scorer: Scorer
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """As the training's; of several sources, each by its own too."""
    scored = scorer.score(reward_inputs(dataset, rollouts, scorer.takes_cells))
    metrics = mean_scores(scored)
    right = scored.accuracies
    if len(dataset.labels) > 1:
        sources = np.array([dataset.source_of(r.prompt_id) for r in rollouts])
        for label in dataset.labels:
            if (asked := (sources == label) & ~np.isnan(right)).any():
                metrics[f"{label}/accuracy"] = float(right[asked].mean())
    return scored.scores, right, metrics


def _benchmark(
    one: ValidationSet, limit: int | None, config: Config, encoder: PromptEncoder
) -> ValidationPrompts:
    """Scored as `mssr eval` does; every item counts, those that cannot be asked as wrong."""
    assert one.benchmark is not None
    benchmark = registry.get(one.benchmark)
    items = benchmark.load(Path(one.data_dir) if one.data_dir else None, limit)
    directory = one.directory(config.run_dir)
    shutil.rmtree(directory, ignore_errors=True)
    questions, _ = write_prompts([(benchmark, items)], encoder, directory)
    asked = {one.prefix + q.prompt_id: q for q in questions if q.asked}
    return ValidationPrompts(
        one,
        one.dataset(config.data, config.run_dir),
        list(asked),
        partial(_by_benchmark, asked, one.n * (len(questions) - len(asked)), encoder.response_prefix),
        f"{len(questions)} items",
        tuple(f"{benchmark.name}/{q.item.id}: {q.note}" for q in questions if q.note),
    )


def _by_benchmark(
    questions: dict[str, Question], unasked: int, prefix: str, rollouts: Sequence[Rollout], scorer: Scorer
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """``unasked``: responses that are missing, since their items cannot be asked."""
    verdicts = []
    for r in rollouts:
        question, cut = questions[r.prompt_id], r.finish_reason == "length"
        verdicts.append(question.benchmark.verdict(question.item, prefix + r.text, cut))
    scores = np.array([v.correct for v in verdicts], np.float32)
    metrics = {"accuracy": float(scores.sum()) / (len(scores) + unasked)}
    for status in ("extraction_failed", "truncated"):
        metrics[status] = sum(v.status == status for v in verdicts) / len(verdicts)
    return scores, scores, metrics


class Validation:
    """Asks the sets that are due."""

    def __init__(
        self, config: Config, sets: Sequence[ValidationPrompts], scorer: Scorer, cluster: Cluster
    ) -> None:
        self.config, self.sets = config, sets
        self._scorer, self._cluster = scorer, cluster

    def due(self, step: int) -> list[ValidationPrompts]:
        """The sets to ask after this step: where its frequency divides it, and all after the last."""
        trainer = self.config.trainer

        def is_due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == trainer.steps)

        return [s for s in self.sets if is_due(trainer.val_every if s.set.every is None else s.set.every)]

    def ask(self, prompts: ValidationPrompts) -> tuple[list[Rollout], np.ndarray, dict[str, float]]:
        """Have responses generated and scored: rollouts, their (B,) scores, and metrics by their full names.

        Raises:
            StopRequestedError: see `Cluster.generate`.
        """
        one, rollout = prompts.set, self.config.rollout
        temperature = one.temperature or rollout.temperature
        params = SamplingParams(temperature, rollout.max_response_length, greedy=one.greedy)
        requests = [
            # The same seeds each time, so that two validations differ by the policy alone.
            RolloutRequest(i, k, 0 if one.greedy else request_seed(self.config.seed, 0, i, k))
            for i in prompts.ids
            for k in range(one.n)
        ]
        rollouts = self._cluster.generate(requests, params)
        scores, right, metrics = prompts.score(rollouts, self._scorer)
        metrics["response_length"] = float(np.mean([len(r.response_token_ids) for r in rollouts]))
        if one.n > 1:
            by_prompt = right.reshape(-1, one.n)
            known = by_prompt[~np.isnan(by_prompt).all(axis=1)]
            metrics[f"pass_at_{one.n}"] = float((known >= 1).any(axis=1).mean()) if len(known) else math.nan
        named = {f"{one.key}/{key}": value for key, value in metrics.items()}
        if prompts is self.sets[0]:
            named |= {f"val/{k}": metrics[k] for k in ("accuracy", "response_length") if k in metrics}
        return rollouts, scores, named


def describe(sets: Sequence[ValidationPrompts]) -> str:
    """For the user: what is validated on."""
    return "; ".join(f"{s.set.name}: {s.summary}" if s.set.name else s.summary for s in sets) or "none"
