"""From scores to learning signal: baselines, advantages, shaping, losses, and the methods by name.

Pure: NumPy, torch and the standard library; no Ray, no model, no config. The two modules that need
torch, `losses` and `shaping`, are loaded when first used, so that a command that only checks a config
does not wait for it. A new method is a new module and its line among the imports below.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from mssr.algorithms import advantages
from mssr.algorithms.base import Algorithm
from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.discount import AdaptiveDiscount
from mssr.algorithms.grpo import GRPO
from mssr.algorithms.registry import create, get, names, options, register
from mssr.algorithms.reinforce_pp import ReinforcePP
from mssr.algorithms.rloo import RLOO
from mssr.algorithms.single_rollout import MSSR, MVSR

if TYPE_CHECKING:
    from mssr.algorithms import losses, shaping

__all__ = [
    "GRPO",
    "MSSR",
    "MVSR",
    "RLOO",
    "AdaptiveDiscount",
    "Algorithm",
    "BetaBaseline",
    "ReinforcePP",
    "advantages",
    "create",
    "get",
    "losses",
    "names",
    "options",
    "register",
    "shaping",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("losses", "shaping"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
