"""What the ranks write and read of a checkpoint: sharded, loadable on another number of ranks.

Saving may go on in the background: the state is copied to host memory at once, and a thread of each rank
writes it while training continues. Loading unpickles nothing: tensors are read with ``weights_only``, and
the index of the files, which torch.distributed.checkpoint pickles, through a list of allowed classes.
"""

from __future__ import annotations

import enum
import pickle
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from mssr.errors import first_line
from mssr.models.files import sha256
from mssr.models.lora import is_adapter
from mssr.rollout.heartbeat import SAVE, beat

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": set(
        "ChunkStorageMetadata Metadata MetadataIndex StorageMeta TensorProperties TensorStorageMetadata "
        "_MEM_FORMAT_ENCODING".split()
    ),
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float32", "int16", "uint8"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its name in Python 3.13
}
"""Everything that the index of a checkpoint of ours is made of."""


class ActorCheckpoint:
    """Saves and loads the policy and its optimizer. Every method but `done` and `result` is a collective.

    Args:
        model: whose parameters are saved, by their Hugging Face names; of one with adapters, these alone.
        background: whether `begin` only makes a copy of the state before it returns.
        on_device: within it the optimizer's states are where it left them, see `OffloadedOptimizer`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rank: int,
        background: bool,
        on_device: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._rank = rank
        self._background = background
        self._on_device = on_device
        # Of its own, so that a save in the background meets no collective of the training.
        self._group = dist.new_group(backend="gloo")
        self._directory = Path()
        self._saving: Future[Any] = Future()

    def begin(self, directory: str) -> None:
        """Write the state as it is now."""
        self._directory = Path(directory)
        beat(SAVE)
        save = dcp.async_save if self._background else _save
        with self._on_device():
            self._saving = save(self._state(), checkpoint_id=directory, process_group=self._group)

    def done(self) -> bool:
        """Whether `result` would not wait, but for the checksums."""
        return self._saving.done()

    def result(self) -> dict[str, str]:
        """Wait for what `begin` began; may run in another thread.

        Returns:
            SHA-256 of the files that this rank wrote, by name.

        Raises:
            OSError: it could not be written; the message says why.
        """
        while not self._saving.done():
            beat(SAVE)
            time.sleep(0.05)
        error = self._saving.exception()
        if error is not None:
            raise OSError(_reason(error)) from error
        own = [*self._directory.glob(f"__{self._rank}_*")]
        if self._rank == 0:
            own.append(self._directory / ".metadata")
        return {path.name: sha256(path) for path in own}

    def load(self, directory: str) -> None:
        """Take parameters and optimizer from a directory that was saved on any number of ranks."""
        with self._on_device():
            # Into the tensors themselves, each as its dtype is.
            dcp.load(self._state(), storage_reader=SafeReader(directory), planner=_SafePlanner())

    def _state(self) -> dict[str, Any]:
        """The tensors of model and optimizer, not copies."""
        model = get_model_state_dict(self._model)
        if any(map(is_adapter, model)):
            model = {name: value for name, value in model.items() if is_adapter(name)}
        optimizer = dict(get_optimizer_state_dict(self._model, self._optimizer))
        # Learning rate, betas and the like follow from the config and the step.
        del optimizer["param_groups"]
        return {"model": model, "optimizer": optimizer}


class SafeReader(dcp.FileSystemReader):
    """Reads the index of the files without running what a pickle may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _member(kind: Any, name: str) -> Any:
    """In place of getattr, by which some releases of Python 3.11 pickle the members of an enum."""
    if not (isinstance(kind, enum.EnumMeta) and name in kind.__members__):
        raise pickle.UnpicklingError(f"a checkpoint's index may not ask for {name} of {kind}")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"a checkpoint's index may not hold {module}.{name}")
        return super().find_class(module, name)


class _SafePlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise ValueError(f"a checkpoint of ours holds tensors only, not {read_item.dest_index.fqn}")


def _save(state: dict[str, Any], **options: Any) -> Future[Any]:
    """Like `dcp.async_save`, at once."""
    future: Future[Any] = Future()
    try:
        future.set_result(dcp.save(state, **options))
    except Exception as error:
        future.set_exception(error)
    return future


def load_model_state(state: Mapping[str, torch.Tensor], directory: str) -> None:
    """Fill tensors by Hugging Face name from a checkpoint, in one process without a process group."""
    reader, planner = SafeReader(directory), _SafePlanner()
    dcp.load({"model": dict(state)}, storage_reader=reader, planner=planner, no_dist=True)


def _reason(error: BaseException) -> str:
    """One line: torch.distributed.checkpoint wraps what went wrong on each rank."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, OSError):
            error = cause
        cause = cause.__cause__ or cause.__context__
    return first_line(error)
