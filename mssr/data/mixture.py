"""Several sources in fixed shares: which source each of the next prompts is from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mssr.data.sampler import PromptSampler


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
        order = [self._draw() for _ in range(count)]
        ids = {label: iter(self._samplers[label].next(order.count(label))) for label in set(order)}
        return [next(ids[label]) for label in order]

    def state_dict(self) -> dict[str, Any]:
        """Two numbers a source and the state of its sampler."""
        return {
            "shares": dict(self._shares),
            "drawn": dict(self._drawn),
            "samplers": {label: sampler.state_dict() for label, sampler in self._samplers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler stopped.

        Raises:
            ValueError: it had other sources or weights, or a source has changed.
        """
        if state.get("shares") != self._shares:
            raise ValueError(
                f"the checkpoint's data has the shares {state.get('shares')}, this has {self._shares}"
            )
        for label, sampler in self._samplers.items():
            sampler.load_state_dict(state["samplers"][label])
        self._drawn = {label: state["drawn"][label] for label in self._samplers}

    def _draw(self) -> str:
        done = sum(self._drawn.values()) + 1
        label = max(self._shares, key=lambda name: self._shares[name] * done - self._drawn[name])
        self._drawn[label] += 1
        return label
