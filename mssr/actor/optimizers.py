"""The optimizers of the policy: torch's AdamW, and those that keep less beside a parameter.

All of them are AdamW (arXiv 1711.05101), with g the gradient and t the number of steps:

    m = beta1 m + (1 - beta1) g             v = beta2 v + (1 - beta2) g^2
    p = p - lr (weight_decay p + m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps))

They differ in how p, m and v are stored. docs/memory.md has the table.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch

from mssr.actor.distributed import local_tensor
from mssr.config import Config

EPS = 1e-8
_CHUNK = 2**24
"""Elements that are stepped at the same time, so that their float32 copies take little memory."""


class Optimizer(Protocol):
    """What the update step calls."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def step(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


def make_optimizer(config: Config, parameters: list[torch.nn.Parameter], rank: int) -> torch.optim.Optimizer:
    """What ``actor.optimizer``, ``actor.master_dtype`` and ``actor.rounding`` say, over local shards."""
    actor = config.actor
    options: dict[str, Any] = {
        "lr": actor.lr,
        "betas": (actor.betas[0], actor.betas[1]),
        "weight_decay": actor.weight_decay,
        "eps": EPS,
    }
    if actor.optimizer == "adamw_8bit":
        from mssr.actor.adamw_8bit import AdamW8bit  # needs torchao

        return AdamW8bit(parameters, **options)
    if actor.master_dtype == "bfloat16":
        from mssr.actor.bf16_adamw import KahanAdamW, StochasticAdamW

        if actor.rounding == "kahan":
            return KahanAdamW(parameters, **options)
        return StochasticAdamW(parameters, seed=config.seed, rank=rank, **options)
    # Without fused, DTensors are stepped one by one, each in a dozen operations.
    return torch.optim.AdamW(parameters, fused=True, **options)


class LocalAdamW(torch.optim.Optimizer):
    """AdamW one parameter at a time, and of it so many rows at a time, on the shard that this rank holds.

    Subclasses say what is stored (`new_state`) and step some rows of it (`step_rows`). As with torch's, a
    parameter's state has ``step``, a () float32 on the CPU.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        eps: float = EPS,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}
        super().__init__(parameters, defaults)
        everything = [p for group in self.param_groups for p in group["params"]]
        self._numbers = {p: k for k, p in enumerate(everything)}

    @abstractmethod
    def new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """The state before the first step, every tensor with the parameter's rows, sharded alike."""

    @abstractmethod
    def step_rows(
        self, rows: Mapping[str, torch.Tensor], step: torch.Tensor, group: Mapping[str, Any]
    ) -> None:
        """Step some rows in place.

        Args:
            rows: (R, ...) of "parameter", "gradient" and every tensor of the state.
            step: () how many steps there are with this one.
            group: lr, betas, weight_decay, eps.
        """

    def begin_parameter(self, number: int, step: int, device: torch.device) -> None:
        """Called before the rows of a parameter, by its number in the order of all."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
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


def adamw_step(
    rows: Mapping[str, torch.Tensor], step: torch.Tensor, group: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new float32 parameter and moments from tensors "parameter", "gradient", "exp_avg" and "exp_avg_sq"
    of any dtype; these are left as they are."""
    parameter, gradient = rows["parameter"].float(), rows["gradient"].float()
    (beta1, beta2), lr, t = group["betas"], group["lr"], step.item()
    mean = torch.lerp(rows["exp_avg"].float(), gradient, 1 - beta1)
    square = torch.lerp(rows["exp_avg_sq"].float(), gradient.square(), 1 - beta2)
    denominator = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
    # The order of torch's: first the decay, then the step.
    parameter = parameter * (1 - lr * group["weight_decay"])
    parameter.addcdiv_(mean, denominator, value=-lr / (1 - beta1**t))
    return parameter, mean, square


def _chunks(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The same rows of all of them, a view, about `_CHUNK` elements of the parameter at a time."""
    parameter = tensors["parameter"]
    if not parameter.numel():
        return  # fewer rows than ranks
    if parameter.ndim == 0:
        tensors = {name: tensor[None] for name, tensor in tensors.items()}
        parameter = tensors["parameter"]
    size = max(1, _CHUNK * len(parameter) // parameter.numel())
    for start in range(0, len(parameter), size):
        yield {name: tensor[start : start + size] for name, tensor in tensors.items()}
