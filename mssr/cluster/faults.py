"""Whether a worker that failed is lost, so that another may do better, or would fail again."""

from __future__ import annotations

import re

from mssr.cluster.ray_calls import Failure, WorkerDiedError, WorkerHungError
from mssr.errors import EngineError, TrainingError


def is_lost(failure: Failure) -> bool:
    """Whether the worker, its device or its connection to others is to blame and not what it computed."""
    error = failure.error
    if isinstance(error, (WorkerDiedError, WorkerHungError)):
        return True
    if _is_out_of_memory(error) or "device-side assert" in str(error):
        return False  # and would be again
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"DistError", "RayError", "AcceleratorError"}) or (
        isinstance(error, RuntimeError)
        and bool(re.search(r"gloo|nccl|CUDA error|cuda runtime error", str(error), re.IGNORECASE))
    )


def is_replaceable(failure: Failure) -> bool:
    """Whether an engine that failed is to be replaced by a new one."""
    broken = isinstance(failure.error, EngineError) and not _is_out_of_memory(failure.error)
    return broken or is_lost(failure)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def explained(failure: Failure) -> BaseException:
    """What is raised of a failure that no restart mends."""
    if not _is_out_of_memory(failure.error):
        return failure.error
    if isinstance(failure.error, EngineError):  # which says itself what to do
        error = TrainingError(str(failure))
    else:
        error = TrainingError(
            f"{failure}; lower actor.micro_batch_tokens or actor.head_chunk_tokens, set "
            "actor.activation_checkpointing=true, actor.offload or actor.offload_reference, or lower "
            "rollout.gpu_memory_utilization where engines share the GPUs; mssr plan shows what takes how much"
        )
    error.__cause__ = failure.error
    return error
