"""The weight of the KL to the reference, fixed or adaptive."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mssr.algorithms.checks import check_number
from mssr.errors import check_version

_STATE_VERSION = 1
_MAX_ERROR = 0.2


class KLController:
    """Holds ``coef``; with a target it moves so that the measured KL stays near that.

    Each step, with K the KL to the reference and n the rollouts of the step (Ziegler et al.,
    arXiv 1909.08593):

        e = clip(K / target - 1, -0.2, 0.2);  coef <- coef * (1 + e * min(n / horizon, 1))

    The minimum is ours: a step of more rollouts than the horizon would otherwise move coef by more
    than a fifth, and one of five times as many could make it negative.

    Args:
        coef: Weight of the KL term, >= 0; > 0 with a target, because 0 times anything stays 0.
        target: KL to the reference in nats per token, > 0, or None for a fixed weight.
        horizon: Rollouts over which the weight changes by at most a fifth, > 0.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10000) -> None:
        check_number("the KL coefficient", coef, ">= 0")
        check_number("the KL target", target, optional=True)
        if target is not None and coef == 0:
            raise ValueError("an adaptive KL coefficient must start above 0: it is scaled, so 0 stays 0")
        check_number("the KL horizon", horizon)
        self.target = None if target is None else float(target)
        self.horizon = float(horizon)
        self.coef = float(coef)
        """The weight for the next step."""

    def observe(self, kl: float, rollouts: int) -> None:
        """Adapt after a step of so many ``rollouts``; nothing happens where the weight is fixed.

        Args:
            kl: Token-mean KL of the policy to the reference in nats; an estimate may be negative.

        Raises:
            ValueError: The weight is adaptive and ``kl`` not finite, or the rollouts are below 0.
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
        """Go on with the saved weight; a fixed one stays as configured, because it is a setting too.

        Raises:
            ValueError: The state has another version, or its weight is not a finite number >= 0.
        """
        check_version(state, _STATE_VERSION, "KL controller")
        coef = float(state["coef"])
        check_number("the saved KL coefficient", coef, ">= 0")
        if self.target is not None:
            self.coef = coef
