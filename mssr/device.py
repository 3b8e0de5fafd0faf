"""Tensors on their way from the host to a device."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, without waiting for that: a GPU copies it when its turn comes.

    Only pinned memory is copied so. From any other the host waits until the GPU has done all that it was
    asked before. The pinned copy is not used again before it is read, whoever drops it.
    """
    if tensor.device.type == "cpu" and device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
