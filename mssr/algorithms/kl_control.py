"""The weight of the KL to the reference, fixed or adaptive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mssr.algorithms.checks import check_number
from mssr.errors import check_version

_STATE_VERSION = 1
_MAX_ERROR = 0.2


@dataclass
class KLController:
    """Holds ``coef``; with a target it moves so that the measured KL stays near that.

    Each step, with K the KL to the reference and n the rollouts of the step (Ziegler et al.,
    arXiv 1909.08593):

        e = clip(K / target - 1, -0.2, 0.2);  coef <- coef * (1 + e * min(n / horizon, 1))

    The minimum is ours: a step of more rollouts than the horizon would otherwise move coef by more
    than a fifth, and one of five times as many could make it negative.
    """

    coef: float
    """Weight of the KL term in the next step, >= 0; > 0 with a target: 0 times anything stays 0."""
    target: float | None = None
    """KL to the reference in nats per token, > 0, or None for a fixed weight."""
    horizon: float = 10000
    """Rollouts over which the weight changes by at most a fifth, > 0."""

    def __post_init__(self) -> None:
        check_number("the KL coefficient", self.coef, ">= 0")
        check_number("the KL target", self.target, optional=True)
        if self.target is not None and self.coef == 0:
            raise ValueError("an adaptive KL coefficient must start above 0: it is scaled, so 0 stays 0")
        check_number("the KL horizon", self.horizon)

    def observe(self, kl: float, rollouts: int) -> None:
        """Adapt after a step of so many ``rollouts``; nothing happens where the weight is fixed.

        Args:
            kl: Token-mean KL of the policy to the reference in nats; an estimate may be negative.
        """
        if self.target is None:
            return
        if not math.isfinite(kl):
            raise ValueError(f"the KL to the reference must be finite, not {kl}")
        if rollouts < 0:
            raise ValueError(f"a step has 0 or more rollouts, not {rollouts}")
        error = min(max(kl / self.target - 1, -_MAX_ERROR), _MAX_ERROR)
        self.coef *= 1 + error * min(rollouts / self.horizon, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The weight as it is now; target and horizon are settings and not in it."""
        return {"version": _STATE_VERSION, "coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the saved weight; a fixed one stays as configured, because it is a setting too."""
        check_version(state, _STATE_VERSION, "KL controller")
        check_number("the saved KL coefficient", state["coef"], ">= 0")
        if self.target is not None:
            self.coef = float(state["coef"])
