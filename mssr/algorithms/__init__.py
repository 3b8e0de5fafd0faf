"""From rewards to learning signal: baselines, advantages, shaping, losses, and the methods by name.

Pure: NumPy, torch and the standard library; no Ray, no model, no config. The modules that need torch
are loaded when first used, so that a command that only checks a config does not wait for it. A new
method is a line of the table in `methods`, or a user's ``path/to/file.py:Class``.

In the order of a step: ``step``, what is checked once; ``baselines``, of which the one with a state has its
``baseline`` (prompts in ``id_table``) and ``discount`` (each prompt's own from ``last_visits``);
``normalisations``; ``methods``, the pairs of these, each an ``Algorithm`` of ``base``; ``shaping``,
``policy_losses``, ``losses``, ``correction`` and ``kl_control``, the parts of the loss, which
``objective`` puts together. ``plugins``, ``checks`` and ``sequences`` help.

An option out of its range, shapes or lengths that differ, numbers that are not finite, a name that there is
not and a saved state of another version raise ValueError with a sentence; ``Raises`` says what else does.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from mssr.algorithms.base import Algorithm
from mssr.algorithms.baseline import BetaBaseline
from mssr.algorithms.discount import AdaptiveDiscount
from mssr.algorithms.kl_control import KLController
from mssr.algorithms.methods import Estimator, Method, create, get, names, options, register

__all__ = [
    "AdaptiveDiscount",
    "Algorithm",
    "BetaBaseline",
    "Estimator",
    "KLController",
    "Method",
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
