"""Our names in verl's registry of advantage estimators. Imported after verl's module (see the package)."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from mssr.integrations.verl.settings import METHODS, MODE

Pair = tuple[Tensor, Tensor]
ESTIMATE: ContextVar[Callable[[Tensor, Tensor], Pair] | None] = ContextVar("ESTIMATE", default=None)
"""Who knows the whole batch: from (B, T) token rewards and response mask to (B, T) advantages and returns."""


def _advantages(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> Pair:
    estimate = ESTIMATE.get()
    if estimate is None:
        raise ValueError(f"adv_estimator: {', '.join(METHODS)} need use_v1=true and v1.trainer_mode={MODE}")
    return estimate(token_level_rewards, response_mask)


for _name in METHODS:
    register_adv_est(_name)(_advantages)
