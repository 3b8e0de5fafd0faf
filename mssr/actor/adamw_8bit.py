"""AdamW with moments in 8 bits (arXiv 2110.02861), with torchao's quantisation and step.

A moment is a code of 8 bits an element and a float32 scale a block. torchao makes blocks of a rank's shard;
here a block lies within a row of the whole parameter, so that codes and scales are sharded like the parameter
and a checkpoint loads, unchanged, on another number of ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed import tensor as dtensor
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

from mssr.actor.optimizers import LocalAdamW

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Name -> whether it has a sign."""
BLOCK_SIZES = range(256, 31, -1)
MIN_ELEMENTS = 4096
"""What is smaller is kept in float32, as bitsandbytes does."""


class AdamW8bit(LocalAdamW):
    """AdamW with float32 parameters and 8-bit moments: about 2 bytes a parameter for both.

    A parameter whose rows have no blocks of 32 to 256 elements (norms, biases, adapters of a small rank)
    keeps its moments in float32.
    """

    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        block = block_size(parameter)
        if block is None:
            return {name: torch.zeros_like(parameter) for name in MOMENTS}
        state = {}
        for name in MOMENTS:
            # As long as the scales are 0 any code means 0.
            state[f"{name}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            blocks = parameter[0].numel() // block
            state[f"{name}_scales"] = _zeros_like_rows(parameter, blocks)
        return state

    def step_rows(
        self, rows: Mapping[str, torch.Tensor], step: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        moments = []
        for name, signed in MOMENTS.items():
            if name in rows:
                moments.append(rows[name])
                continue
            codes, scales = rows[f"{name}_codes"], rows[f"{name}_scales"]
            moments.append(OptimState8bit(codes, scales.view(-1), _qmap(signed, codes.device), signed))
        single_param_adam(
            rows["parameter"],
            rows["gradient"],
            step,
            *moments,
            None,
            torch.tensor(group["lr"]),
            *group["betas"],
            group["weight_decay"],
            group["eps"],
            IS_ADAMW=True,
            BF16_STOCHASTIC_ROUND=False,
        )


def block_size(parameter: torch.Tensor) -> int | None:
    """The largest of `BLOCK_SIZES` that divides a row of the whole parameter; None: it stays float32."""
    if parameter.ndim < 2 or parameter.numel() < MIN_ELEMENTS:
        return None
    row = parameter.numel() // len(parameter)
    return next((size for size in BLOCK_SIZES if row % size == 0), None)


def _zeros_like_rows(parameter: torch.Tensor, columns: int) -> torch.Tensor:
    """(rows, columns) float32, its rows sharded like those of a parameter."""
    if not isinstance(parameter, dtensor.DTensor):
        return torch.zeros(len(parameter), columns, device=parameter.device)
    return dtensor.zeros(
        len(parameter),
        columns,
        dtype=torch.float32,
        device_mesh=parameter.device_mesh,
        placements=parameter.placements,
    )


@functools.cache
def _qmap(signed: bool, device: torch.device) -> torch.Tensor:
    """(256,) float32: what each code stands for, as a share of the scale."""
    return torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), device=device)
