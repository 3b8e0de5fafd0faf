"""What the integrations share: the methods that make sense in them, and a method's state as one file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mssr import algorithms

METHODS = ("mssr", "mvsr", "spo", "reinforce_pp")
"""Those of one response for each prompt. (Both trainers have group methods of their own.)"""
_ARRAY = "__array__"
_TREE = "state"


def create(
    name: str, options: Mapping[str, Any], kl_sources: Sequence[str] = ("update",)
) -> algorithms.Algorithm:
    """One of `METHODS`, as `mssr.algorithms.create`; without a pass of rollouts before training (spo).

    ``kl_sources`` are those that the caller can measure.

    Raises:
        ValueError: there is no such method here, or it does not take an option or its value.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r} must be one of {', '.join(METHODS)}")
    if options.get("init_rollouts"):
        raise ValueError("init_rollouts: there is no pass over the data before training here; leave it out")
    taken = {"init_rollouts": 0} if "init_rollouts" in algorithms.options(name) else {}
    method = algorithms.create(name, **{**options, **taken})
    if method.kl_source not in kl_sources:
        raise ValueError(
            f"kl_source={method.kl_source!r}: here eta follows the KL of the update; give kl_source=update"
            " (spo: and eta_rule=monotone)"
        )
    return method


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts of JSON values and arrays as one ``.npz``; it is there whole or not at all."""
    arrays: dict[str, Any] = {}
    tree = json.dumps(_strip(state, "", arrays))
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.savez(file, **{**arrays, _TREE: np.array(tree)})
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any]:
    """The inverse of `save_state`.

    Raises:
        ValueError: the file is not of it, or damaged.
        OSError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        tree: dict[str, Any] = json.loads(
            str(arrays[_TREE]), object_hook=lambda v: arrays[v[_ARRAY]] if set(v) == {_ARRAY} else v
        )
    except OSError:
        raise
    except Exception as error:  # numpy, zipfile and json each raise their own
        raise ValueError(f"{path} holds no state of a method: {error}") from error
    return tree


def _strip(value: Any, path: str, arrays: dict[str, Any]) -> Any:
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {_ARRAY: path}
    if isinstance(value, Mapping):
        return {key: _strip(v, f"{path}/{key}", arrays) for key, v in value.items()}
    return value
