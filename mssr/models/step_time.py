"""How long a step is likely to take on GPUs of a kind: operations and bytes over what the GPU can do.

All of it is arithmetic with the assumptions below; a run's own records (`timing/*`, `perf/*`) replace it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mssr.config import Config
from mssr.errors import UserError
from mssr.models.cost import CostModel, Operations
from mssr.models.gpus import GpuKind
from mssr.models.memory import EngineMemory
from mssr.models.rank_memory import Workload, value_bytes
from mssr.models.shapes import ModelShape

TRAINING = 0.30
"""Share of peak operations that passes of the ranks reach, those that are computed again counted. EasyR1 has
an MFU of 23% on 8 H100 at 7B with activation checkpointing, which makes 31%."""
PREFILL = 0.40
"""The same of an engine's prefill."""
DECODING = 0.60
"""Share of the memory's bandwidth that decoding reaches."""
DECODE_STEP_S = 0.004
"""What a step of the engine takes besides, on the host and to sample."""
LONGEST = 3.0
"""The longest response of a step, in mean lengths: as many steps an engine makes at least."""
TRANSFER = {"object_store": 0.5e9, "broadcast": 2.8e9, "ipc": 4e9}
"""Bytes a second from ranks to engines. broadcast: verl's 5.5 to 6.0 s for 7B over NCCL; ipc: with falling
asleep and waking up."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by phase."""

    generate: float
    score: float
    """Log-probs before the step and of the reference, as far as they are not computed during generation."""
    update: float
    sync: float
    mfu: float
    """Model operations of forward and backward (nothing that is computed again) over seconds of the update
    and peak."""

    @property
    def seconds(self) -> float:
        return self.generate + self.score + self.update + self.sync


def step_time(
    config: Config, shape: ModelShape, kind: GpuKind, colocated: bool, transport: str, work: Workload
) -> StepTime:
    """Of a training step, without validation and checkpoints.

    Args:
        transport: by which engines get weights, see `mssr.cluster.turns.transport`.

    Raises:
        UserError: the GPU has no bfloat16, for which the estimate is.
    """
    if kind.bf16_flops is None:
        raise UserError(f"{kind.name} has no bfloat16; there is no estimate of its speed")
    actor, rollouts = config.actor, config.rollout.rollouts_per_step
    operations = _operations(shape, work)
    model = operations.training(frozen_weights=bool(actor.lora.rank), frozen_tower=not config.trains_vision)
    # A frozen tower runs once.
    forward = operations.forward - (0.0 if config.trains_vision else operations.vision)
    again = config.kl_probe_fraction + (1 if actor.activation_checkpointing else 0)
    scored = 1 - 1 / actor.updates_per_step + (1 if config.needs_reference else 0)
    peak = actor.num_ranks * kind.bf16_flops / rollouts
    update = (model + again * forward) / (peak * TRAINING)
    score = scored * forward / (peak * TRAINING)
    generate = _generation(config, shape, kind, colocated, work)
    early = actor.score_early == "always" or (actor.score_early == "auto" and not colocated)
    if early and not config.rollout.lag:
        score = max(0.0, score - generate)
    if config.rollout.lag:
        generate = max(0.0, generate - score - update)
    sync = value_bytes(config, "cuda") * shape.parameters / TRANSFER[transport]
    return StepTime(generate, score, update, sync, mfu=model / (update * peak))


def _operations(shape: ModelShape, work: Workload) -> Operations:
    """Of a forward pass over one sequence."""
    cost, merged = CostModel(shape), shape.vision_config.merged if shape.vision_config else 1
    patches = np.array([work.image_tokens * merged])
    return Operations(
        matrices=float(cost.per_token * work.tokens + cost.per_response_token * work.response_tokens),
        attention=float(cost.per_square * work.tokens**2),
        vision=float(cost.images_forward(patches)[0]),
    )


def _generation(config: Config, shape: ModelShape, kind: GpuKind, colocated: bool, work: Workload) -> float:
    assert kind.bf16_flops is not None
    rollout = config.rollout
    engine = EngineMemory.of(config, shape, kind.memory_bytes, colocated)
    responses = rollout.rollouts_per_step / rollout.workers
    prompt = Workload(work.image_tokens, work.text_tokens, 0)
    compute = kind.bf16_flops * PREFILL * rollout.tensor_parallel
    prefill = responses / config.responses_per_prompt * _operations(shape, prompt).forward / compute
    length = prompt.tokens + work.response_tokens / 2
    room = max(1.0, min(engine.sequences(length), engine.slots))
    longest = min(rollout.max_response_length, LONGEST * work.response_tokens)
    steps = max(responses * work.response_tokens / room, longest)
    together = responses * work.response_tokens / steps
    moved = (engine.weights + together * length * engine.token) / (kind.bandwidth * DECODING)
    computed = 2 * (shape.text_config.multiplied + shape.text_config.embedding) * together / compute
    return prefill + steps * (max(moved, computed) + DECODE_STEP_S)
