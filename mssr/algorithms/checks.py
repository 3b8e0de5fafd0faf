"""What an option or an argument may be: each of these raises ValueError with its name."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def check_number(name: str, value: float | None, bounds: str = "> 0", *, optional: bool = False) -> None:
    """A finite number within ``bounds``, which are "> 0", ">= 0" or "in [0, 1]"; or None if ``optional``."""
    if value is None and optional:
        return
    assert value is not None
    within = {"> 0": value > 0, ">= 0": value >= 0, "in [0, 1]": 0 <= value <= 1}[bounds]
    if not (math.isfinite(value) and within):
        number = bounds if bounds == "in [0, 1]" else f"a finite number {bounds}"
        raise ValueError(f"{name} must be {number}{' or None' if optional else ''}, not {value}")


def check_whole(name: str, value: int, least: int) -> None:
    """A whole number that is not below ``least``; True is none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, not {value!r}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """One of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def per_prompt(name: str, values: ArrayLike, count: int) -> NDArray[np.float64]:
    """(count,) float64 ``values``, one for each prompt id."""
    array = np.asarray(values, np.float64)
    if array.shape != (count,):
        raise ValueError(f"{count} prompt ids need {name} of shape ({count},), not {array.shape}")
    return array
