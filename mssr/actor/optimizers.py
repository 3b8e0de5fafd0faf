"""The optimizers of the policy, and their learning rate.

All of them are AdamW (arXiv 1711.05101), with g the gradient and t the number of steps:

    m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
    p = p - lr (weight_decay p + m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps))

They differ in how p, m and v are stored. docs/memory.md has the table.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from mssr.actor.adamw import AdamW8bit, KahanAdamW, StochasticAdamW
from mssr.config import Config


def make_optimizer(config: Config, parameters: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    """What ``actor.optimizer``, ``actor.master_dtype`` and ``actor.rounding`` say, over local shards."""
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
    return StochasticAdamW(parameters, seed=config.seed, rank=rank, **options)


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
