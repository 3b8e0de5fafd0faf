"""AdamW that keeps less beside a parameter than torch's does, on the shard that this rank holds.

bfloat16 has 8 significant bits: a step of less than 1/512 of a parameter would be rounded away each time. Two
ways to train bfloat16 parameters all the same; the arithmetic is float32 in both, and so is what is rounded:

- stochastic (arXiv 2010.06192): rounded up or down at random, up with the probability that makes the result
  right on average. Parameter and both moments are bfloat16: 6 bytes a parameter.
- Kahan's compensation: what the rounding of a parameter takes away is kept beside it, exactly, as the 16
  bits that bfloat16 has less than float32. The first moment is bfloat16; the second is float32, because it
  changes by a share of 1 - beta2 a step, which bfloat16 rounds away: 10 bytes a parameter.

Float32 parameters may have moments of 8 bits (arXiv 2110.02861), with torchao's quantisation and step: a code
an element and a float32 scale a block. torchao makes blocks of a rank's shard; here a block lies within a row
of the whole parameter, so that a checkpoint loads, unchanged, on another number of ranks.
"""

from __future__ import annotations

import functools
import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from mssr.actor.distributed import local_tensor

_CHUNK = 2**24
"""Elements that are stepped at the same time, so that their float32 copies take little memory."""
MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK_SIZES = range(256, 31, -1)
MIN_ELEMENTS = 4096
"""What is smaller has no 8-bit moments, as in bitsandbytes."""

Rows = dict[str, torch.Tensor]
"""By name, the same (R, ...) rows of "parameter", "gradient" and every tensor of the state."""


class LocalAdamW(torch.optim.Optimizer):
    """Steps one parameter at a time, and of it so many rows at a time.

    As with torch's, a parameter's state has ``step``, a () float32 on the CPU.

    Args:
        options: lr, betas, weight_decay, eps.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **options: Any) -> None:
        super().__init__(parameters, options)
        self._numbers = {p: k for k, p in enumerate(self.param_groups[0]["params"])}

    @abstractmethod
    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """The state before the first step, every tensor with the parameter's rows, sharded alike."""

    @abstractmethod
    def step_rows(self, rows: Rows, step: torch.Tensor, group: dict[str, Any]) -> None:
        """Step some rows in place, with the options of the group; ``step`` counts this one, too."""

    def begin_parameter(self, number: int, step: int, device: torch.device) -> None:
        """Called before the rows of a parameter, by its number in the order of all."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        [group] = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state.update(self.new_state(parameter))
            state["step"] += 1
            self.begin_parameter(self._numbers[parameter], int(state["step"]), parameter.device)
            tensors = {"parameter": parameter, "gradient": parameter.grad, **state}
            del tensors["step"]
            for rows in _chunks({name: local_tensor(tensor) for name, tensor in tensors.items()}):
                self.step_rows(rows, state["step"], group)


class StochasticAdamW(LocalAdamW):
    """Parameters and moments are bfloat16, rounded stochastically.

    The noise is a function of the run's seed, number of the shard, of the parameter and its number of steps:
    replicas stay equal, a run that is resumed goes on as it would have, and nothing has to be saved.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], *, seed: int, shard: int, **options: Any
    ) -> None:
        super().__init__(parameters, **options)
        self._seed, self._shard = seed, shard
        self._generator = torch.Generator()

    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(parameter) for name in MOMENTS}

    def begin_parameter(self, number: int, step: int, device: torch.device) -> None:
        if self._generator.device != device:
            self._generator = torch.Generator(device)
        digest = hashlib.sha256(f"{self._seed} {self._shard} {number} {step}".encode()).digest()
        self._generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def step_rows(self, rows: Rows, step: torch.Tensor, group: dict[str, Any]) -> None:
        values = adamw_step(rows, step, group)
        for name, value in zip(("parameter", *MOMENTS), values, strict=True):
            rows[name].copy_(round_stochastically(value, self._generator))


class KahanAdamW(LocalAdamW):
    """Parameters are bfloat16, with what they lack of float32 beside them."""

    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
            "compensation": torch.zeros_like(parameter, dtype=torch.int16),
        }

    def step_rows(self, rows: Rows, step: torch.Tensor, group: dict[str, Any]) -> None:
        whole = join(rows["parameter"], rows["compensation"])
        parameter, *moments = adamw_step({**rows, "parameter": whole}, step, group)
        values = (*split(parameter), *moments)
        for name, value in zip(("parameter", "compensation", *MOMENTS), values, strict=True):
            rows[name].copy_(value)


class AdamW8bit(LocalAdamW):
    """Parameters are float32 and moments of 8 bits: about 2 bytes a parameter for both.

    A parameter whose rows have no blocks of 32 to 256 elements (norms, biases, adapters of a small rank)
    keeps its moments in float32.
    """

    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        block = block_size(parameter)
        if block is None:
            return {name: torch.zeros_like(parameter) for name in MOMENTS}
        row_blocks = parameter.flatten(1)[:, : parameter.shape[1:].numel() // block]
        # As long as the scales are 0 any code means 0.
        state = {}
        for name in MOMENTS:
            state[f"{name}_codes"] = torch.zeros_like(parameter, dtype=torch.uint8)
            state[f"{name}_scales"] = torch.zeros_like(row_blocks, dtype=torch.float32)
        return state

    def step_rows(self, rows: Rows, step: torch.Tensor, group: dict[str, Any]) -> None:
        from torchao.optim.adam import single_param_adam
        from torchao.optim.subclass_8bit import OptimState8bit

        moments = []
        for name in MOMENTS:
            if name in rows:
                moments.append(rows[name])
                continue
            codes, scales, signed = rows[f"{name}_codes"], rows[f"{name}_scales"], name == "exp_avg"
            moments.append(OptimState8bit(codes, scales.view(-1), _qmap(signed, codes.device), signed))
        options = *group["betas"], group["weight_decay"], group["eps"]
        before = rows["parameter"], rows["gradient"], step, *moments, None
        single_param_adam(
            *before, torch.tensor(group["lr"]), *options, IS_ADAMW=True, BF16_STOCHASTIC_ROUND=False
        )


def adamw_step(
    rows: Rows, step: torch.Tensor, group: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new float32 parameter and moments, from rows of any dtype, which are left as they are."""
    parameter, gradient = rows["parameter"].float(), rows["gradient"].float()
    (beta1, beta2), lr, t = group["betas"], group["lr"], step.item()
    mean = torch.lerp(rows["exp_avg"].float(), gradient, 1 - beta1)
    square = torch.lerp(rows["exp_avg_sq"].float(), gradient.square(), 1 - beta2)
    denominator = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
    # The order of torch's: first the decay, then the step.
    parameter = parameter * (1 - lr * group["weight_decay"])
    parameter.addcdiv_(mean, denominator, value=-lr / (1 - beta1**t))
    return parameter, mean, square


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32, finite -> one of the two bfloat16 around it, the nearer one more often: right on average.

    What is bfloat16 already stays as it is.
    """
    options: Any = {"dtype": torch.int32, "device": values.device}
    noise = torch.randint(0, 2**16, values.shape, generator=generator, **options)
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


def block_size(parameter: torch.Tensor) -> int | None:
    """The largest of `BLOCK_SIZES` that divides a row of the whole parameter; None: no 8-bit moments."""
    if parameter.ndim < 2 or parameter.numel() < MIN_ELEMENTS:
        return None
    row = parameter.numel() // len(parameter)
    return next((size for size in BLOCK_SIZES if row % size == 0), None)


@functools.cache
def _qmap(signed: bool, device: torch.device) -> torch.Tensor:
    """(256,) float32: what each code stands for, as a share of the scale."""
    from torchao.optim.subclass_8bit import get_qmap_signed, get_qmap_unsigned

    return torch.tensor(get_qmap_signed() if signed else get_qmap_unsigned(), device=device)


def _chunks(tensors: Rows) -> Iterator[Rows]:
    """The same rows of all of them, a view, about `_CHUNK` elements of the parameter at a time."""
    parameter = tensors["parameter"]
    # A rank may have no rows.
    size = max(1, _CHUNK * len(parameter) // max(1, parameter.numel()))
    for start in range(0, len(parameter), size):
        yield {name: tensor[start : start + size] for name, tensor in tensors.items()}
