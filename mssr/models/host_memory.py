"""What a run takes of a machine's own memory, by process, and of the disk."""

from __future__ import annotations

import math
import os

from mssr.config import Config
from mssr.models.memory import GIB, Parts, RankMemory, moment_bytes, value_bytes
from mssr.models.shapes import ModelShape
from mssr.models.step_time import transfer

LIBRARIES: dict[str, tuple[float, float]] = {"cpu": (0.7 * GIB, 1.2 * GIB), "cuda": (3 * GIB, 5 * GIB)}
"""What a rank and an engine (each of its processes) take for Python, torch, CUDA and vLLM, about."""
DRIVER, REWARD_WORKER = 1.0 * GIB, 0.3 * GIB


def host_memory(config: Config, shape: ModelShape, device: str, colocated: bool, nodes: int = 1) -> Parts:
    """Bytes on the node with most workers, if these are shared out evenly; caches as full as they may be."""
    actor, rollout = config.actor, config.rollout
    ranks, engines = math.ceil(actor.num_ranks / nodes), math.ceil(rollout.workers / nodes)
    of_rank, of_engine = LIBRARIES[device]
    of_engine *= rollout.tensor_parallel
    weights = value_bytes(config, device) * shape.parameters
    rank = RankMemory(config, shape, device)
    trained = rank.trained / rank.shards
    if device == "cpu":
        of_rank += sum(rank.update().values()) - rank.update().get("image features", 0.0)
        of_engine += weights + rollout.kv_cache_gib * GIB
    parts = {"driver and rewards": DRIVER + REWARD_WORKER * (config.reward.workers or min(8, _cores()))}
    parts |= {"ranks": ranks * of_rank, "engines": engines * of_engine}
    if device == "cuda":
        states = trained * moment_bytes(config)
        waiting = {"none": 0.0, "optimizer": states, "all": states + 2 * rank.m * trained}[actor.offload]
        if (
            config.needs_reference
            and not rank.adapters
            and (actor.offload_reference or actor.offload == "all")
        ):
            waiting += rank.c * rank.sharded / rank.shards
        parts["offloaded"] = ranks * waiting
    if config.trainer.save_every and config.trainer.save_in_background:
        parts["checkpoint being written"] = ranks * checkpoint_bytes(config, shape) / actor.num_ranks
    parts["model as it is read"] = 4.0 * shape.parameters
    if transfer(config, colocated) == "object_store" or device == "cpu":
        parts["weights in the object store"] = weights
    cached = config.data.image_cache_bytes
    return parts | {CACHES: cached * float(ranks + 2 * engines)}


CACHES = "encoded prompts (at most)"
"""Of every rank and engine, and in the object store for every engine."""


def checkpoint_bytes(config: Config, shape: ModelShape) -> float:
    """One checkpoint on disk: what is trained and its moments."""
    rank = RankMemory(config, shape, "cpu")
    return rank.trained * (rank.m + moment_bytes(config))


def disk_bytes(config: Config, shape: ModelShape) -> float:
    """The checkpoints that are kept, the best one, and one that is being written."""
    if not config.trainer.save_every:
        return 0.0
    best = 1 if config.data.val and config.trainer.val_every else 0
    return (config.trainer.keep_checkpoints + best + 1) * checkpoint_bytes(config, shape)


def _cores() -> int:
    return os.cpu_count() or 1
