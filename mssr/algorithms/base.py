"""What the driver asks of a method: advantages before an update, observation after it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.step import FloatVector, Step, per_token
from mssr.errors import check_version

Signal = tuple[FloatVector, dict[str, float]]
"""Advantages, and the metrics of the step."""
_STATE_VERSION = 1


class Algorithm(ABC):
    """One estimator. The driver calls, each step::

        advantages, metrics = algorithm.advantages(prompt_ids, rewards, lengths)
        ...                                        # the actor's update, which measures kl
        algorithm.observe(prompt_ids, rewards, kl)

    With KL in the reward it calls `token_advantages` in place of `advantages`.

    A subclass takes its own options as keyword arguments with defaults and calls
    ``@register("name")``, or is given as ``path/to/file.py:Class``. If it keeps state, it names the
    attributes that hold it in `state`, and saving and loading follow.
    """

    state: tuple[str, ...] = ()
    """Attributes that a step changes, numbers or arrays: what a resumed run needs."""
    name: str = ""
    """Its name in the registry, set by ``register``; of a class from a file, ``path/to/file.py:Class``."""
    default_n: int = 1
    """Responses for each prompt unless the user says otherwise."""
    min_n: int = 1
    """Fewest responses for each prompt: 2 for a method that compares those of a prompt."""
    shapes_entropy: bool = False
    """Whether entropy shaping (`mssr.algorithms.shaping`) is on unless the user says otherwise."""
    aggregation: str | None = None
    """The loss aggregation that the method is defined with; None for the policy loss's own."""
    default_loss: str = "ppo"
    """The policy loss unless the user says otherwise."""
    default_sampler: str = "epochs"
    """How prompts are drawn unless the user says otherwise: "epochs" or "uncertainty"."""
    bounded_rewards: bool = False
    """Whether rewards must be in [0, 1]. KL then cannot be in the reward."""
    kl_source: str = "update"
    """The KL that `observe` is to be given: "update" (policies before and after the step), "reference"
    (policy and frozen base model), or "last_visit" (how far the policy has moved on a prompt's previous
    response since it was given: a number for each response)."""
    divergence: Literal["k3", "abs"] = "k3"
    """How "last_visit" measures: token mean of "k3", an estimate of KL(then || now), or of "abs", the
    change of a log-prob."""
    init_rollouts: int = 0
    """Responses for each prompt that `initialize` is to be told of before the first step."""
    baseline: BetaBaseline | None = None
    """The estimate of each prompt's chance of success, where the method keeps one."""

    @abstractmethod
    def advantages(self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Signal:
        """The learning signal of one step; changes no state.

        Args:
            prompt_ids: B prompt ids; equal ids are responses to one prompt.
            rewards: (B,) of the responses.
            lengths: (B,) response lengths in tokens.

        Returns:
            (B,) float32 advantages and metrics: ``advantage/std``, ``advantage/degenerate_fraction``
            (the part of the rollouts without signal), and ``baseline/unseen_fraction`` where there is
            a baseline.

        Raises:
            ValueError: A reward is not in [0, 1] where they are bounded, or the method cannot use the batch.
        """

    def token_advantages(
        self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike, token_penalties: ArrayLike
    ) -> Signal:
        """`advantages` of the tokens, with a penalty for each in the reward; changes no state.

        A method without a form of its own subtracts a response's penalties from its reward and gives
        each of its tokens the same advantage.

        Args:
            token_penalties: (N,) of the tokens, responses end to end, N the sum of ``lengths``;
                multiplied by their coefficient already.

        Returns:
            (N,) float32 advantages, and the metrics of `advantages`.

        Raises:
            ValueError: As `advantages`; or rewards are bounded, which a penalty would not respect.
        """
        if self.bounded_rewards:
            raise ValueError(f"{self.name} takes rewards in [0, 1] only, so KL cannot be in the reward")
        step = Step.of(prompt_ids, rewards, lengths)
        response = np.repeat(np.arange(len(step.rewards)), step.lengths)
        penalties = per_token("penalties", token_penalties, step.lengths)
        total = np.bincount(response, penalties, minlength=len(step.rewards))
        advantages, metrics = self.advantages(prompt_ids, step.rewards - total, step.lengths)
        return np.repeat(advantages, step.lengths), metrics

    def observe(self, prompt_ids: Sequence[str], rewards: ArrayLike, kl: ArrayLike) -> None:  # noqa: B027
        """Learn from the step, after the actor's update. Methods without state do nothing, so not abstract.

        Args:
            prompt_ids, rewards: As given to `advantages`.
            kl: Token-mean KL in nats, of the kind `kl_source`. With "last_visit" (B,), measured as
                `divergence` says: NaN where the prompt has no earlier visit, 0 where it has one in this
                batch.
        """

    def initialize(self, prompt_ids: Sequence[str], successes: ArrayLike, trials: ArrayLike) -> None:
        """Learn from `init_rollouts` responses to each prompt, before the first step.

        Args:
            prompt_ids: P distinct prompt ids.
            successes: (P,) sum of the rewards of a prompt's responses.
            trials: (P,) number of its responses.

        Raises:
            ValueError: The method has no use for them.
        """
        raise ValueError(f"{self.name} keeps no baseline that rollouts before training could start")

    def metrics(self) -> dict[str, float]:
        """What the state looks like now: ``baseline/eta``, ``baseline/mean``, where there are such."""
        return {}

    def _parts(self) -> dict[str, Any]:
        """The objects with state_dict and load_state_dict that make up this method's state, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that `advantages` depends on beside its arguments and the options."""
        parts = {key: part.state_dict() for key, part in self._parts().items()}
        own = {key: copy.deepcopy(getattr(self, key)) for key in self.state}
        return {"version": _STATE_VERSION, **parts, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken. MVSR, MSSR and SPO read each other's state.

        Raises:
            ValueError: The state is of a method that keeps other things.
        """
        check_version(state, _STATE_VERSION, self.name)
        parts = self._parts()
        # Both ways: a missing part would be silently fresh, a surplus one silently lost.
        if set(state) - {"version"} != (kept := {*parts, *self.state}):
            raise ValueError(
                f"{self.name} keeps {sorted(kept) or 'no state'}, but this state has"
                f" {sorted(set(state) - {'version'}) or 'none'}: it is of another algorithm"
            )
        for key, part in parts.items():
            part.load_state_dict(state[key])
        for key in self.state:
            setattr(self, key, copy.deepcopy(state[key]))
