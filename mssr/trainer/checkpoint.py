"""Checkpoints: written beside, then renamed; the pointer ``latest`` is written last.

checkpoints/step-000010/actor/          parameters and optimizer (torch.distributed.checkpoint)
checkpoints/step-000010/trainer.json    step, sampler, algorithm, policy version
checkpoints/step-000010/trainer.safetensors   the arrays of that state
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from mssr.errors import UserError

_ARRAY = "__array__"


class CheckpointStore:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.directory = run_dir / "checkpoints"
        self._keep = keep

    def save(self, step: int, state: dict[str, Any], save_actor: Callable[[str], None]) -> Path:
        """Write a checkpoint; a crash at any moment leaves the previous one in force.

        Args:
            state: nested dicts of JSON values and NumPy arrays.
            save_actor: writes the actor's part into the directory it is given.
        """
        final = self.directory / f"step-{step:06d}"
        partial = self.directory / f".{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_actor(str((partial / "actor").absolute()))
        write_state(partial, state)
        if final.exists():
            shutil.rmtree(final)  # the same step again, after a resume from an older one
        os.replace(partial, final)
        pointer = self.directory / "latest.partial"
        pointer.write_text(final.name)
        os.replace(pointer, self.directory / "latest")
        self._prune()
        return final

    def find(self, resume: str) -> Path | None:
        """The checkpoint that ``trainer.resume`` means; None to start afresh.

        Raises:
            UserError: a path that holds no checkpoint, or a pointer to one that is gone.
        """
        if resume == "never":
            return None
        if resume == "auto":
            pointer = self.directory / "latest"
            if not pointer.is_file():
                return None
            path = self.directory / pointer.read_text().strip()
            origin = f"{pointer} points to {path.name}"
        else:
            path, origin = Path(resume), f"trainer.resume: {resume}"
        if not (path / "trainer.json").is_file():
            raise UserError(f"{origin}, which is no complete checkpoint")
        return path

    def _prune(self) -> None:
        complete = sorted(self.directory.glob("step-*"))
        for old in complete[: -self._keep]:
            shutil.rmtree(old)


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Nested dicts with arrays -> trainer.json and trainer.safetensors."""
    arrays: dict[str, np.ndarray] = {}
    (directory / "trainer.json").write_text(json.dumps(_strip(state, "", arrays)))
    save_file(arrays, str(directory / "trainer.safetensors"))


def read_state(directory: Path) -> dict[str, Any]:
    """The inverse of `write_state`."""
    arrays = load_file(str(directory / "trainer.safetensors"))
    state: dict[str, Any] = _fill(json.loads((directory / "trainer.json").read_text()), arrays)
    return state


def _strip(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The value with its arrays moved to ``arrays``. (A closure would keep them alive in a cycle.)"""
    if isinstance(value, np.ndarray):
        arrays[path] = np.ascontiguousarray(value)
        return {_ARRAY: path}
    if isinstance(value, dict):
        return {key: _strip(v, f"{path}/{key}", arrays) for key, v in value.items()}
    return value


def _fill(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {key: _fill(v, arrays) for key, v in value.items()}
    return value
