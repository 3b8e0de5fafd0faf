"""The optimizers of the policy, their learning rate, and where their states wait.

All of them are AdamW (arXiv 1711.05101), with g the gradient and t the number of steps:

    m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
    p = p - lr (weight_decay p + m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps))

They differ in how p, m and v are stored. docs/memory.md has the table.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from mssr.actor.adamw import AdamW8bit, KahanAdamW, StochasticAdamW
from mssr.actor.distributed import local_tensor
from mssr.config import Config


def make_optimizer(config: Config, parameters: list[torch.nn.Parameter], shard: int) -> torch.optim.Optimizer:
    """What ``actor.optimizer``, ``actor.master_dtype`` and ``actor.rounding`` say, over local shards.

    Args:
        shard: number of the shards that this rank holds, the same in every replica.
    """
    actor = config.actor
    options: dict[str, Any] = {
        "lr": actor.lr,
        "betas": (actor.betas[0], actor.betas[1]),
        "weight_decay": actor.weight_decay,
        "eps": 1e-8,
    }
    if actor.optimizer == "adamw_8bit":
        return AdamW8bit(parameters, **options)
    if actor.master_dtype == "float32":
        # Without fused, DTensors are stepped one by one, each in a dozen operations.
        return torch.optim.AdamW(parameters, fused=True, **options)
    if actor.rounding == "kahan":
        return KahanAdamW(parameters, **options)
    return StochasticAdamW(parameters, seed=config.seed, shard=shard, **options)


def with_offload(
    optimizer: torch.optim.Optimizer, offload: str, device: torch.device
) -> torch.optim.Optimizer | OffloadedOptimizer:
    """The optimizer as ``actor.offload`` wants it. On CPU there is nothing to move, and with "all" its states
    are on the host in any case, beside the parameters."""
    if offload == "optimizer" and device.type == "cuda":
        return OffloadedOptimizer(optimizer)
    return optimizer


def learning_rate(config: Config, step: int) -> float:
    """Warm-up, then the schedule; a function of the step number, so nothing is to be saved."""
    actor = config.actor
    if step < actor.warmup_steps:
        return actor.lr * ((step + 1) / (actor.warmup_steps + 1))
    progress = (step - actor.warmup_steps) / max(1, config.trainer.steps - actor.warmup_steps)
    factors = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }
    return actor.lr * factors[actor.lr_schedule]


class OffloadedOptimizer:
    """An optimizer whose states wait in host memory, and are on the device only while they are needed.

    It steps the parameters part by part, which changes nothing, because each is stepped by itself.

    A state keeps its tensor on the device, whose memory is freed meanwhile; the copy in host memory is pinned
    where there is a GPU, so that it is moved at full speed and in the order of the device's other work.

    Args:
        optimizer: with one group of parameters.
        part_bytes: about how much of the states is on the device at the same time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, part_bytes: int = 2**30) -> None:
        self.param_groups = optimizer.param_groups
        [self._group] = self.param_groups
        self.zero_grad = optimizer.zero_grad
        self._optimizer = optimizer
        self._part_bytes = part_bytes
        self._host: dict[tuple[torch.Tensor, str], torch.Tensor] = {}

    def step(self) -> None:
        """Like the optimizer's."""
        everything = self._group["params"]
        try:
            for part in self._parts(everything):
                self._group["params"] = part
                with self.on_device():
                    self._optimizer.step()
        finally:
            self._group["params"] = everything

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """All states are on the device, to be saved, or loaded into."""
        self._fetch()
        try:
            yield
        finally:
            self._put()

    def _parts(self, parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        part: list[torch.Tensor] = []
        for parameter in parameters:
            # A state is at most two float32 an element.
            if part and 8 * sum(local_tensor(p).numel() for p in [*part, parameter]) > self._part_bytes:
                yield part
                part = []
            part.append(parameter)
        yield part

    def _states(self) -> Iterator[tuple[tuple[torch.Tensor, str], torch.Tensor]]:
        """((parameter, name), what this rank holds of the state) of the group."""
        for parameter in self._group["params"]:
            for name, value in self._optimizer.state.get(parameter, {}).items():
                if name != "step":  # a number
                    yield (parameter, name), local_tensor(value)

    @torch.no_grad()
    def _put(self) -> None:
        for key, state in self._states():
            if key not in self._host:
                self._host[key] = torch.empty(state.shape, dtype=state.dtype, pin_memory=state.is_cuda)
            self._host[key].copy_(state, non_blocking=True)
            state.untyped_storage().resize_(0)

    @torch.no_grad()
    def _fetch(self) -> None:
        for key, state in self._states():
            if state.nbytes and not state.untyped_storage().nbytes():
                state.untyped_storage().resize_(state.nbytes)
                state.copy_(self._host[key], non_blocking=True)
