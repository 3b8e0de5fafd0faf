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
from typing import Any

from mssr.config import WatchConfig
from mssr.errors import check_version

WINDOW = 10
"""Steps of a mean, and the first steps that lengths are compared with."""
LEAST_BEST = 0.02
CUT_MORE, CUT_MOST = 0.1, 0.5

FLAGS = {
    "entropy": "watch/entropy_collapsed",
    "accuracy": "watch/accuracy_dropped",
    "length": "watch/length_exploded",
}
"""Sign -> its metric."""
_STATE_VERSION = 1


class _Sign:
    """One sign: how long it has held or been absent, and whether it counts."""

    def __init__(self) -> None:
        self.active = False
        self.run = 0  # steps in a row that speak against `active`

    def observe(self, holds: bool, patience: int) -> bool:
        """Whether an episode begins with this step."""
        self.run = self.run + 1 if holds != self.active else 0
        if self.run < patience:
            return False
        self.active, self.run = holds, 0
        return holds


class CollapseWatch:
    """Looks at the metrics of every step, in order."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self._signs = {name: _Sign() for name in FLAGS}
        self._recent: list[float] = []  # accuracies, the last WINDOW
        self._best: float | None = None  # their best mean
        self._first: dict[str, list[float]] = {"length": [], "cut": []}  # of the first WINDOW steps

    @property
    def collapsed(self) -> bool:
        """Whether any sign counts now."""
        return any(sign.active for sign in self._signs.values())

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Take in a step; returns a sentence for every episode that begins.

        Args:
            step: as in metrics.jsonl.
            metrics: of that step.
        """
        found = {
            "entropy": self._entropy(metrics),
            "accuracy": self._accuracy(metrics),
            "length": self._length(metrics),
        }
        warnings = []
        for name, (holds, text) in ((n, f) for n, f in found.items() if f is not None):
            if self._signs[name].observe(holds, self.config.patience):
                warnings.append(f"step {step}: {text} (for {self.config.patience} steps)")
        return warnings

    def metrics(self) -> dict[str, float]:
        """1 where a sign counts now, else 0; a sign that is off is 0."""
        return {key: float(self._signs[name].active) for name, key in FLAGS.items()}

    def state_dict(self) -> dict[str, Any]:
        """All of it as JSON values; thresholds are settings and not in it."""
        return {
            "version": _STATE_VERSION,
            "signs": {name: [sign.active, sign.run] for name, sign in self._signs.items()},
            "recent": list(self._recent),
            "best": self._best,
            "first": {name: list(values) for name, values in self._first.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; what is watched no longer is forgotten.

        Raises:
            ValueError: the state has another version.
        """
        check_version(state, _STATE_VERSION, "watch")
        options = dict(zip(FLAGS, ("entropy_floor", "accuracy_drop", "length_growth"), strict=True))
        for name, sign in self._signs.items():
            if options[name] in self.config.signs:
                sign.active, sign.run = bool(state["signs"][name][0]), int(state["signs"][name][1])
        self._recent = [float(x) for x in state["recent"]]
        self._best = None if state["best"] is None else float(state["best"])
        self._first = {name: [float(x) for x in state["first"][name]] for name in self._first}

    def _entropy(self, metrics: Mapping[str, Any]) -> tuple[bool, str] | None:
        floor, entropy = self.config.entropy_floor, _number(metrics, "policy/entropy")
        if floor is None or entropy is None:
            return None
        return entropy < floor, (
            f"policy entropy is {entropy:.2g} nats per token, below watch.entropy_floor={floor:g}; the "
            "policy hardly explores any more, try a lower actor.lr, a higher algorithm.kl.coef or entropy "
            "shaping"
        )

    def _accuracy(self, metrics: Mapping[str, Any]) -> tuple[bool, str] | None:
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
        holds = self._best >= LEAST_BEST and mean < (1 - drop) * self._best
        return holds, (
            f"train accuracy, the mean of {WINDOW} steps, fell from {self._best:.3f} at best to {mean:.3f}, "
            f"by more than watch.accuracy_drop={drop:g} of it; go back to an earlier checkpoint with a lower "
            "actor.lr"
        )

    def _length(self, metrics: Mapping[str, Any]) -> tuple[bool, str] | None:
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
        holds = (length > growth * usual and more >= CUT_MORE) or more >= CUT_MOST
        return holds, (
            f"responses have {length:.0f} tokens (watch.length_growth={growth:g}; {usual:.0f} in the first "
            f"steps) and {cut:.0%} of them are cut; look at the samples for repetition, and try "
            "reward.length_penalty or reward.overlong_buffer"
        )


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return float(value) if value is not None and math.isfinite(value) else None
