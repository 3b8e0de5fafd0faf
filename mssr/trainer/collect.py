"""Prompts -> scored rollouts: one draw of prompts, or as many as dynamic sampling needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mssr.algorithms.advantages import constant_groups
from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.data.dataset import PromptDataset
from mssr.data.sampler import PromptSampler
from mssr.errors import TrainingError
from mssr.rewards import RewardInput, ScoredBatch, Scorer
from mssr.rollout.seeds import request_seed
from mssr.trainer.timing import PhaseTimer
from mssr.types import Rollout, RolloutRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Collected:
    """What a step trains on."""

    rollouts: list[Rollout]
    """B rollouts, the n of a prompt next to one another."""
    scores: np.ndarray
    """(B,) float32."""
    metrics: dict[str, float]
    """Over all rollouts that were generated, those that dynamic sampling left out included."""

    @property
    def prompt_ids(self) -> list[str]:
        return [r.prompt_id for r in self.rollouts]

    @property
    def lengths(self) -> np.ndarray:
        """(B,) response tokens."""
        return np.array([len(r.response_token_ids) for r in self.rollouts])


class RolloutCollector:
    """Draws prompts, has responses generated, and scores them."""

    def __init__(
        self,
        config: Config,
        dataset: PromptDataset,
        sampler: PromptSampler,
        scorer: Scorer,
        cluster: Cluster,
        timer: PhaseTimer,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.sampler = sampler
        self.scorer = scorer
        self.cluster = cluster
        self.timer = timer

    def collect(self, step: int) -> Collected:
        """The rollouts of a step.

        Raises:
            TrainingError: dynamic sampling found too few groups with a signal.
        """
        wanted, n = self.config.prompts_per_step, self.config.responses_per_prompt
        dynamic = self.config.sampler.dynamic
        rollouts: list[Rollout] = []
        draws: list[ScoredBatch] = []
        kept = np.empty(0, np.int64)
        occurrences: Counter[str] = Counter()
        for _ in range(self.config.sampler.max_draws if dynamic else 1):
            drawn = self.generate(self.sampler.next(wanted - len(kept) // n), step, n, occurrences)
            scored = self.score(self.dataset, drawn)
            groups = np.arange(len(drawn)) // n
            live = ~constant_groups(scored.scores, groups) if dynamic else np.ones(len(drawn), bool)
            kept = np.concatenate([kept, len(rollouts) + np.flatnonzero(live)])
            rollouts += drawn
            draws.append(scored)
            if len(kept) == wanted * n:
                break
        else:
            raise TrainingError(
                f"step {step + 1}: after {len(draws)} draws (sampler.max_draws) only {len(kept) // n} of "
                f"{wanted} prompts have responses with different rewards; the data is too easy or too hard "
                "for this policy, or sampler.dynamic is to be off"
            )
        everything = join_scores(draws)
        metrics = rollout_metrics(rollouts, everything)
        if dynamic:
            metrics["sampler/draws"] = float(len(draws))
            metrics["sampler/kept_fraction"] = len(kept) / len(rollouts)
        return Collected([rollouts[i] for i in kept], everything.scores[kept], metrics)

    def generate(
        self, prompt_ids: Sequence[str], step: int, n: int, occurrences: Counter[str] | None = None
    ) -> list[Rollout]:
        """``n`` responses to every prompt, next to one another.

        Args:
            occurrences: how often the step drew each prompt before; counted on. The seed of a response
                is a hash of (run seed, step, prompt, sample index), so a prompt that comes again takes
                further sample indices and gets other responses.
        """
        occurrences = Counter() if occurrences is None else occurrences
        requests = []
        for i in prompt_ids:
            first = occurrences[i] * n
            occurrences[i] += 1
            requests += [
                RolloutRequest(i, k, request_seed(self.config.seed, step, i, k))
                for k in range(first, first + n)
            ]
        rollout = self.config.rollout
        with self.timer("rollout"):
            return self.cluster.generate(
                requests, SamplingParams(rollout.temperature, rollout.max_response_length)
            )

    def score(self, dataset: PromptDataset, rollouts: Sequence[Rollout]) -> ScoredBatch:
        with self.timer("reward"):
            return self.scorer.score(reward_inputs(dataset, rollouts))


def reward_inputs(dataset: PromptDataset, rollouts: Sequence[Rollout]) -> list[RewardInput]:
    """What the reward sees of the rollouts."""
    answers = dataset.answers([r.prompt_id for r in rollouts])
    return [
        RewardInput(r.text, answer, len(r.response_token_ids))
        for r, answer in zip(rollouts, answers, strict=True)
    ]


def join_scores(batches: Sequence[ScoredBatch]) -> ScoredBatch:
    """Batches one after the other; 0 for a part that one of them has not."""
    names = sorted({name for batch in batches for name in batch.parts})
    return ScoredBatch(
        scores=np.concatenate([b.scores for b in batches]),
        parts={
            name: np.concatenate([b.parts.get(name, np.zeros_like(b.scores)) for b in batches])
            for name in names
        },
        errors=sum(b.errors for b in batches),
        timeouts=sum(b.timeouts for b in batches),
    )


def score_metrics(prefix: str, scored: ScoredBatch) -> dict[str, float]:
    """Means: ``score`` is what is learned from; ``accuracy`` is the reward's part of that name, if any."""
    parts = {"accuracy": scored.scores, "score": scored.scores} | scored.parts
    return {f"{prefix}/{name}": float(values.mean()) for name, values in parts.items()}


def rollout_metrics(rollouts: Sequence[Rollout], scored: ScoredBatch) -> dict[str, float]:
    """What was generated and how it scored."""
    lengths = np.array([len(r.response_token_ids) for r in rollouts])
    return {
        **score_metrics("reward", scored),
        "reward/errors": float(scored.errors),
        "reward/timeouts": float(scored.timeouts),
        "rollout/tokens": float(lengths.sum()),
        "rollout/response_length": float(lengths.mean()),
        "rollout/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }
