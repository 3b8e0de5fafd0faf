"""Prompts -> scored rollouts: one draw of prompts, or as many as dynamic sampling needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mssr.algorithms.step import group_indices
from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.data.dataset import PromptDataset
from mssr.data.sampler import PromptSampler
from mssr.errors import TrainingError
from mssr.rewards import RewardInput, ScoredBatch, Scorer, ScoringStream
from mssr.rollout.seeds import request_seed
from mssr.trainer.early_log_probs import EarlyLogProbs
from mssr.trainer.response_lengths import ResponseLengths
from mssr.trainer.timing import PhaseTimer
from mssr.types import PackedRollouts, Rollout, RolloutRequest, SamplingParams, TokenLogProbs


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
    log_probs: list[TokenLogProbs] | None = None
    """B, where the ranks computed them while other responses were generated."""

    @property
    def prompt_ids(self) -> list[str]:
        return [r.prompt_id for r in self.rollouts]

    def state_dict(self) -> dict[str, Any]:
        """As JSON values and arrays; without log-probs."""
        rest = {"scores": self.scores, "metrics": self.metrics, "epoch": self.epoch}
        return vars(PackedRollouts.of(self.rollouts)) | rest

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Collected:
        """The inverse of `state_dict`."""
        packed = PackedRollouts(**{f.name: state[f.name] for f in fields(PackedRollouts)})
        return cls(packed.unpack(), state["scores"], dict(state["metrics"]), state["epoch"])


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
        self.config, self.dataset, self.sampler = config, dataset, sampler
        self.scorer, self.cluster = scorer, cluster
        self.timer = PhaseTimer()
        self.lengths = ResponseLengths()
        self._early = computes_early(config, cluster)

    def draw(self) -> list[str]:
        """The prompts of the next step."""
        return self.sampler.next(self.config.prompts_per_step)

    def collect(self, step: int, prompt_ids: Sequence[str], stoppable: bool = True) -> Collected:
        """The rollouts of a step.

        Args:
            prompt_ids: what `draw` gave; dynamic sampling draws more itself.
            stoppable: as in `Cluster.generate`.

        Raises:
            TrainingError: dynamic sampling found too few groups with a signal, or too few responses have a
                score.
        """
        wanted, n = self.config.prompts_per_step, self.config.responses_per_prompt
        sampling = self.config.sampler
        rollouts: list[Rollout] = []
        log_probs: list[TokenLogProbs] = []
        rewards: list[ScoredBatch] = []
        while True:
            requests = self.requests(prompt_ids, step, n, rollouts)
            generated, found, early = self.generate(requests, self._early, stoppable)
            rollouts += generated
            rewards.append(found)
            log_probs += early or []
            scored = join_scores(rewards)
            kept = np.arange(len(rollouts))
            if sampling.dynamic:
                kept = with_signal(rollouts, scored.scores, wanted * n)
            missing = wanted - len(kept) // n
            if not missing:
                break
            if len(rewards) == sampling.max_draws:
                raise TrainingError(
                    f"step {step + 1}: after {len(rewards)} draws (sampler.max_draws) only "
                    f"{wanted - missing} of {wanted} prompts have responses with different rewards; the data "
                    "is too easy or too hard for this policy, or sampler.dynamic is to be off"
                )
            prompt_ids = self.sampler.next(missing)
        if scored.unscored.any():
            kept = self._with_scores(rollouts, scored, kept)
        self.lengths.observe(rollouts)
        metrics = rollout_metrics(rollouts, scored)
        metrics["rollout/policy_lag"] = float(np.mean([step - r.policy_version for r in rollouts]))
        if sampling.dynamic:
            metrics["sampler/draws"] = float(len(rewards))
            metrics["sampler/kept_fraction"] = len(kept) / len(rollouts)
        return Collected(
            [rollouts[i] for i in kept],
            scored.scores[kept],
            metrics,
            self.sampler.epoch,
            [log_probs[i] for i in kept] if self._early else None,
        )

    def _with_scores(self, rollouts: Sequence[Rollout], scored: ScoredBatch, kept: np.ndarray) -> np.ndarray:
        """Those of ``kept`` that have a score, of prompts with as many of them as the method compares.

        Raises:
            TrainingError: they are not enough for the updates of a step.
        """
        config, kept = self.config, kept[~scored.unscored[kept]]
        count = Counter(rollouts[i].prompt_id for i in kept)
        kept = kept[[count[rollouts[i].prompt_id] >= config.method.min_n for i in kept]]
        prompts = len({rollouts[i].prompt_id for i in kept})
        held = math.ceil(config.kl_probe_fraction * prompts) if config.holds_out else 0
        if len(kept) - held * config.responses_per_prompt < config.actor.updates_per_step:
            raise TrainingError(
                f"{scored.unscored.sum()} of {len(rollouts)} responses have no score, and the others are not "
                f"enough for actor.updates_per_step={config.actor.updates_per_step}; see events.jsonl"
            )
        return kept

    def requests(
        self, prompt_ids: Sequence[str], step: int, n: int, earlier: Iterable[Rollout] = ()
    ) -> list[RolloutRequest]:
        """``n`` requests for every prompt, next to one another.

        The seed of a response is a hash of (run seed, step, prompt, sample index), so a prompt that comes
        again, here or after ``earlier`` rollouts of the step, takes further sample indices and gets other
        responses.
        """
        taken = Counter(r.prompt_id for r in earlier)
        requests = []
        for i in prompt_ids:
            for k in range(taken[i], taken[i] + n):
                requests.append(RolloutRequest(i, k, request_seed(self.config.seed, step, i, k)))
            taken[i] += n
        return requests

    def generate(
        self, requests: Sequence[RolloutRequest], early: bool = False, stoppable: bool = True
    ) -> tuple[list[Rollout], ScoredBatch, list[TokenLogProbs] | None]:
        """A response to every request, each scored as soon as it has ended.

        Args:
            early: have the ranks compute log-probs meanwhile, see `mssr.trainer.early_log_probs`.
            stoppable: as in `Cluster.generate`.

        Returns:
            In the order of the requests: rollouts, their rewards, and their log-probs if ``early``.
        """
        prompt_ids = [r.prompt_id for r in requests]
        answers = self.dataset.answers(prompt_ids, self.scorer.takes_cells)
        # Engines begin with those that are likely to take longest.
        order = np.argsort(-self.lengths.expected(prompt_ids), kind="stable").tolist()
        sampling = SamplingParams(self.config.rollout.temperature, self.config.rollout.max_response_length)
        ahead: AbstractContextManager[EarlyLogProbs | None] = nullcontext()
        if early:
            ahead = EarlyLogProbs(self.cluster, order, self.config.needs_reference)
        with ScoringStream(self.scorer) as rewards, ahead as log_probs:

            def on_finished(place: int, rollout: Rollout) -> None:
                index = order[place]
                rewards.add(index, _reward_input(rollout, answers[index], self.dataset.response_prefix))
                if log_probs is not None:
                    log_probs.add(index, rollout)

            with self.timer("rollout"):
                ordered = self.cluster.generate(
                    [requests[i] for i in order], sampling, on_finished, stoppable
                )
            with self.timer("reward"):
                scored = rewards.result()
            with self.timer("score"):
                known = None if log_probs is None else log_probs.result()
        return [ordered[place] for place in np.argsort(order)], scored, known


def with_signal(rollouts: Sequence[Rollout], scores: np.ndarray, at_most: int) -> np.ndarray:
    """Indices of the rollouts of prompts whose (B,) scores differ, all of a prompt next to one another.

    A prompt that was drawn again has one group of all its responses, as for the estimators. Responses without
    a score (NaN) decide nothing, and stay in their group.

    Args:
        at_most: so many indices; a group that no longer fits as a whole is left out.
    """
    groups = group_indices([r.prompt_id for r in rollouts])
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    kept: list[int] = []
    for group in members:
        known = scores[group][~np.isnan(scores[group])]
        if (known != known[:1]).any() and len(kept) + len(group) <= at_most:
            kept += group.tolist()
    return np.array(kept, np.int64)


def computes_early(config: Config, cluster: Cluster) -> bool:
    """Whether the ranks compute log-probs while others are generated: where they may, and it is of use."""
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
    return RewardInput(rollout.text, answer, len(rollout.response_token_ids), rollout.prompt_id, prefix)


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


def mean_scores(scored: ScoredBatch) -> dict[str, float]:
    """``score`` is what is learned from; ``accuracy`` is the reward's part of that name, if any. What has no
    score counts in ``failed`` alone; where nothing has one, there is no mean."""
    parts = {"accuracy": scored.scores, "score": scored.scores} | scored.parts
    known = {name: values[~(scored.unscored | np.isnan(values))] for name, values in parts.items()}
    means = {name: float(values.mean()) for name, values in known.items() if len(values)}
    return means | {"failed": float(scored.unscored.sum())}


def rollout_metrics(rollouts: Sequence[Rollout], scored: ScoredBatch) -> dict[str, float]:
    """What was generated and how it scored."""
    lengths = np.array([len(r.response_token_ids) for r in rollouts])
    return {
        **{f"reward/{name}": value for name, value in mean_scores(scored).items()},
        "reward/errors": float(scored.errors),
        "reward/timeouts": float(scored.timeouts),
        "rollout/tokens": float(lengths.sum()),
        "rollout/prompt_tokens": float(sum(len(r.prompt_token_ids) for r in rollouts)),
        "rollout/response_length": float(lengths.mean()),
        "rollout/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in rollouts])),
    }
