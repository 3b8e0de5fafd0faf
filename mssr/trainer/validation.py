"""Validation: responses to sets of prompts, each with its own frequency, sampling and scoring."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.data.dataset import PromptDataset
from mssr.data.encoder import PromptEncoder
from mssr.data.loading import LoadedPrompts, load_prompts
from mssr.data.validation_sets import ValidationSet, validation_sets
from mssr.rewards import Scorer
from mssr.rollout.seeds import request_seed
from mssr.trainer.collect import reward_inputs, score_metrics
from mssr.types import Rollout, RolloutRequest, SamplingParams


class PromptsOf(Protocol):
    """A set that is ready to be asked, and knows how its responses are scored."""

    @property
    def set(self) -> ValidationSet: ...
    @property
    def dataset(self) -> PromptDataset: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def ids(self, limit: int | None) -> list[str]:
        """The prompts to ask."""
        ...

    def score(self, rollouts: Sequence[Rollout], scorer: Scorer) -> tuple[np.ndarray, dict[str, float]]:
        """(B,) scores for the samples file; metrics without the set's name."""
        ...

    def summary(self) -> str: ...


@dataclass(frozen=True)
class OwnPrompts:
    """Rows in the form of the training's, scored by its reward."""

    set: ValidationSet
    loaded: LoadedPrompts

    @property
    def dataset(self) -> PromptDataset:
        return self.loaded.dataset

    @property
    def notes(self) -> tuple[str, ...]:
        return self.loaded.notes

    def ids(self, limit: int | None) -> list[str]:
        return self.dataset.ids[:limit]

    def score(self, rollouts: Sequence[Rollout], scorer: Scorer) -> tuple[np.ndarray, dict[str, float]]:
        scored = scorer.score(reward_inputs(self.dataset, rollouts, scorer.takes_cells))
        metrics = score_metrics("val", scored)
        metrics = {key.removeprefix("val/"): value for key, value in metrics.items()}
        # Of several sources, each by its own.
        right = scored.parts.get("accuracy", scored.scores)
        sources = np.array([self.dataset.source_of(r.prompt_id) for r in rollouts])
        labels = self.dataset.labels if len(self.dataset.labels) > 1 else []
        for label in labels:
            if (sources == label).any():
                metrics[f"{label}/accuracy"] = float(right[sources == label].mean())
        return scored.scores, metrics

    def summary(self) -> str:
        return self.loaded.summary()


class BenchmarkPrompts:
    """A benchmark, scored as `mssr eval` does; every item counts, those that cannot be asked as wrong."""

    def __init__(self, validation_set: ValidationSet, config: Config, encoder: PromptEncoder) -> None:
        from mssr.evaluation import registry
        from mssr.evaluation.prompts import write_prompts

        assert validation_set.benchmark is not None
        self.set = validation_set
        benchmark = registry.get(validation_set.benchmark)
        data_dir = Path(validation_set.data_dir) if validation_set.data_dir else None
        items = benchmark.load(data_dir, validation_set.limit or config.trainer.val_max_prompts)
        directory = validation_set.directory(config.run_dir)
        shutil.rmtree(directory, ignore_errors=True)
        self._questions, _ = write_prompts([(benchmark, items)], encoder, directory)
        self._benchmark, self._prefix = benchmark, encoder.response_prefix
        self._by_id = {validation_set.prefix + q.prompt_id: q for q in self._questions}
        self.dataset = validation_set.dataset(config.data, config.run_dir)
        self.notes = tuple(f"{q.benchmark.name}/{q.item.id}: {q.note}" for q in self._questions if q.note)

    def ids(self, limit: int | None) -> list[str]:
        return [i for i, question in self._by_id.items() if question.asked]

    def score(self, rollouts: Sequence[Rollout], scorer: Scorer) -> tuple[np.ndarray, dict[str, float]]:
        verdicts = [
            self._benchmark.verdict(
                self._by_id[r.prompt_id].item,
                self._prefix + r.text,
                r.finish_reason == "length",
                len(r.response_token_ids),
            )
            for r in rollouts
        ]
        scores = np.array([v.correct for v in verdicts], np.float32)
        unasked = sum(not q.asked for q in self._questions) * self.set.n
        metrics = {"accuracy": float(scores.sum()) / (len(scores) + unasked)}
        for status in ("extraction_failed", "truncated"):
            metrics[status] = sum(v.status == status for v in verdicts) / len(verdicts)
        return scores, metrics

    def summary(self) -> str:
        return f"{len(self._questions)} items"


def load_validation(config: Config, encoder: PromptEncoder, bad_rows_file: Path) -> list[PromptsOf]:
    """The sets of ``data.val``, ready to be asked.

    Raises:
        UserError: as `load_prompts`; or a benchmark's data are not there.
    """
    loaded: list[PromptsOf] = []
    for one in validation_sets(config.data.val):
        if one.benchmark is not None:
            loaded.append(BenchmarkPrompts(one, config, encoder))
            continue
        rule = config.reward.rule
        found = load_prompts(one.path, config.data, encoder, bad_rows_file, one.prefix, rule)
        loaded.append(OwnPrompts(one, found))
    return loaded


@dataclass(frozen=True, slots=True)
class Validated:
    """What one set gave."""

    prompts: PromptsOf
    rollouts: list[Rollout]
    scores: np.ndarray
    metrics: dict[str, float]
    """By their full names."""


class Validation:
    """Asks the sets that are due."""

    def __init__(self, config: Config, sets: Sequence[PromptsOf], scorer: Scorer, cluster: Cluster) -> None:
        self.config, self.sets = config, sets
        self._scorer, self._cluster = scorer, cluster

    def due(self, step: int) -> list[PromptsOf]:
        """The sets to ask after this step: where its frequency divides it, and all after the last."""
        trainer = self.config.trainer
        found = []
        for one in self.sets:
            every = trainer.val_every if one.set.every is None else one.set.every
            if every and (step % every == 0 or step == trainer.steps):
                found.append(one)
        return found

    def ask(self, prompts: PromptsOf) -> Validated:
        """Have responses generated and scored.

        Raises:
            StopRequestedError: see `Cluster.generate`.
        """
        one, rollout = prompts.set, self.config.rollout
        temperature = one.temperature or rollout.temperature
        params = SamplingParams(temperature, rollout.max_response_length, greedy=one.greedy)
        ids = prompts.ids(one.limit or self.config.trainer.val_max_prompts)
        requests = [
            # The same seeds each time, so that two validations differ by the policy alone.
            RolloutRequest(i, k, 0 if one.greedy else request_seed(self.config.seed, 0, i, k))
            for i in ids
            for k in range(one.n)
        ]
        rollouts = self._cluster.generate(requests, params)
        scores, metrics = prompts.score(rollouts, self._scorer)
        metrics["response_length"] = float(np.mean([len(r.response_token_ids) for r in rollouts]))
        if one.n > 1:
            metrics[f"pass_at_{one.n}"] = float((scores.reshape(-1, one.n) >= 1).any(axis=1).mean())
        named = {f"{one.key}/{key}": value for key, value in metrics.items()}
        if prompts is self.sets[0]:
            named |= {f"val/{key}": metrics[key] for key in ("accuracy", "response_length")}
        return Validated(prompts, rollouts, scores, named)


def describe(sets: Sequence[PromptsOf]) -> str:
    """For the user: what is validated on."""
    parts: list[Any] = [f"{s.set.name}: {s.summary()}" if s.set.name else s.summary() for s in sets]
    return "; ".join(parts) or "none"
