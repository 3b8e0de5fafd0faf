"""The adaptive discount: forget faster while the policy changes faster.

Sources: MSSR, arXiv 2512.18215; SPO, arXiv 2509.13232.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mssr.algorithms.checks import check_choice, check_number, check_whole
from mssr.errors import check_version

_STATE_VERSION = 2
RULES = ("monotone", "published_code", "half_life")


class AdaptiveDiscount:
    """How much of the old evidence to keep, from how far the policy has moved.

    With tau = min(KL / kl_target, 1), the rules are::

        monotone        eta = eta_max - tau * (eta_max - eta_min)
        published_code  eta = eta_min + tau * (eta_max - eta_min) up to the target, eta_min beyond it
        half_life       eta = 2^(-KL / half_life), clamped to [eta_min, eta_max]

    ``monotone`` is the text of the MSSR paper and ``half_life`` is SPO. ``published_code`` is what the
    code of the MSSR authors does: eta grows with the KL up to the target, where it drops.

    The KL is one number a step (`observe`), of which the mean over the last ``window`` steps counts, or
    over as many as there are; or one number a response (`observe_each`). Before any, KL = 0: no change
    of the policy was seen. An estimated KL may be slightly negative and then counts as 0.

    Args:
        eta_min, eta_max: Smallest and largest discount, 0 <= eta_min <= eta_max <= 1.
        kl_target: KL in nats per token at which ``monotone`` forgets fastest, > 0.
        window: Number of steps averaged over, >= 1.
        rule: One of the rules above.
        half_life: KL that halves the memory, by ``half_life``, > 0.
        eta: A fixed discount in [0, 1], in place of any rule; None adapts it.
    """

    def __init__(
        self,
        eta_min: float = 0.875,
        eta_max: float = 0.96,
        kl_target: float = 0.01,
        window: int = 20,
        *,
        rule: str = "monotone",
        half_life: float = 0.06,
        eta: float | None = None,
    ) -> None:
        if not 0 <= eta_min <= eta_max <= 1:
            raise ValueError(f"needed: 0 <= eta_min={eta_min} <= eta_max={eta_max} <= 1")
        check_number("kl_target", kl_target)
        check_number("half_life", half_life)
        check_number("eta", eta, "in [0, 1]", optional=True)
        check_whole("window", window, 1)
        check_choice("eta_rule", rule, RULES)
        self.eta_min, self.eta_max = eta_min, eta_max
        self.kl_target, self.half_life = kl_target, half_life
        self.window, self.rule, self.fixed = window, rule, eta
        self._kls: deque[float] = deque(maxlen=window)
        self._mean: float | None = None  # of the last `observe_each`

    def of(self, kl: ArrayLike) -> NDArray[np.float64]:
        """The discount for each KL, in the shape of ``kl``; eta_max for NaN: no change was seen."""
        k = np.asarray(kl, np.float64)
        if np.isinf(k).any():
            raise ValueError("the KL between policies must be finite, not infinite")
        if self.fixed is not None:
            return np.full(k.shape, self.fixed)
        positive = np.maximum(k, 0.0)  # NaN stays NaN
        if self.rule == "half_life":
            eta = np.clip(np.exp2(-positive / self.half_life), self.eta_min, self.eta_max)
        else:
            tau = np.minimum(positive / self.kl_target, 1.0)
            # The same lines as in the docstring, written so that both ends are exact in floating point.
            if self.rule == "monotone":
                eta = (1 - tau) * self.eta_max + tau * self.eta_min
            else:
                rising = (1 - tau) * self.eta_min + tau * self.eta_max
                eta = np.where(positive <= self.kl_target, rising, self.eta_min)
        return np.where(np.isnan(k), self.eta_max, eta)

    def observe(self, kl: float) -> None:
        """Add the KL (nats per token) of one training step."""
        if not math.isfinite(kl):
            raise ValueError(f"the KL between policies must be finite, not {kl}")
        self._kls.append(float(kl))
        self._mean = None

    def observe_each(self, kls: ArrayLike) -> NDArray[np.float64]:
        """(B,) discounts of B responses with a KL of their own, see `of`; `eta` is their mean then."""
        etas = self.of(kls)
        self._mean = float(etas.mean()) if etas.size else None
        return etas

    @property
    def eta(self) -> float:
        """The discount now: of the window's mean KL, or the mean over the responses of the last step."""
        if self._mean is not None:
            return self._mean
        return float(self.of(math.fsum(self._kls) / len(self._kls) if self._kls else 0.0))

    def state_dict(self) -> dict[str, Any]:
        """The window's content, oldest first, and the last mean; the settings are not in it."""
        return {"version": _STATE_VERSION, "kls": list(self._kls), "mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the window's content; if this window is shorter, its newest part is kept."""
        if state.get("version") != 1:  # which knew the window only
            check_version(state, _STATE_VERSION, "discount")
        self._kls = deque(state["kls"], maxlen=self.window)
        self._mean = state.get("mean")
