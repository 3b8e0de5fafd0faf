"""The initial weights: read on rank 0 alone, and handed to all ranks part by part.

No other rank ever holds a whole copy of the model: it is made without memory, and every part gets its
weights just before it is sharded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from mssr.errors import UserError
from mssr.rollout.heartbeat import beat


class InitialWeights:
    """Parameters and buffers by name, of rank 0. Construction and `fill` are collectives.

    Args:
        load: gives the whole model, on CPU; called on rank 0.
        device: of the tensors that `fill` makes.

    Raises:
        UserError: what ``load`` raises, on all ranks.
    """

    def __init__(self, load: Callable[[], nn.Module], rank: int, device: torch.device) -> None:
        self._rank = rank
        self._device = device
        self._tensors: dict[str, torch.Tensor] = {}
        problem: list[str | None] = [None]
        if rank == 0:
            try:
                model = load()
            except UserError as error:
                problem = [str(error)]
            else:
                self._tensors = {n: p.detach() for n, p in model.named_parameters()}
                self._tensors |= dict(model.named_buffers())
        dist.broadcast_object_list(problem, src=0, device=torch.device("cpu"))
        if problem[0] is not None:
            raise UserError(problem[0])

    def filler(self, model: nn.Module, last: bool) -> Callable[[nn.Module], None]:
        """A function that gives parts of a model their weights, in place and in their own dtypes.

        Args:
            model: on the meta device, with names like those of the model that was loaded.
            last: let go of what was handed out, because no other model needs it.
        """
        names = {t: n for n, t in (*model.named_parameters(), *model.named_buffers())}

        def fill(part: nn.Module) -> None:
            made: dict[torch.Tensor, torch.Tensor] = {}
            for module in part.modules():
                own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
                for key, tensor in own:
                    if not tensor.is_meta:
                        continue  # filled before
                    if tensor not in made:  # tied ones are one
                        made[tensor] = self._receive(names[tensor], tensor, last)
                        if isinstance(tensor, nn.Parameter):
                            made[tensor] = nn.Parameter(made[tensor], tensor.requires_grad)
                    setattr(module, key, made[tensor])

        return fill

    def _receive(self, name: str, like: torch.Tensor, last: bool) -> torch.Tensor:
        beat()
        if self._rank == 0:
            source = self._tensors.pop(name) if last else self._tensors[name]
            assert source.shape == like.shape
            value = source.to(self._device, like.dtype).contiguous()
        else:
            value = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        dist.broadcast(value, src=0)
        return value
