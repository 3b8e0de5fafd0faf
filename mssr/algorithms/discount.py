"""The adaptive discount: forget faster while the policy changes faster.

Source: MSSR, arXiv 2512.18215. The authors' code has the slope inverted (eta grows with the KL up to
the target, then drops); this is the monotone rule of the paper's text.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

_STATE_VERSION = 1


class AdaptiveDiscount:
    """eta = eta_max - tau * (eta_max - eta_min), tau = min(KL_bar / kl_target, 1).

    KL_bar is the mean of the last ``window`` observations, or of as many as there are. With none,
    tau = 0 and eta = eta_max: no change of the policy was seen, so nothing is out of date. An
    estimated KL may be slightly negative; tau does not go below 0, so eta stays in its range.

    Args:
        eta_min: Discount when the policy changes by ``kl_target`` or more, in [0, eta_max].
        eta_max: Discount when the policy does not change, in [eta_min, 1].
        kl_target: KL in nats per token at which forgetting is fastest, > 0.
        window: Number of steps averaged over, >= 1.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(
        self, eta_min: float = 0.875, eta_max: float = 0.96, kl_target: float = 0.01, window: int = 20
    ) -> None:
        if not 0 <= eta_min <= eta_max <= 1:
            raise ValueError(
                f"needed: 0 <= eta_min <= eta_max <= 1, but eta_min={eta_min} and eta_max={eta_max}"
            )
        if not (math.isfinite(kl_target) and kl_target > 0):
            raise ValueError(f"kl_target must be a finite number > 0, not {kl_target}")
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number >= 1, not {window!r}")
        self.eta_min = float(eta_min)
        self.eta_max = float(eta_max)
        self.kl_target = float(kl_target)
        self.window = window
        self._kls: deque[float] = deque(maxlen=window)

    def observe(self, kl: float) -> None:
        """Add the KL (nats per token) between the policies before and after one training step.

        Raises:
            ValueError: ``kl`` is not finite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL between policies must be finite, not {kl}")
        self._kls.append(float(kl))

    @property
    def eta(self) -> float:
        """The discount for the next baseline update, in [eta_min, eta_max]."""
        kl_bar = math.fsum(self._kls) / len(self._kls) if self._kls else 0.0
        tau = min(max(kl_bar / self.kl_target, 0.0), 1.0)
        # The same line as in the docstring, written so that both ends are exact in floating point.
        return (1 - tau) * self.eta_max + tau * self.eta_min

    def state_dict(self) -> dict[str, Any]:
        """The window's content, oldest first; the settings are not in it."""
        return {"version": _STATE_VERSION, "kls": list(self._kls)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the window's content; if this window is shorter, its newest part is kept.

        Raises:
            ValueError: The state has another version.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"discount state has version {state.get('version')}, expected {_STATE_VERSION}")
        self._kls = deque((float(kl) for kl in state["kls"]), maxlen=self.window)
