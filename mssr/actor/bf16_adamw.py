"""AdamW for parameters that are bfloat16 and have no float32 copy.

bfloat16 has 8 significant bits: a step of less than 1/512 of a parameter would be rounded away each time.
Two ways to keep it; the arithmetic is float32 in both, and so is what is rounded:

- stochastic (arXiv 2010.06192): rounded up or down at random, up with the probability that makes the result
  right on average. Parameter and both moments are bfloat16: 6 bytes a parameter.
- Kahan's compensation: what the rounding of a parameter takes away is kept beside it, exactly, as the 16
  bits that bfloat16 has less than float32. The first moment is bfloat16; the second is float32, because it
  changes by a share of 1 - beta2 a step, which bfloat16 rounds away: 10 bytes a parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mssr.actor.optimizers import LocalAdamW, adamw_step


class StochasticAdamW(LocalAdamW):
    """AdamW whose parameters and moments are bfloat16, rounded stochastically.

    The noise is a function of seed, rank, number of the parameter and its number of steps, so that a run that
    is resumed goes on as it would have, and nothing has to be saved.

    Args:
        seed: of the run.
        rank: shards are rounded with noise of their own.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], *, seed: int, rank: int, **options: Any
    ) -> None:
        super().__init__(parameters, **options)
        self._seed, self._rank = seed, rank
        self._generator = torch.Generator()

    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}

    def begin_parameter(self, number: int, step: int, device: torch.device) -> None:
        if self._generator.device != device:
            self._generator = torch.Generator(device)
        digest = hashlib.sha256(f"{self._seed} {self._rank} {number} {step}".encode()).digest()
        self._generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def step_rows(
        self, rows: Mapping[str, torch.Tensor], step: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        values = adamw_step(rows, step, group)
        for name, value in zip(("parameter", "exp_avg", "exp_avg_sq"), values, strict=True):
            rows[name].copy_(round_stochastically(value, self._generator))


class KahanAdamW(LocalAdamW):
    """AdamW whose parameters are bfloat16, with what they lack of float32 beside them."""

    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
            "compensation": torch.zeros_like(parameter, dtype=torch.int16),
        }

    def step_rows(
        self, rows: Mapping[str, torch.Tensor], step: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        whole = join(rows["parameter"], rows["compensation"])
        parameter, mean, square = adamw_step({**rows, "parameter": whole}, step, group)
        for name, value in zip(("parameter", "compensation"), split(parameter), strict=True):
            rows[name].copy_(value)
        rows["exp_avg"].copy_(mean)
        rows["exp_avg_sq"].copy_(square)


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 -> one of the two bfloat16 around it, the nearer one more often: right on average.

    What is bfloat16 already stays as it is.

    Args:
        values: finite.
        generator: on the device of the values.
    """
    noise = torch.randint(
        0, 2**16, values.shape, generator=generator, dtype=torch.int32, device=values.device
    )
    # bfloat16 is the upper half of float32's bits. Magnitude and bits grow alike, over the exponent's too.
    bits = (values.view(torch.int32) + noise) & ~0xFFFF
    return bits.view(torch.float32).to(torch.bfloat16)


def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 -> the nearest bfloat16, and int16 with which `join` gives the value back, bit for bit."""
    bits = values.view(torch.int32)
    rounded = (bits + 2**15) & ~0xFFFF
    return rounded.view(torch.float32).to(torch.bfloat16), (bits - rounded).to(torch.int16)


def join(rounded: torch.Tensor, compensation: torch.Tensor) -> torch.Tensor:
    """The float32 that `split` has split."""
    bits = rounded.float().view(torch.int32) + compensation.int()
    return bits.view(torch.float32)
