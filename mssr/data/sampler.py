"""Which prompts a step uses: each once an epoch, or by how uncertain their outcome is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class PromptSampler(Protocol):
    """Which prompts come next."""

    @property
    def epoch(self) -> float:
        """Prompts drawn, in units of the data set."""
        ...

    def next(self, count: int) -> list[str]:
        """The next ``count`` ids."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class EpochSampler:
    """Walks through the ids, a new permutation every epoch; an epoch's tail joins the next one's head.

    The order of an epoch is a function of (seed, epoch) alone, so the state is two integers.
    """

    def __init__(self, ids: Sequence[str], seed: int, shuffle: bool = True) -> None:
        self._ids = _checked(ids)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the running one."""
        return self._epoch + self._position / len(self._ids)

    def next(self, count: int) -> list[str]:
        """The next ``count`` ids."""
        taken: list[str] = []
        while len(taken) < count:
            if self._position == len(self._ids):
                self._epoch += 1
                self._position = 0
                self._order = self._permutation(self._epoch)
            chunk = self._order[self._position : self._position + count - len(taken)]
            taken.extend(self._ids[i] for i in chunk)
            self._position += len(chunk)
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "epochs",
            "epoch": self._epoch,
            "position": self._position,
            "prompts": len(self._ids),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. A state without a kind is older than the other sampler.

        Raises:
            ValueError: the state is of another kind of sampler or another number of prompts.
        """
        _check_state({"kind": "epochs"} | state, "epochs", len(self._ids))
        if state["epoch"] != self._epoch:
            self._order = self._permutation(state["epoch"])
        self._epoch, self._position = state["epoch"], state["position"]

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._ids))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._ids))


class UncertaintySampler:
    """Draws prompts without replacement, with weight ``sqrt(v(1-v)) + eps`` for a value v.

    The weight is the standard deviation of the outcome, so prompts whose outcome is certain are seldom
    drawn; each call draws anew. Source: SPO, arXiv 2509.13232, with eps = 0.05.

    Drawing without replacement is a race: with E exponential, the prompts of the smallest E/weight, in
    this order, are distributed like draws one after the other (the same as the largest log weight +
    Gumbel noise). A draw is a function of (seed, number of the draw, values), so the state is integers.

    Args:
        ids: P prompt ids.
        values: Gives the (P,) values in [0, 1] of ``ids`` as they are now; asked at each draw.
        eps: >= 0. With 0, prompts of a certain outcome are drawn only when no others are left.

    Raises:
        ValueError: There are no ids, or eps is out of its range.
    """

    def __init__(
        self, ids: Sequence[str], seed: int, values: Callable[[], npt.NDArray[Any]], eps: float = 0.05
    ) -> None:
        if not (np.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps must be a finite number >= 0, not {eps}")
        self._ids = _checked(ids)
        self._seed = seed
        self._values = values
        self._eps = eps
        self._draws = 0
        self._drawn = 0

    @property
    def epoch(self) -> float:
        """Prompts drawn, repeated ones counted, divided by their number."""
        return self._drawn / len(self._ids)

    def next(self, count: int) -> list[str]:
        """``count`` distinct ids; where there are fewer, all of them as often as they fit, then a draw.

        Raises:
            ValueError: the values are not one number in [0, 1] for each id.
        """
        weights = self._weights()
        taken: list[str] = []
        while len(taken) < count:
            first = self._draw(weights, min(count - len(taken), len(self._ids)))
            taken.extend(self._ids[i] for i in first)
        self._drawn += count
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "uncertainty",
            "draws": self._draws,
            "drawn": self._drawn,
            "prompts": len(self._ids),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, given the same values.

        Raises:
            ValueError: the state is of another kind of sampler or another number of prompts.
        """
        _check_state({"kind": "epochs"} | state, "uncertainty", len(self._ids))
        self._draws, self._drawn = state["draws"], state["drawn"]

    def _weights(self) -> npt.NDArray[np.float64]:
        v = np.asarray(self._values(), np.float64)
        if v.shape != (len(self._ids),):
            raise ValueError(f"{len(self._ids)} prompts need as many values, not shape {v.shape}")
        if not (v.min() >= 0 and v.max() <= 1):  # false for NaN too
            raise ValueError("the values of prompts must be in [0, 1]")
        # The bound is far below any other weight, and keeps the order among prompts of weight 0 random.
        return np.maximum(np.sqrt(v * (1 - v)) + self._eps, 1e-300)

    def _draw(self, weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
        """(count,) distinct indices."""
        finish = np.random.default_rng([self._seed, self._draws]).standard_exponential(len(weights))
        finish /= weights
        self._draws += 1
        first = np.argpartition(finish, count - 1)[:count]
        return first[np.argsort(finish[first])]


def _checked(ids: Sequence[str]) -> list[str]:
    if len(ids) == 0:
        raise ValueError("there are no prompts to sample")
    return list(ids)


def _check_state(state: dict[str, Any], kind: str, prompts: int) -> None:
    if state["kind"] != kind:
        raise ValueError(f"the checkpoint's sampler.name is {state['kind']}, this run's is {kind}")
    if state["prompts"] != prompts:
        raise ValueError(f"the checkpoint's data has {state['prompts']} prompts, this has {prompts}")
