"""Prompts -> scored rollouts: one draw of prompts, or as many as dynamic sampling needs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mssr.algorithms.advantages import constant_groups
from mssr.algorithms.base import group_indices
from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.data.dataset import PromptDataset
from mssr.data.sampler import PromptSampler
from mssr.errors import TrainingError
from mssr.rewards import RewardInput, ScoredBatch, Scorer, ScoringStream
from mssr.rollout.seeds import request_seed
from mssr.trainer.early_scores import EarlyScores, ScoredTokens
from mssr.trainer.response_lengths import ResponseLengths
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
    epoch: float
    """Passes over the data up to and with these rollouts, those left out included."""
    scored: list[ScoredTokens] | None = None
    """B, where the ranks scored the responses while others were generated."""

    @property
    def prompt_ids(self) -> list[str]:
        return [r.prompt_id for r in self.rollouts]

    @property
    def lengths(self) -> np.ndarray:
        """(B,) response tokens."""
        return np.array([len(r.response_token_ids) for r in self.rollouts])


class RolloutCollector:
    """Draws prompts, has responses generated, and scores them as they end.

    Its `timer` is its own, because it may work in another thread than the rest of the step.
    """

    def __init__(
        self,
        config: Config,
        dataset: PromptDataset,
        sampler: PromptSampler,
        scorer: Scorer,
        cluster: Cluster,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.sampler = sampler
        self.scorer = scorer
        self.cluster = cluster
        self.timer = PhaseTimer()
        self.lengths = ResponseLengths()
        self._scores_early = scores_early(config, cluster)

    def draw(self) -> list[str]:
        """The prompts of the next step."""
        return self.sampler.next(self.config.prompts_per_step)

    def upcoming(self) -> list[str]:
        """The prompts that `draw` would give now. What is learned until then may change some of them, where
        the sampler goes by that."""
        state = self.sampler.state_dict()
        prompt_ids = self.draw()
        self.sampler.load_state_dict(state)
        return prompt_ids

    def collect(self, step: int, prompt_ids: Sequence[str], stoppable: bool = True) -> Collected:
        """The rollouts of a step.

        Args:
            prompt_ids: what `draw` gave; dynamic sampling draws more itself.
            stoppable: as in `Cluster.generate`.

        Raises:
            TrainingError: dynamic sampling found too few groups with a signal.
        """
        wanted, n = self.config.prompts_per_step, self.config.responses_per_prompt
        dynamic = self.config.sampler.dynamic
        rollouts: list[Rollout] = []
        early: list[ScoredTokens] = []
        draws: list[ScoredBatch] = []
        kept: np.ndarray = np.empty(0, np.int64)
        occurrences: Counter[str] = Counter()
        for _ in range(self.config.sampler.max_draws if dynamic else 1):
            if rollouts:
                prompt_ids = self.sampler.next(wanted - len(kept) // n)
            drawn, scored, scored_early = self.generate(
                prompt_ids, step, n, occurrences, self._scores_early, stoppable
            )
            rollouts += drawn
            early += scored_early
            draws.append(scored)
            kept = np.arange(len(rollouts))
            if dynamic:
                kept = with_signal(rollouts, join_scores(draws).scores, wanted * n)
            if len(kept) == wanted * n:
                break
        else:
            raise TrainingError(
                f"step {step + 1}: after {len(draws)} draws (sampler.max_draws) only {len(kept) // n} of "
                f"{wanted} prompts have responses with different rewards; the data is too easy or too hard "
                "for this policy, or sampler.dynamic is to be off"
            )
        self.lengths.observe(rollouts)
        everything = join_scores(draws)
        metrics = rollout_metrics(rollouts, everything)
        metrics["rollout/policy_lag"] = float(np.mean([step - r.policy_version for r in rollouts]))
        if dynamic:
            metrics["sampler/draws"] = float(len(draws))
            metrics["sampler/kept_fraction"] = len(kept) / len(rollouts)
        return Collected(
            [rollouts[i] for i in kept],
            everything.scores[kept],
            metrics,
            self.sampler.epoch,
            [early[i] for i in kept] if self._scores_early else None,
        )

    def generate(
        self,
        prompt_ids: Sequence[str],
        step: int,
        n: int,
        occurrences: Counter[str] | None = None,
        scores_early: bool = False,
        stoppable: bool = True,
    ) -> tuple[list[Rollout], ScoredBatch, list[ScoredTokens]]:
        """``n`` responses to every prompt, next to one another, with their scores.

        Args:
            occurrences: how often the step drew each prompt before; counted on. The seed of a response
                is a hash of (run seed, step, prompt, sample index), so a prompt that comes again takes
                further sample indices and gets other responses.
            scores_early: have the ranks score them too, see `mssr.trainer.early_scores`; else the last
                result is empty.
            stoppable: as in `Cluster.generate`.
        """
        requests = self._requests(prompt_ids, step, n, Counter() if occurrences is None else occurrences)
        # Engines begin with those that are likely to take longest.
        expected = self.lengths.expected([r.prompt_id for r in requests])
        order = np.argsort(-expected, kind="stable").tolist()
        rollout = self.config.rollout
        params = SamplingParams(rollout.temperature, rollout.max_response_length)
        answers = self.dataset.answers([r.prompt_id for r in requests], self.scorer.takes_cells)
        with contextlib.ExitStack() as stack:
            rewards = stack.enter_context(ScoringStream(self.scorer))
            early = None
            if scores_early:
                reference = self.config.needs_reference
                early = stack.enter_context(EarlyScores(self.cluster, order, reference))

            def on_finished(place: int, response: Rollout) -> None:
                index = order[place]
                rewards.add(index, _reward_input(response, answers[index], self.dataset.response_prefix))
                if early is not None:
                    early.add(index, response)

            with self.timer("rollout"):
                ordered = self.cluster.generate([requests[i] for i in order], params, on_finished, stoppable)
            with self.timer("reward"):
                scored = rewards.result()
            with self.timer("score"):
                scored_early = early.result() if early is not None else []
        rollouts = dict(zip(order, ordered, strict=True))
        return [rollouts[i] for i in range(len(order))], scored, scored_early

    def _requests(
        self, prompt_ids: Sequence[str], step: int, n: int, occurrences: Counter[str]
    ) -> list[RolloutRequest]:
        requests = []
        for i in prompt_ids:
            first = occurrences[i] * n
            occurrences[i] += 1
            requests += [
                RolloutRequest(i, k, request_seed(self.config.seed, step, i, k))
                for k in range(first, first + n)
            ]
        return requests


def with_signal(rollouts: Sequence[Rollout], scores: np.ndarray, at_most: int) -> np.ndarray:
    """Indices of the rollouts of prompts whose scores differ, all of a prompt next to one another.

    A prompt that was drawn again has one group of all its responses, as for the estimators.

    Args:
        scores: (B,) of the rollouts.
        at_most: so many indices; a group that no longer fits as a whole is left out.
    """
    groups = group_indices([r.prompt_id for r in rollouts])
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    constant = constant_groups(scores, groups)
    kept: list[int] = []
    for group in members:
        if not constant[group[0]] and len(kept) + len(group) <= at_most:
            kept += group.tolist()
    return np.array(kept, np.int64)


def scores_early(config: Config, cluster: Cluster) -> bool:
    """Whether the ranks score responses while others are generated: where they may, and it is of use."""
    wanted = config.actor.score_early
    of_use = config.needs_reference or config.actor.updates_per_step > 1
    if wanted == "auto":
        return of_use and not config.rollout.lag and cluster.ranks_idle_in_rollout
    return of_use and wanted == "always"


def reward_inputs(
    dataset: PromptDataset, rollouts: Sequence[Rollout], takes_cells: bool
) -> list[RewardInput]:
    """What the reward sees of the rollouts; see `Scorer.takes_cells`."""
    answers = dataset.answers([r.prompt_id for r in rollouts], takes_cells)
    prefix = dataset.response_prefix
    return [_reward_input(r, answer, prefix) for r, answer in zip(rollouts, answers, strict=True)]


def _reward_input(rollout: Rollout, answer: Any, prefix: str) -> RewardInput:
    return RewardInput(prefix + rollout.text, answer, len(rollout.response_token_ids), rollout.prompt_id)


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
