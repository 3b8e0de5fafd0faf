"""From rewards to learning signal: baselines, advantages, shaping, losses, and the methods by name.

Pure: NumPy, torch and the standard library; no Ray, no model, no config. The modules that need torch
are loaded when first used, so that a command that only checks a config does not wait for it. A new
method is a new module and its line among the imports below, or a user's ``path/to/file.py:Class``.

In the order of a step: ``baseline`` (its prompts in ``id_table``) and ``discount`` (each prompt's own from
``last_visits``); ``advantages``, the formulas; ``combined``, any of the ``baselines`` with any of the
``normalisations``, and the methods that are such a pair; ``single_rollout``, those with a state, each a
registered ``Algorithm`` of ``base``; ``shaping``, ``policy_losses``, ``losses``, ``correction`` and
``kl_control``, the parts of the loss, which ``objective`` puts together. ``plugins``, ``checks`` and
``sequences`` help.

An option out of its range, shapes or lengths that differ, numbers that are not finite, a name that there is
not and a saved state of another version raise ValueError with a sentence; ``Raises`` says what else does.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from mssr.algorithms import advantages
from mssr.algorithms.base import Algorithm, get, names, register
from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.combined import (
    DBB,
    GRPO,
    RLOO,
    Combined,
    DrGRPO,
    FlashREINFORCE,
    LitePPO,
    MaxRL,
    ReinforcePP,
    ReinforcePPBaseline,
    choose,
    create,
    options,
)
from mssr.algorithms.discount import AdaptiveDiscount
from mssr.algorithms.kl_control import KLController
from mssr.algorithms.single_rollout import MSSR, MVSR, SPO

__all__ = [
    "DBB",
    "GRPO",
    "MSSR",
    "MVSR",
    "RLOO",
    "SPO",
    "AdaptiveDiscount",
    "Algorithm",
    "BetaBaseline",
    "Combined",
    "DrGRPO",
    "FlashREINFORCE",
    "KLController",
    "LitePPO",
    "MaxRL",
    "ReinforcePP",
    "ReinforcePPBaseline",
    "advantages",
    "choose",
    "correction",
    "create",
    "get",
    "losses",
    "names",
    "options",
    "policy_losses",
    "register",
    "shaping",
]

_NEED_TORCH = ("correction", "losses", "policy_losses", "shaping")


def __getattr__(name: str) -> ModuleType:
    if name in _NEED_TORCH:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
