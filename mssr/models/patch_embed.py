"""The first layer of the vision tower as the matrix product that it is."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional as F


def use_linear_patch_embed(model: Any) -> None:
    """Make a transformers Qwen2.5-VL embed its patches with one matrix product.

    A patch fills the kernel of its convolution, so each gives one value a channel, and patches come as rows
    in the order of the kernel's weights. conv3d takes several times as long for that.
    """
    embed = model.model.visual.patch_embed
    embed.forward = functools.partial(_embed, embed)


def _embed(embed: Any, patches: torch.Tensor) -> torch.Tensor:
    """(V, channels * temporal_patch * patch * patch) -> (V, width)."""
    weight = embed.proj.weight
    return F.linear(patches.to(weight.dtype), weight.flatten(1), embed.proj.bias)
