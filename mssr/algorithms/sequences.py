"""Helpers for flat ragged tensors: N tokens of S sequences laid end to end, with (S,) lengths.

A length may be 0: an empty sequence has no token, and its sum and mean are 0. Lengths may be on the CPU where
the tokens are on a GPU; they are better there, because what looks at them then waits for nothing.
"""

from __future__ import annotations

import torch

from mssr.device import to_device

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20: exp(20) = 5e8 keeps one absurd token from making the loss infinite.
The gradient is zero beyond it."""


def clamped_log_ratio(log_probs: torch.Tensor, other_log_probs: torch.Tensor) -> torch.Tensor:
    """log pi - log pi_other of every token, within +-`MAX_LOG_RATIO`; differentiable in both."""
    return torch.clamp(log_probs - other_log_probs, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_sums(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(S,) float64 sums, without gradient, of (N,) values; lengths as checked by `check_lengths`.

    Always summed in the same order, so a sequence has the same sum in any micro-batch (atomic adds on a
    GPU would not give that).
    """
    lengths = to_device(lengths.long(), values.device)
    # unsafe=True leaves out torch's own look at the lengths, which `check_lengths` has already had.
    return torch.segment_reduce(values.detach().double(), "sum", lengths=lengths, unsafe=True)


def sequence_means(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Like `sequence_sums`, divided by the length."""
    return sequence_sums(values, lengths) / to_device(lengths, values.device).clamp(min=1)


def to_tokens(per_sequence: torch.Tensor, lengths: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N,) each token's (S,) value of its sequence, with the dtype and device of ``like``, which is (N,)."""
    per_sequence, lengths = (to_device(x, like.device) for x in (per_sequence, lengths))
    # With output_size known, a GPU need not be waited for.
    return per_sequence.repeat_interleave(lengths, output_size=len(like)).to(like)


def check_lengths(lengths: torch.Tensor, tokens: int) -> None:
    """Raise ValueError unless these are the lengths of sequences that have ``tokens`` tokens together.

    Where they are on a GPU this waits for them.
    """
    if not torch.is_tensor(lengths) or lengths.dim() != 1 or lengths.is_floating_point():
        raise ValueError(f"lengths must be an (S,) tensor of whole numbers, not {lengths!r}")
    total, smallest = 0, 0
    if len(lengths):
        total, smallest = torch.stack([lengths.sum(), lengths.min()]).tolist()  # both in one wait
    if smallest < 0 or total != tokens:
        raise ValueError(
            f"lengths must be >= 0 and add up to {tokens} tokens: the least is {smallest}, the sum {total}"
        )


def check_same_shape(**tensors: torch.Tensor) -> None:
    """Raise ValueError unless all have one shape.

    Broadcasting (N,) with (N, 1) would silently give an (N, N) loss.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("one shape is needed, not " + ", ".join(f"{k} {v}" for k, v in shapes.items()))
