"""What a run takes of a machine's own memory, by process, and of the disk."""

from __future__ import annotations

import math
import os

from mssr.config import Config
from mssr.models.rank_memory import GIB, Parts, RankMemory, moment_bytes, value_bytes
from mssr.models.shapes import ModelShape

LIBRARIES: dict[str, tuple[float, float]] = {"cpu": (0.7 * GIB, 1.2 * GIB), "cuda": (3 * GIB, 5 * GIB)}
"""What a rank and an engine (each of its processes) take for Python, torch, CUDA and vLLM, about."""
DRIVER, REWARD_WORKER = 1.0 * GIB, 0.3 * GIB


def host_memory(config: Config, shape: ModelShape, device: str, transport: str, nodes: int = 1) -> Parts:
    """Bytes on the node with most workers, if these are shared out evenly; caches as full as they may be.

    Args:
        transport: by which engines get weights, see `mssr.cluster.turns.transport`.
    """
    actor, rollout = config.actor, config.rollout
    ranks, engines = math.ceil(actor.num_ranks / nodes), math.ceil(rollout.workers / nodes)
    of_rank, of_engine = LIBRARIES[device]
    of_engine *= rollout.tensor_parallel
    weights = value_bytes(config, device) * shape.parameters
    rank = RankMemory(config, shape, device)
    if device == "cpu":
        of_rank += sum(rank.update().values()) - rank.update().get("image features", 0.0)
        of_engine += weights + rollout.kv_cache_gib * GIB
    rewards = REWARD_WORKER * (config.reward.workers or min(8, os.cpu_count() or 1))
    parts = {"driver and rewards": DRIVER + rewards}
    parts |= {"ranks": ranks * of_rank, "engines": engines * of_engine}
    if device == "cuda":
        parts["offloaded"] = ranks * _offloaded(rank)
    if config.trainer.save_every and config.trainer.save_in_background:
        # Every rank copies what it has, though the same is written once.
        parts["checkpoint being written"] = ranks * checkpoint_bytes(config, shape) / rank.shards
    parts["model as it is read"] = 4.0 * shape.parameters
    if transport == "object_store":
        parts["weights in the object store"] = weights
    cached = config.data.image_cache_bytes if shape.vision_config else 0
    return parts | {CACHES: cached * float(ranks + 2 * engines)}


def _offloaded(rank: RankMemory) -> float:
    """What waits for a rank in host memory."""
    actor = rank.config.actor

    def pinned(tensors: list[int], each: float) -> float:
        """Of each tensor torch pins a power of two bytes."""
        return sum(2.0 ** math.ceil(math.log2(n * each / rank.shards)) for n in tensors)

    waiting = 0.0
    if actor.offload == "optimizer":
        waiting = 2 * pinned(rank.tensors, moment_bytes(rank.config) / 2)
    if actor.offload == "all":  # parameters and gradients; states are not pinned
        waiting = rank.moments + 2 * pinned(rank.tensors, rank.m)
    reference = rank.config.needs_reference and (actor.offload == "all" or actor.offload_reference)
    if (actor.offload == "all") if rank.adapters else reference:  # what is beneath adapters is the reference
        waiting += pinned(rank.shape.matrices(rank.config.trains_vision), rank.c)
    return waiting


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
