"""Checkpoints: written beside, then renamed; the pointers ``latest`` and ``best`` are written last.

checkpoints/step-000010/manifest.json   versions, config, validation accuracy, checksums of all files
checkpoints/step-000010/actor/          parameters and optimizer (torch.distributed.checkpoint)
checkpoints/step-000010/trainer.json    step, sampler, algorithm, and what else the next step depends on
checkpoints/step-000010/trainer.safetensors   the arrays of that state
checkpoints/latest, checkpoints/best    the name of a checkpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mssr.cluster.base import SaveHandle
from mssr.errors import UserError
from mssr.models.files import replace_text, sha256
from mssr.runs.manifest import Manifest, read_manifest, verify, write_manifest

_ARRAY = "__array__"
_STATE_FILES = ("trainer.json", "trainer.safetensors")


class CheckpointStore:
    """The checkpoints of one run directory.

    `begin` and `finish` write one; between them training may go on. A crash at any moment, and a failure
    of either, leaves the checkpoints before it untouched.

    Args:
        keep: how many to keep, besides the one with the best validation accuracy.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.directory = run_dir / "checkpoints"
        self._keep = keep
        self.saved = False
        """Whether ``latest`` is of this process."""
        self._unfinished: tuple[Manifest, SaveHandle] | None = None

    @property
    def writing(self) -> bool:
        """Whether `finish` has something to do."""
        return self._unfinished is not None

    @property
    def written(self) -> bool:
        """Whether `finish` would not wait for the ranks."""
        return self._unfinished is not None and self._unfinished[1].done()

    def begin(
        self,
        step: int,
        state: dict[str, Any],
        begin_save: Callable[[str], SaveHandle],
        config: dict[str, Any],
        val_accuracy: float | None = None,
    ) -> None:
        """Begin to write a checkpoint.

        Args:
            state: nested dicts of JSON values and NumPy arrays.
            begin_save: begins to write the actor's part into the directory it is given.

        Raises:
            OSError: it could not be written.
        """
        assert self._unfinished is None
        partial = self._partial(step)
        self.clean()
        try:
            partial.mkdir(parents=True)
            write_state(partial, state)
            handle = begin_save(str((partial / "actor").absolute()))
        except OSError:
            self.clean()
            raise
        if val_accuracy != val_accuracy:  # no response had a score
            val_accuracy = None
        self._unfinished = Manifest(step, config, val_accuracy), handle

    def finish(self) -> Path:
        """Wait for the ranks, and put the checkpoint in force.

        Raises:
            OSError: it could not be written.
            WorkersLostError: a rank died or hung.
        """
        assert self._unfinished is not None
        (manifest, handle), self._unfinished = self._unfinished, None
        partial, final = self._partial(manifest.step), self.directory / f"step-{manifest.step:06d}"
        try:
            checksums = {f"actor/{name}": digits for name, digits in handle.result().items()}
            checksums |= {name: sha256(partial / name) for name in _STATE_FILES}
            write_manifest(partial, manifest, checksums)
            if final.exists():
                # The same step again, after a resume from an older one.
                os.replace(final, self.directory / f".{final.name}.partial.old")
            os.replace(partial, final)
            replace_text(self.directory / "latest", final.name)
            self.saved = True
            self._prune(final)
        finally:
            self.clean()
        return final

    def clean(self) -> None:
        """Remove what is incomplete: after a crash, or of a save that is to be forgotten."""
        self._unfinished = None
        for partial in self.directory.glob(".step-*"):
            shutil.rmtree(partial, ignore_errors=True)

    def find(self, resume: str, tell: Callable[[str], None]) -> Path | None:
        """The checkpoint that ``trainer.resume`` means, with intact files; None to start afresh.

        Args:
            tell: told of a damaged checkpoint in whose place an older one is used.

        Raises:
            UserError: a path that holds no intact checkpoint; or there are checkpoints, and none is intact.
        """
        if resume == "never":
            return None
        if resume != "auto":
            try:
                path = resolve(Path(resume))
                verify(path)
            except UserError as error:
                raise UserError(f"trainer.resume: {error}") from error
            return path
        pointer = self.directory / "latest"
        if not pointer.is_file():
            return None
        newest = self.directory / pointer.read_text().strip()
        older = [p for p in self.directory.glob("step-*") if p.name < newest.name]
        faults = []
        for path in [newest, *sorted(older, reverse=True)]:
            try:
                verify(path)
            except UserError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                tell(f"{fault}; going on from {path.name}")
            return path
        raise UserError(
            f"trainer.resume=auto: no checkpoint in {self.directory} is intact: {faults[0]}; "
            "trainer.resume=never with another trainer.run_dir starts afresh"
        )

    def _partial(self, step: int) -> Path:
        return self.directory / f".step-{step:06d}.partial"

    def _prune(self, newest: Path) -> None:
        # Later ones are of a course that was left, after a resume from an older one. They are replaced
        # when their step comes, and never count as newer than what was just written.
        complete = sorted(p for p in self.directory.glob("step-*") if p.name <= newest.name)
        validated = []
        for path in complete:
            with contextlib.suppress(UserError):  # damaged; it goes when its time has come
                if (accuracy := read_manifest(path).val_accuracy) is not None:
                    validated.append((accuracy, path.name))
        best = max(validated)[1] if validated else None
        if best is not None:
            replace_text(self.directory / "best", best)
        for old in complete[: -self._keep]:
            if old.name != best:
                shutil.rmtree(old)


def resolve(path: Path) -> Path:
    """A checkpoint directory from one, a pointer to one, or the run directory that holds its latest.

    Raises:
        UserError: there is nothing of the kind.
    """
    if (path / "checkpoints").is_dir():
        pointer = path / "checkpoints" / "latest"
        if not pointer.is_file():
            raise UserError(f"{path} has no checkpoint yet")
        path = pointer
    if path.is_file():
        path = path.parent / path.read_text().strip()
    if not path.is_dir():
        raise UserError(f"{path} is no checkpoint: there is no such directory")
    return path


def write_state(directory: Path, state: dict[str, Any]) -> None:
    """Nested dicts with arrays -> trainer.json and trainer.safetensors.

    Raises:
        OSError: they could not be written.
    """
    arrays: dict[str, np.ndarray] = {}
    (directory / _STATE_FILES[0]).write_text(json.dumps(_strip(state, "", arrays)))
    try:
        save_file(arrays, str(directory / _STATE_FILES[1]))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read_state(directory: Path) -> dict[str, Any]:
    """The inverse of `write_state`."""
    arrays = load_file(str(directory / _STATE_FILES[1]))
    text = (directory / _STATE_FILES[0]).read_text()
    state: dict[str, Any] = json.loads(
        text, object_hook=lambda value: arrays[value[_ARRAY]] if set(value) == {_ARRAY} else value
    )
    return state


def _strip(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The value with its arrays moved to ``arrays``. (A closure would keep them alive in a cycle.)"""
    if isinstance(value, np.ndarray):
        arrays[path] = np.ascontiguousarray(value)
        return {_ARRAY: path}
    if isinstance(value, dict):
        return {key: _strip(v, f"{path}/{key}", arrays) for key, v in value.items()}
    return value
