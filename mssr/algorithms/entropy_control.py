"""EntroPIC: a proportional-integral controller that keeps the policy's entropy near a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mssr.algorithms.checks import check_number
from mssr.errors import check_version

_STATE_VERSION = 1


@dataclass
class EntropyController:
    """Holds ``alpha`` of `mssr.algorithms.shaping.entropy_balance`. With H_i the entropies of the steps 1..k:

        alpha = clip(proportional * (H_k - target) + integral * sum_i (H_i - target), -1, 1)

    arXiv 2511.15248. The authors' code takes the H of each micro-batch for that micro-batch; ours is that of
    the step before, so that alpha is one number on all ranks. In the first step it is 0.
    """

    target: float | None = None
    """Nats per token, > 0, or None for no control."""
    proportional: float = 1.0
    integral: float = 0.01
    alpha: float = field(default=0.0, init=False)
    """Of the next step."""
    _sum: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        check_number("the target of the entropy", self.target, optional=True)
        check_number("the proportional gain", self.proportional, ">= 0")
        check_number("the integral gain", self.integral, ">= 0")

    def observe(self, entropy: float) -> None:
        """Adapt after a step of this token-mean entropy, in nats; NaN, of no update, changes nothing."""
        if self.target is None or math.isnan(entropy):
            return
        error = entropy - self.target
        self._sum += error
        self.alpha = min(max(self.proportional * error + self.integral * self._sum, -1.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """What the steps so far left; target and gains are settings and not in it."""
        return {"version": _STATE_VERSION, "alpha": self.alpha, "sum": self._sum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        check_version(state, _STATE_VERSION, "entropy controller")
        self.alpha, self._sum = float(state["alpha"]), float(state["sum"])
