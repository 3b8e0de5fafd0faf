"""Log-prob and exact entropy of response tokens without ever holding all logits.

For logits z = h W^T / temperature with banned entries removed and p = softmax(z):

    log-prob  l = z_y - logsumexp(z)            dl/dz = onehot(y) - p
    entropy   H = -sum_v p_v log p_v          dH/dz = -p (log p + H)

Logits exist for ``chunk`` tokens at a time, in float32 (float64 for a float64 model), and are recomputed
in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

# A finite stand-in for minus infinity: exp() of it is 0, and 0 times it is 0 and not NaN.
_BANNED_LOGIT = -1e30


def token_log_probs_and_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and entropy of each distribution, both differentiable.

    Args:
        hidden: (N, D) final hidden states, any float dtype.
        weight: (V, D) output embedding, same dtype.
        targets: (N,) int64 in [0, V).
        temperature: divides the logits.
        banned: (K,) int64 token ids that have probability 0, or None.
        chunk: tokens whose logits exist at the same time.

    Returns:
        (N,) log-probs and (N,) entropies, in nats, float32 or, for float64 inputs, float64.
    """
    log_probs, entropy = _ChunkedHead.apply(hidden, weight, targets, temperature, banned, chunk)
    return log_probs, entropy


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        banned: torch.Tensor | None,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = hidden.shape[0]
        log_probs, entropy, log_z = hidden.new_empty((3, n), dtype=_precision(hidden)).unbind()
        for start in range(0, n, chunk):
            part = slice(start, min(start + chunk, n))
            logits = _logits(hidden[part], weight, temperature, banned)
            log_z[part] = torch.logsumexp(logits, dim=-1)
            log_p = logits.sub_(log_z[part, None])
            log_probs[part] = log_p.gather(1, targets[part, None])[:, 0]
            # Not log_z - sum p z, which cancels: it loses two digits where the logits are large.
            entropy[part] = -(torch.exp(log_p) * log_p).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.temperature, ctx.banned, ctx.chunk = temperature, banned, chunk
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_log_probs, grad_entropy = grads
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_precision(hidden))
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, hidden.shape[0]))
            logits = _logits(hidden[part], weight, ctx.temperature, ctx.banned)
            log_p = logits - log_z[part, None]
            probs = torch.exp(log_p)
            grad = probs * (log_p + entropy[part, None]) * -grad_entropy[part, None]
            grad -= probs * grad_log_probs[part, None]
            grad.scatter_add_(1, targets[part, None], grad_log_probs[part, None])
            grad /= ctx.temperature
            grad_hidden[part] = (grad.to(weight.dtype) @ weight).to(hidden.dtype)
            grad_weight += grad.T @ hidden[part].to(grad.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, temperature: float, banned: torch.Tensor | None
) -> torch.Tensor:
    logits = (hidden @ weight.T).to(_precision(hidden)) / temperature
    if banned is not None:
        logits.index_fill_(1, banned, _BANNED_LOGIT)
    return logits


def _precision(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
