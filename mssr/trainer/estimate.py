"""Scores -> the batch that the actor trains on, and what the method learns from the step.

Everything here that outlives a step is in `state_dict`: the method's own state, an adaptive KL weight,
and the last visits of the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mssr import algorithms
from mssr.algorithms.kl_control import KLController
from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.errors import UserError
from mssr.trainer.batch import make_batch
from mssr.trainer.collect import Collected
from mssr.trainer.early_scores import ScoredTokens, split_scores
from mssr.trainer.last_visits import LastVisits
from mssr.trainer.timing import PhaseTimer
from mssr.types import Rollout, TrainBatch


class Estimator:
    """The method with what it needs from the actor.

    Each step: `batch`, then the actor's update, then `observe` with the update's metrics.
    """

    def __init__(self, config: Config, cluster: Cluster, timer: PhaseTimer) -> None:
        self.config = config
        self.cluster = cluster
        self.timer = timer
        self.algorithm = algorithms.create(config.algorithm.name, **config.estimator_options)
        kl = config.algorithm.kl
        self.kl = KLController(kl.coef, kl.target, kl.horizon)
        self.last_visits = LastVisits() if self.algorithm.kl_source == "last_visit" else None
        self._drift: np.ndarray | None = None

    def batch(self, collected: Collected) -> tuple[TrainBatch, dict[str, float]]:
        """What the actor trains on, with metrics of the signal.

        Raises:
            UserError: the method cannot use such rewards.
        """
        ids, scores, lengths = collected.prompt_ids, collected.scores, collected.lengths
        old, reference, penalties, metrics = self._before_update(collected)
        token_advantages = None
        try:
            if penalties is None:
                advantages, signal = self.algorithm.advantages(ids, scores, lengths)
            else:
                token_advantages, signal = self.algorithm.token_advantages(ids, scores, lengths, penalties)
                advantages = np.zeros(len(ids), np.float32)
        except ValueError as error:
            raise UserError(f"reward.name={self.config.reward.name}: {error}") from error
        batch = make_batch(
            collected.rollouts, advantages, token_advantages, old, reference, self._kl_coef_in_loss
        )
        return batch, metrics | signal

    def observe(self, collected: Collected, metrics: Mapping[str, float]) -> dict[str, float]:
        """Let the method and the KL weight learn from a step that is done.

        Args:
            metrics: of the update and of `batch`.
        """
        kl_source = self.algorithm.kl_source
        if kl_source == "last_visit":
            kl: Any = self._drift
        else:
            kl = metrics["policy/kl_update" if kl_source == "update" else "policy/kl_ref"]
        self.algorithm.observe(collected.prompt_ids, collected.scores, kl)
        result = self.algorithm.metrics()
        if self.config.algorithm.kl.coef > 0:
            result["policy/kl_coef"] = self.kl.coef
            self.kl.observe(metrics["policy/kl_ref"], len(collected.rollouts))
        return result

    def state_dict(self) -> dict[str, Any]:
        state = {"algorithm": self.algorithm.state_dict(), "kl": self.kl.state_dict()}
        if self.last_visits is not None:
            state["last_visits"] = self.last_visits.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ValueError: the state is of another method or version.
        """
        if ("last_visits" in state) != (self.last_visits is not None):
            raise ValueError("algorithm.discount.kl_source=last_visit needs, and only it has, last visits")
        self.algorithm.load_state_dict(state["algorithm"])
        self.kl.load_state_dict(state["kl"])
        if self.last_visits is not None:
            self.last_visits.load_state_dict(state["last_visits"])

    @property
    def _kl_coef_in_loss(self) -> float:
        return self.kl.coef if self.config.kl_in_loss else 0.0

    def _before_update(
        self, collected: Collected
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None, dict[str, float]]:
        """What must be known before the step: (N,) log-probs of the policy and of the reference, (N,) KL
        penalties of rewards, each where it is needed or known; metrics.

        One scoring pass serves both the KL in the reward and the previous responses of the prompts.
        """
        rollouts, early = collected.rollouts, collected.scored
        in_reward = self.config.kl_in_reward
        previous = self.last_visits.previous(rollouts) if self.last_visits is not None else {}
        now: list[Rollout] = []
        if early is None and (in_reward or self.last_visits is not None):
            now = rollouts
        to_score = [*now, *(_with_response(rollouts[i], tokens) for i, tokens in previous.items())]
        scored = self._score(to_score, reference=in_reward and early is None) if to_score else []
        early, again = (early or scored[: len(now)]), scored[len(now) :]
        if not early:
            return None, None, None, {}
        old = np.concatenate([x.policy for x in early])
        reference = None
        if early[0].reference is not None:
            reference = np.concatenate([x.reference for x in early if x.reference is not None])
        metrics: dict[str, float] = {}
        if self.last_visits is not None:
            visited = dict(zip(previous, (x.policy for x in again), strict=True))
            self._drift = self.last_visits.drift(rollouts, visited, self.algorithm.divergence)
            self.last_visits.remember(rollouts, [x.policy for x in early])
            known = self._drift[np.isfinite(self._drift)]
            metrics["baseline/drift"] = float(known.mean()) if len(known) else 0.0
        penalties = None
        if in_reward:
            assert reference is not None
            penalties, kl_ref = self._penalties(old, reference)
            metrics["policy/kl_ref"] = kl_ref
            reference = None  # the loss has no KL
        return old, reference, penalties, metrics

    def _score(self, rollouts: Sequence[Rollout], reference: bool) -> list[ScoredTokens]:
        with self.timer("score"):
            scored = self.cluster.log_probs(
                make_batch(rollouts, np.zeros(len(rollouts), np.float32)), reference=reference
            )
        return split_scores(scored, rollouts)

    def _penalties(self, old: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, float]:
        """(N,) penalty of each token's reward, and the mean k3."""
        import torch

        from mssr.algorithms.losses import kl_penalty

        pair = torch.from_numpy(old), torch.from_numpy(reference)
        estimator: Any = self.config.algorithm.kl.estimator
        penalty = self.kl.coef * kl_penalty(*pair, kind=estimator)
        return penalty.numpy(), float(kl_penalty(*pair, kind="k3").mean())


def _with_response(rollout: Rollout, tokens: np.ndarray) -> Rollout:
    """The same prompt with an earlier response; what the engine thought of it is unknown and unread."""
    return Rollout(
        prompt_id=rollout.prompt_id,
        sample_index=0,
        prompt_token_ids=rollout.prompt_token_ids,
        response_token_ids=tokens,
        log_probs=np.zeros(len(tokens), np.float32),
        finish_reason="stop",
        policy_version=rollout.policy_version,
        text="",
    )
