"""What the driver asks of an estimator: advantages before the update, an observation after it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from mssr.algorithms.advantages import FloatVector

_STATE_VERSION = 1


class Algorithm(ABC):
    """One estimator. The driver calls, each step::

        advantages, metrics = algorithm.advantages(prompt_ids, rewards, lengths)
        ...                                        # the actor's update, which measures kl_update
        algorithm.observe(prompt_ids, rewards, kl_update)

    A subclass takes its own options as keyword arguments with defaults and calls
    ``@register("name")``; see `mssr.algorithms.registry`. If it keeps state, it lists the parts that
    hold it in `_parts`, and saving and loading follow.
    """

    name: ClassVar[str] = ""
    """Its name in the registry, set by ``register``."""
    default_n: ClassVar[int] = 1
    """Responses for each prompt unless the user says otherwise."""
    min_n: ClassVar[int] = 1
    """Fewest responses for each prompt: 2 for a method that compares those of a prompt."""
    shapes_entropy: ClassVar[bool] = False
    """Whether entropy shaping (`mssr.algorithms.shaping`) is on unless the user says otherwise."""

    @abstractmethod
    def advantages(
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
    ) -> tuple[FloatVector, dict[str, float]]:
        """The learning signal of one step; changes no state.

        Args:
            prompt_ids: B prompt ids; equal ids are responses to one prompt.
            rewards: (B,) scores.
            lengths: (B,) response lengths in tokens.

        Returns:
            (B,) float32 advantages and metrics: ``advantage/std``, ``advantage/degenerate_fraction``
            (the part of the rollouts without signal), and ``baseline/unseen_fraction`` where there is
            a baseline.

        Raises:
            ValueError: The lengths differ, or the method cannot use such a batch.
        """

    def observe(  # noqa: B027 (not abstract: doing nothing is right for a method without state)
        self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, kl_update: float
    ) -> None:
        """Learn from the step, after the actor's update. Methods without state do nothing.

        Args:
            prompt_ids: B prompt ids, as given to `advantages`.
            rewards: (B,) scores.
            kl_update: Token-mean KL in nats between the policies before and after the update.
        """

    def metrics(self) -> dict[str, float]:
        """What the state looks like now: ``baseline/eta``, ``baseline/mean``, where there are such."""
        return {}

    def _parts(self) -> dict[str, Any]:
        """The objects with state_dict and load_state_dict that make up this method's state, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """All that `advantages` depends on beside its arguments and the options."""
        parts = {key: part.state_dict() for key, part in self._parts().items()}
        return {"version": _STATE_VERSION, **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken. MVSR and MSSR read each other's state.

        Raises:
            ValueError: The state has another version, or is of a method that keeps other things.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"{self.name} state has version {state.get('version')}, not {_STATE_VERSION}")
        parts = self._parts()
        # Both ways: a missing part would be silently fresh, a surplus one silently lost.
        if set(state) - {"version"} != set(parts):
            raise ValueError(
                f"{self.name} keeps {sorted(parts) or 'no state'}, but this state has"
                f" {sorted(set(state) - {'version'}) or 'none'}: it is of another algorithm"
            )
        for key, part in parts.items():
            part.load_state_dict(state[key])


def group_indices(prompt_ids: Sequence[str]) -> npt.NDArray[np.int64]:
    """(B,) 0 .. G-1, equal for equal ids, numbered by first occurrence."""
    index: dict[str, int] = {}
    return np.fromiter((index.setdefault(key, len(index)) for key in prompt_ids), np.int64, len(prompt_ids))


def signal_metrics(advantages: FloatVector, degenerate: float | npt.NDArray[np.bool_]) -> dict[str, float]:
    """The metrics that every method reports.

    Args:
        advantages: (B,) float32.
        degenerate: (B,) True for a rollout without signal, or the fraction of such rollouts.
    """
    return {
        "advantage/std": float(np.std(advantages, dtype=np.float64)),
        "advantage/degenerate_fraction": float(np.mean(degenerate)),
    }


def check_batch(prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
    """Raise ValueError unless there are as many ids as rewards as lengths."""
    b = len(prompt_ids)
    for name, array in (("rewards", rewards), ("lengths", lengths)):
        if np.shape(array) != (b,):
            raise ValueError(f"{b} prompt ids need {name} of shape ({b},), not {np.shape(array)}")
