"""Which prompts a step uses: each once an epoch, or by how uncertain their outcome is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

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


class _IdSampler:
    """A sampler whose state is integers: those named in ``counters``.

    Args:
        ids: P prompt ids.

    Raises:
        ValueError: there are no ids.
    """

    kind: ClassVar[str]
    counters: ClassVar[tuple[str, ...]]

    def __init__(self, ids: Sequence[str], seed: int) -> None:
        if len(ids) == 0:
            raise ValueError("there are no prompts to sample")
        self._ids, self._seed = list(ids), seed
        for name in self.counters:
            setattr(self, f"_{name}", 0)

    def state_dict(self) -> dict[str, Any]:
        counts = {name: getattr(self, f"_{name}") for name in self.counters}
        return {"kind": self.kind, **counts, "prompts": len(self._ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. A state without a kind is older than the second sampler.

        Raises:
            ValueError: the state is of another kind of sampler or another number of prompts.
        """
        kind = state.get("kind", EpochSampler.kind)
        if kind != self.kind:
            raise ValueError(f"the checkpoint's sampler.name is {kind}, this run's is {self.kind}")
        if state["prompts"] != len(self._ids):
            raise ValueError(
                f"the checkpoint's data has {state['prompts']} prompts, this has {len(self._ids)}"
            )
        for name in self.counters:
            setattr(self, f"_{name}", state[name])


class EpochSampler(_IdSampler):
    """Walks through the ids, a new permutation every epoch; an epoch's tail joins the next one's head.

    The order of an epoch is a function of (seed, epoch) alone.
    """

    kind = "epochs"
    counters = ("epoch", "position")
    _epoch: int
    _position: int

    def __init__(self, ids: Sequence[str], seed: int, shuffle: bool = True) -> None:
        super().__init__(ids, seed)
        self._shuffle = shuffle
        self._order = self._permutation()

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
                self._order = self._permutation()
            chunk = self._order[self._position : self._position + count - len(taken)]
            taken.extend(self._ids[i] for i in chunk)
            self._position += len(chunk)
        return taken

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._order = self._permutation()

    def _permutation(self) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self._ids))
        return np.random.default_rng([self._seed, self._epoch]).permutation(len(self._ids))


class UncertaintySampler(_IdSampler):
    """Draws prompts without replacement, with weight ``sqrt(v(1-v)) + eps`` for a value v.

    The weight is the standard deviation of the outcome, so prompts whose outcome is certain are seldom
    drawn; each call draws anew. Source: SPO, arXiv 2509.13232, with eps = 0.05.

    Drawing without replacement is a race: with E exponential, the prompts of the smallest E/weight, in
    this order, are distributed like draws one after the other (the same as the largest log weight +
    Gumbel noise). A draw is a function of (seed, number of the draw, values).

    Args:
        ids: P prompt ids.
        values: Gives the (P,) values in [0, 1] of ``ids`` as they are now; asked at each draw.
        eps: >= 0. With 0, prompts of a certain outcome are drawn only when no others are left.

    Raises:
        ValueError: There are no ids, or eps is out of its range.
    """

    kind = "uncertainty"
    counters = ("draws", "drawn")
    _draws: int
    _drawn: int

    def __init__(
        self, ids: Sequence[str], seed: int, values: Callable[[], npt.NDArray[Any]], eps: float = 0.05
    ) -> None:
        if not (np.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps must be a finite number >= 0, not {eps}")
        super().__init__(ids, seed)
        self._values, self._eps = values, eps

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
