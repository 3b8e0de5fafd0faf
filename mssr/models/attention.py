"""Attention over sequences that lie end to end: no mask is ever built.

On a GPU in half precision it is the variable-length flash kernel of torch (`torch.nn.attention.varlen`);
elsewhere, and in float32, which that kernel does not know, a loop over the sequences, in which those of
equal length that follow each other (the windows of the vision tower) are one call. The cost is the sum
of the squared lengths in both cases; a dense block mask costs the square of the sum, in time and memory.

transformers calls it through its `AttentionInterface`, for the language model (causal, grouped keys) as
for the vision tower, which gives its segments as ``cu_seqlens`` to what has "flash" in its name.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

NAME = "mssr_flash_varlen"


def use_varlen_attention(model: Any) -> None:
    """Make a transformers model compute packed passes with `varlen_attention`. It then takes no padding.

    The name is set when the model is loaded: before, transformers would look for a package with that
    name, because of the "flash" in it.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    parts = [getattr(model.config, name) for name in model.config.sub_configs]
    for config in (model.config, *parts):
        config._attn_implementation = NAME


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form of transformers' interface, queries and keys being of the same tokens.

    Args:
        query: (1, heads, S, D).
        key: (1, key heads, S, D), as ``value``.
        attention_mask: None.
        scaling: of the products, 1/sqrt(D) if None.
        is_causal: whether a token sees the earlier ones of its sequence only; None asks the module.
        cu_seq_lens_q: (sequences + 1,) int32 where each sequence starts, and S; None if it is only one.
        max_length_q: tokens of the longest sequence.

    Returns:
        (1, S, heads, D), and None for the weights.
    """
    assert attention_mask is None and sliding_window is None and len(query) == 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
        max_length_q = len(q)
    causal = bool(module.is_causal if is_causal is None else is_causal)
    if _kernel_takes(q):
        sequences: Any = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        window = (-1, 0) if causal else (-1, -1)
        grouped = q.shape[1] != k.shape[1]
        out = varlen_attn(q, k, v, *sequences, scale=scaling, window_size=window, enable_gqa=grouped)
        assert isinstance(out, torch.Tensor)
    else:
        out = _by_segment(q, k, v, cu_seq_lens_q.tolist(), causal, scaling)
    return out[None], None


def _kernel_takes(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)


def _by_segment(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], causal: bool, scale: float | None
) -> torch.Tensor:
    """(S, heads, D), from q (S, heads, D) and k and v (S, key heads, D)."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    runs = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    parts = zip(*(torch.split(x, sizes) for x in (q, k, v)), strict=True)
    outs = []
    for (length, count), part in zip(runs, parts, strict=True):
        queries, keys, values = (x.unflatten(0, (count, length)).transpose(1, 2) for x in part)
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def _no_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> None:
    if attention_mask is not None:
        raise ValueError("packed attention takes no padding and no mask")
