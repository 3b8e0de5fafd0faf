"""Scores -> the batch that the actor trains on, and what the method learns from the step.

Everything here that outlives a step is in `state_dict`: the method's own state, an adaptive KL weight,
the control of entropy, and the last visits of the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mssr import algorithms
from mssr.algorithms.entropy_control import EntropyController
from mssr.algorithms.kl_control import KLController
from mssr.algorithms.last_visits import LastVisits
from mssr.cluster.base import Cluster
from mssr.config import Config
from mssr.errors import UserError
from mssr.trainer.collect import Collected
from mssr.trainer.timing import PhaseTimer
from mssr.types import TokenLogProbs, TrainBatch


class Estimator:
    """The method with what it needs from the actor.

    Each step: `batch`, then the actor's update, then `observe` with the update's metrics.
    """

    def __init__(self, config: Config, cluster: Cluster, timer: PhaseTimer) -> None:
        self.config = config
        self.cluster = cluster
        self.timer = timer
        self.algorithm = algorithms.create(config.algorithm.name, config.choices, **config.estimator_options)
        kl = config.algorithm.kl
        self.kl = KLController(kl.coef, kl.target, kl.horizon)
        control = config.algorithm.entropy_control
        self.entropy = EntropyController(control.target, control.proportional, control.integral)
        self.last_visits = LastVisits() if self.algorithm.kl_source == "last_visit" else None
        self._drift: np.ndarray | None = None

    def batch(self, collected: Collected) -> tuple[TrainBatch, dict[str, float]]:
        """What the actor trains on, with metrics of the signal.

        Raises:
            UserError: the method cannot use such rewards.
        """
        known, metrics = self._log_probs(collected)
        batch = TrainBatch.of(collected.rollouts)
        step = collected.prompt_ids, collected.scores, batch.response_lengths
        try:
            if self.config.kl_in_reward:
                assert known is not None
                penalties, metrics["policy/kl_ref"] = self._penalties(known)
                known = replace(known, reference=None)  # the loss has no KL
                advantages, signal = self.algorithm.token_advantages(*step, penalties)
                batch = replace(batch, token_advantages=advantages)
            else:
                advantages, signal = self.algorithm.advantages(*step)
                batch = replace(batch, advantages=advantages)
        except ValueError as error:
            raise UserError(f"reward.name={self.config.reward.name}: {error}") from error
        if known is not None:
            batch = replace(batch, old_log_probs=known.policy, reference_log_probs=known.reference)
        kl_coef = self.kl.coef if self.config.kl_in_loss else 0.0
        return replace(batch, kl_coef=kl_coef, entropy_alpha=self.entropy.alpha), metrics | signal

    def expected(self, prompt_ids: Sequence[str]) -> np.ndarray | None:
        """(B,) what the method's Beta baseline holds of the prompts now; None for a method without one."""
        baseline = self.algorithm.baseline
        return None if baseline is None else baseline.values(prompt_ids)

    def observe(self, collected: Collected, metrics: Mapping[str, float]) -> dict[str, float]:
        """Let the method and the KL weight learn from a step; metrics are of `batch` and of the update."""
        kl_source = self.algorithm.kl_source
        key = "policy/kl_update" if kl_source == "update" else "policy/kl_ref"
        kl: Any = self._drift if kl_source == "last_visit" else metrics[key]
        self.algorithm.observe(collected.prompt_ids, collected.scores, kl)
        result = self.algorithm.metrics()
        if self.config.algorithm.kl.coef > 0:
            result["policy/kl_coef"] = self.kl.coef
            self.kl.observe(metrics["policy/kl_ref"], len(collected.rollouts))
        if self.entropy.target is not None:
            result["shaping/entropy_alpha"] = self.entropy.alpha
            self.entropy.observe(metrics["policy/entropy"])
        return result

    def state_dict(self) -> dict[str, Any]:
        state = {"algorithm": self.algorithm.state_dict(), "kl": self.kl.state_dict()}
        if self.entropy.target is not None:
            state["entropy"] = self.entropy.state_dict()
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
        if ("entropy" in state) != (self.entropy.target is not None):
            raise ValueError("algorithm.entropy_control.target needs, and only it has, the errors so far")
        self.algorithm.load_state_dict(state["algorithm"])
        self.kl.load_state_dict(state["kl"])
        if self.entropy.target is not None:
            self.entropy.load_state_dict(state["entropy"])
        if self.last_visits is not None:
            self.last_visits.load_state_dict(state["last_visits"])

    def _log_probs(self, collected: Collected) -> tuple[TokenLogProbs | None, dict[str, float]]:
        """Those of the step's rollouts before the update, where they are known or needed; metrics.

        One pass serves both the KL in the reward and the previous responses of the prompts.
        """
        rollouts, known, visits = collected.rollouts, collected.log_probs, self.last_visits
        previous = {
            i: replace(rollouts[i], response_token_ids=tokens, log_probs=log_probs)
            for i, (tokens, log_probs) in (visits.previous(collected.prompt_ids) if visits else {}).items()
        }
        needed = known is None and (self.config.kl_in_reward or visits is not None)
        asked = [*(rollouts if needed else []), *previous.values()]
        computed: list[TokenLogProbs] = []
        if asked:
            with self.timer("score"):
                found = self.cluster.log_probs(TrainBatch.of(asked), needed and self.config.kl_in_reward)
            computed = found.split(asked)
        if needed:
            known, computed = computed[: len(rollouts)], computed[len(rollouts) :]
        if known is None:
            return None, {}
        metrics: dict[str, float] = {}
        if visits is not None:
            now = {i: x.policy for i, x in zip(previous, computed, strict=True)}
            self._drift, metrics = visits.drift(collected.prompt_ids, now, self.algorithm.divergence)
            tokens = [r.response_token_ids for r in rollouts]
            visits.remember(collected.prompt_ids, tokens, [x.policy for x in known])
        return TokenLogProbs.join(known), metrics

    def _penalties(self, known: TokenLogProbs) -> tuple[np.ndarray, float]:
        """(N,) penalty of each token's reward, and the mean k3."""
        import torch

        from mssr.algorithms.losses import kl_penalty

        assert known.reference is not None
        pair = torch.from_numpy(known.policy), torch.from_numpy(known.reference)
        estimator: Any = self.config.algorithm.kl.estimator
        penalty = self.kl.coef * kl_penalty(*pair, kind=estimator)
        return penalty.numpy(), float(kl_penalty(*pair, kind="k3").mean())
