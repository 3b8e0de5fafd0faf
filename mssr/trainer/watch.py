"""Signs that a run collapses, read off the metrics of its steps.

Each sign is a condition on a step. It counts once it has held ``watch.patience`` steps in a row, and its
episode is over once it has been absent as long; a warning comes at the beginning of an episode only.

    entropy    policy/entropy < entropy_floor
    accuracy   m < (1 - accuracy_drop) * (largest m so far), m the mean of reward/accuracy over 10 steps.
               A best below 2% is left alone: down there a fall by half is noise.
    length     rollout/response_length > length_growth * (its mean over the first 10 steps) and
               rollout/truncated_fraction at least 0.1 above its own, or the latter at least 0.5 above.
               Longer responses alone may be learned reasoning; those that are cut earn nothing. The second
               case is for limits that responses reach before they have grown as much.

A metric that is missing or not finite (a step whose updates were all skipped) says nothing either way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from mssr.config import WatchConfig
from mssr.errors import check_version

WINDOW = 10
"""Steps of a mean, and the first steps that lengths are compared with."""
LEAST_BEST = 0.02
CUT_MORE, CUT_MOST = 0.1, 0.5

SIGNS = {
    "entropy": ("watch/entropy_collapsed", "entropy_floor"),
    "accuracy": ("watch/accuracy_dropped", "accuracy_drop"),
    "length": ("watch/length_exploded", "length_growth"),
}
"""Sign -> its metric, and the option whose null turns it off."""
_STATE_VERSION = 1


class CollapseWatch:
    """Looks at the metrics of every step, in order."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        # Whether it counts, and how many steps in a row speak against that.
        self._signs: dict[str, list[Any]] = {name: [False, 0] for name in SIGNS}
        self._recent: list[float] = []  # accuracies, the last WINDOW
        self._best: float | None = None  # their best mean
        self._first: dict[str, list[float]] = {"length": [], "cut": []}  # of the first WINDOW steps

    @property
    def collapsed(self) -> bool:
        """Whether any sign counts now."""
        return any(counts for counts, _ in self._signs.values())

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Take in the metrics of a step; returns a sentence for every episode that begins."""
        found = {
            "entropy": self._entropy(metrics),
            "accuracy": self._accuracy(metrics),
            "length": self._length(metrics),
        }
        warnings = []
        for name, text in found.items():
            if text is None:
                continue
            counts, against = self._signs[name]
            against = against + 1 if bool(text) != counts else 0
            turns = against >= self.config.patience
            self._signs[name] = [not counts, 0] if turns else [counts, against]
            if turns and not counts:
                warnings.append(f"step {step}: {text} (for {self.config.patience} steps)")
        return warnings

    def metrics(self) -> dict[str, float]:
        """1 where a sign counts now, else 0; a sign that is off is 0."""
        return {metric: float(self._signs[name][0]) for name, (metric, _) in SIGNS.items()}

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON values; thresholds are settings and not in it."""
        parts = {"signs": self._signs, "recent": self._recent, "best": self._best, "first": self._first}
        return {"version": _STATE_VERSION} | deepcopy(parts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; what is watched no longer is forgotten.

        Raises:
            ValueError: the state has another version.
        """
        check_version(state, _STATE_VERSION, "watch")
        state = deepcopy(dict(state))
        watched = [name for name, (_, option) in SIGNS.items() if getattr(self.config, option) is not None]
        self._signs |= {name: state["signs"][name] for name in watched}
        self._recent, self._best, self._first = state["recent"], state["best"], state["first"]

    # Each sign: a sentence where it holds in this step, an empty one where not, None if nothing is known.

    def _entropy(self, metrics: Mapping[str, Any]) -> str | None:
        floor, entropy = self.config.entropy_floor, _number(metrics, "policy/entropy")
        if floor is None or entropy is None:
            return None
        if entropy >= floor:
            return ""
        return (
            f"policy entropy is {entropy:.2g} nats per token, below watch.entropy_floor={floor:g}; the "
            "policy hardly explores any more, try a lower actor.lr, a higher algorithm.kl.coef or entropy "
            "shaping"
        )

    def _accuracy(self, metrics: Mapping[str, Any]) -> str | None:
        accuracy = _number(metrics, "reward/accuracy")
        if accuracy is None:
            return None
        self._recent = [*self._recent, accuracy][-WINDOW:]
        if len(self._recent) < WINDOW:
            return None
        mean = math.fsum(self._recent) / WINDOW
        self._best = mean if self._best is None else max(self._best, mean)
        drop = self.config.accuracy_drop
        if drop is None:
            return None
        if self._best < LEAST_BEST or mean >= (1 - drop) * self._best:
            return ""
        return (
            f"train accuracy, the mean of {WINDOW} steps, fell from {self._best:.3f} at best to {mean:.3f}, "
            f"by more than watch.accuracy_drop={drop:g} of it; go back to an earlier checkpoint with a lower "
            "actor.lr"
        )

    def _length(self, metrics: Mapping[str, Any]) -> str | None:
        length = _number(metrics, "rollout/response_length")
        cut = _number(metrics, "rollout/truncated_fraction")
        if length is None or cut is None:
            return None
        if len(self._first["length"]) < WINDOW:
            self._first["length"].append(length)
            self._first["cut"].append(cut)
            return None
        growth = self.config.length_growth
        if growth is None:
            return None
        usual = math.fsum(self._first["length"]) / WINDOW
        more = cut - math.fsum(self._first["cut"]) / WINDOW
        if more < CUT_MORE or (length <= growth * usual and more < CUT_MOST):
            return ""
        return (
            f"responses have {length:.0f} tokens (watch.length_growth={growth:g}; {usual:.0f} in the first "
            f"steps) and {cut:.0%} of them are cut; look at the samples for repetition, and try "
            "reward.length_penalty or reward.overlong_buffer"
        )


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return float(value) if value is not None and math.isfinite(value) else None
