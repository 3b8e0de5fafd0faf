"""The policy's weights on their way out: gathered, in the dtype of the forward pass, bucket by bucket."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mssr.actor.distributed import full_tensors
from mssr.errors import TransferInterruptedError
from mssr.models.lora import Named, full_weights, is_adapter
from mssr.rollout.checksums import Checksums
from mssr.rollout.heartbeat import beat
from mssr.rollout.transports import Sender
from mssr.rollout.weights import bucket_bytes, pack

logger = logging.getLogger(__name__)


class WeightSender:
    """Weights by their Hugging Face names, whole, tied head included and adapters merged in.

    Args:
        model: the sharded policy.
        dtype: of the forward pass.
        device: where they are gathered, though they may wait elsewhere.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._dtype, self._device = model, dtype, device

    @torch.no_grad()
    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """A collective. A tensor may be the model's own memory."""
        for name, tensor in full_weights(self._model, self._gather):
            beat()
            yield name, tensor.to(self._dtype)

    def send(self, sender: Sender | None, check: bool) -> dict[str, int]:
        """Send all weights; a collective. Who has no receiver, or loses it, gathers with the others.

        Args:
            sender: to this rank's receivers.
            check: take checksums.

        Returns:
            The checksums by name; none if they are not asked for, or there are no receivers.
        """
        checksums, weights = Checksums(), self.weights()
        if sender is not None:
            weights = checksums.of(weights) if check else weights
            try:
                with contextlib.closing(sender):
                    bucket = self._bucket()
                    for layout, used in pack(weights, bucket):
                        sender.send(bucket, used, layout)
                    sender.finish()
            except TransferInterruptedError:  # the call of the engine tells what became of it
                logger.warning("an engine did not get all weights", exc_info=True)
        for _ in weights:
            pass
        return checksums.result()

    def _gather(self, named: Named) -> Iterator[tuple[str, torch.Tensor]]:
        # Adapters in float32, for they are merged so.
        return full_tensors((n, self._ready(v, v.dtype if is_adapter(n) else self._dtype)) for n, v in named)

    def _ready(self, value: Any, dtype: torch.dtype) -> Any:
        """On the device, in the dtype: here and not when it is whole, so that half as much is gathered."""
        if not isinstance(value, DTensor):
            return value.to(self._device, dtype)
        local = value.to_local().to(self._device, dtype)
        mesh, placements = value.device_mesh, value.placements
        shape, stride = value.shape, value.stride()
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    def _bucket(self) -> torch.Tensor:
        state = self._model.state_dict().items()
        sizes = [v.numel() * self._dtype.itemsize for n, v in state if not is_adapter(n)]
        return torch.empty(bucket_bytes(sizes), dtype=torch.uint8, device=self._device)
