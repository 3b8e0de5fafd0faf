"""Which prompts a step uses: each once an epoch, by how uncertain their outcome is, or in fixed shares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


class _IdSampler:
    """One source of prompts; the state are its counters.

    Raises:
        ValueError: there are no ids.
    """

    def __init__(self, kind: str, ids: Sequence[str], seed: int, **counters: int) -> None:
        if len(ids) == 0:
            raise ValueError("there are no prompts to sample")
        self._kind, self._ids, self._seed, self._at = kind, list(ids), seed, counters

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self._kind, **self._at, "prompts": len(self._ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; a ValueError for another kind or another number of prompts."""
        kind = state.get("kind", "epochs")  # a state without a kind is older than the second one
        if kind != self._kind:
            raise ValueError(f"the checkpoint's sampler.name is {kind}, this run's is {self._kind}")
        if state["prompts"] != len(self._ids):
            raise ValueError(
                f"the checkpoint's data has {state['prompts']} prompts, this has {len(self._ids)}"
            )
        self._at = {name: state[name] for name in self._at}


class EpochSampler(_IdSampler):
    """Walks through the ids, a new permutation every epoch; an epoch's tail joins the next one's head.

    The order of an epoch is a function of (seed, epoch) alone.
    """

    def __init__(self, ids: Sequence[str], seed: int, shuffle: bool = True) -> None:
        super().__init__("epochs", ids, seed, epoch=0, position=0)
        self._shuffle = shuffle
        self._order = self._permutation()

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the running one."""
        return self._at["epoch"] + self._at["position"] / len(self._ids)

    def next(self, count: int) -> list[str]:
        """The next ``count`` ids."""
        at = self._at
        taken: list[str] = []
        while len(taken) < count:
            if at["position"] == len(self._ids):
                at.update(epoch=at["epoch"] + 1, position=0)
                self._order = self._permutation()
            chunk = self._order[at["position"] : at["position"] + count - len(taken)]
            taken.extend(self._ids[i] for i in chunk)
            at["position"] += len(chunk)
        return taken

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._order = self._permutation()

    def _permutation(self) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return np.arange(len(self._ids))
        return np.random.default_rng([self._seed, self._at["epoch"]]).permutation(len(self._ids))


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

    def __init__(
        self, ids: Sequence[str], seed: int, values: Callable[[], npt.NDArray[Any]], eps: float = 0.05
    ) -> None:
        if not (np.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps must be a finite number >= 0, not {eps}")
        super().__init__("uncertainty", ids, seed, draws=0, drawn=0)
        self._values, self._eps = values, eps

    @property
    def epoch(self) -> float:
        """Prompts drawn, repeated ones counted, divided by their number."""
        return self._at["drawn"] / len(self._ids)

    def next(self, count: int) -> list[str]:
        """``count`` distinct ids; where there are fewer, all of them as often as they fit, then a draw.

        Raises:
            ValueError: the values are not one number in [0, 1] for each id.
        """
        v = np.asarray(self._values(), np.float64)
        if v.shape != (len(self._ids),):
            raise ValueError(f"{len(self._ids)} prompts need as many values, not shape {v.shape}")
        if not (v.min() >= 0 and v.max() <= 1):  # false for NaN too
            raise ValueError("the values of prompts must be in [0, 1]")
        # The bound is far below any other weight, and keeps the order among prompts of weight 0 random.
        weights = np.maximum(np.sqrt(v * (1 - v)) + self._eps, 1e-300)
        taken: list[str] = []
        while len(taken) < count:
            first = self._draw(weights, min(count - len(taken), len(self._ids)))
            taken.extend(self._ids[i] for i in first)
        self._at["drawn"] += count
        return taken

    def _draw(self, weights: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
        """(count,) distinct indices."""
        finish = np.random.default_rng([self._seed, self._at["draws"]]).standard_exponential(len(weights))
        finish /= weights
        self._at["draws"] += 1
        first = np.argpartition(finish, count - 1)[:count]
        return first[np.argsort(finish[first])]


class MixtureSampler:
    """Draws from several samplers so that their shares of all draws are their weights.

    Each draw goes to the source that is furthest behind its share: with s_i the share of source i and
    d_i its draws so far, to the one with the largest s_i * (sum of d + 1) - d_i, of equals the first. So
    the shares hold over any stretch to about one prompt, not on average, and the order does not depend on
    how many are asked for at once.

    Args:
        samplers: label of a source -> its order.
        weights: the same labels -> positive numbers, of any sum.

    Raises:
        ValueError: the labels differ, or there is none.
    """

    def __init__(self, samplers: Mapping[str, PromptSampler], weights: Mapping[str, float]) -> None:
        if not samplers or set(samplers) != set(weights):
            raise ValueError(f"weights for {sorted(weights)}, but sources {sorted(samplers)}")
        if not all(weight > 0 for weight in weights.values()):
            raise ValueError(f"weights must be above 0, not {dict(weights)}")
        self._samplers = dict(samplers)
        total = sum(weights.values())
        self._shares = {label: weights[label] / total for label in samplers}
        self._drawn = dict.fromkeys(samplers, 0)

    @property
    def epoch(self) -> float:
        """Epochs of the sources, averaged by their shares: 1 when every source was walked once, if the
        weights are in proportion to the sizes."""
        return sum(self._shares[label] * sampler.epoch for label, sampler in self._samplers.items())

    def next(self, count: int) -> list[str]:
        """The next ``count`` ids, sources interleaved."""
        order: list[str] = []
        done = sum(self._drawn.values())
        for number in range(done + 1, done + count + 1):
            label = max(self._shares, key=lambda one: self._shares[one] * number - self._drawn[one])
            self._drawn[label] += 1
            order.append(label)
        ids = {label: iter(self._samplers[label].next(order.count(label))) for label in set(order)}
        return [next(ids[label]) for label in order]

    def state_dict(self) -> dict[str, Any]:
        return {
            "shares": dict(self._shares),
            "drawn": dict(self._drawn),
            "samplers": {label: sampler.state_dict() for label, sampler in self._samplers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler stopped; a ValueError for other sources, weights or ids."""
        if state.get("shares") != self._shares:
            raise ValueError(
                f"the checkpoint's data has the shares {state.get('shares')}, this has {self._shares}"
            )
        for label, sampler in self._samplers.items():
            sampler.load_state_dict(state["samplers"][label])
        self._drawn = {label: state["drawn"][label] for label in self._samplers}


PromptSampler = EpochSampler | UncertaintySampler | MixtureSampler
"""What decides which prompts come next: ``next(count)``, ``epoch`` and a state."""
