"""Log-prob, exact entropy and loss of response tokens without ever holding all logits.

For logits z = h W^T / temperature, in which banned entries have no part, and p = softmax(z):

    log-prob  l = z_y - logsumexp(z)            dl/dz = onehot(y) - p
    entropy   H = -sum_v p_v log p_v          dH/dz = -p (log p + H)

Two ways to get there, both with float32 sums (float64 for a float64 model) from weights of any dtype:

- `token_log_probs_and_entropy` goes over the vocabulary block by block, with running maxima and sums, and
  computes the logits again in the backward pass: for what needs no gradient, and for losses of whole
  sequences, which know a token's gradient only when all tokens have been seen.
- `token_loss` goes over the tokens chunk by chunk and asks the loss of each chunk for its gradient at once,
  so that the gradients of hidden states and weight are formed from the logits of the forward pass.

Either holds ``chunk`` x V logits, twice, and the gradient of the weight in the precision of the sums.

A GPU multiplies bfloat16 factors into float32 without converting them, and adds to what is there already, so
that no V x D product is written out. Each such addition still reads and writes the whole gradient, so chunks
are larger there (docs/throughput.md has the arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# A finite stand-in for minus infinity: exp() of it is 0, and 0 times it is 0 and not NaN.
_BANNED_LOGIT = -1e30
_CONVERTED_ROWS = 16384
"""Rows of a weight in less than the working precision that a CPU multiplies, or converts, at a time."""
_MULTIPLIED_TOKENS = 256
"""Tokens of which exp(s) * s is written out at a time, before it is summed."""

PartLoss = Callable[[torch.Tensor, torch.Tensor, slice], torch.Tensor]
"""(log-probs, entropies, which tokens these are) -> () the part that they add to the loss, with graph."""


@dataclass(frozen=True, slots=True)
class Head:
    """What is asked of the head."""

    temperature: float = 1.0
    """Divides the logits."""
    banned: Sequence[int] = ()
    """Token ids that have probability 0."""
    chunk: int = 256
    """As many logits exist at a time as so many tokens have."""

    def logits(
        self, hidden: torch.Tensor, weight: torch.Tensor, rows: slice, dtype: torch.dtype
    ) -> torch.Tensor:
        """(C, rows) logits of some of the vocabulary."""
        logits = _product(hidden, weight[rows].T, dtype)
        if self.temperature != 1:
            logits /= self.temperature
        self.fill_banned(logits, rows, _BANNED_LOGIT)
        return logits

    def fill_banned(self, values: torch.Tensor, rows: slice, value: float) -> None:
        """A banned logit is a constant: the gradient by it is 0, even where it is the target's."""
        for token in self.banned:
            if rows.start <= token < rows.stop:
                values[:, token - rows.start] = value


PLAIN = Head()


def token_log_probs_and_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, head: Head = PLAIN
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each target and entropy of each distribution, both differentiable.

    Args:
        hidden: (N, D) final hidden states, any float dtype.
        weight: (V, D) output embedding, same dtype.
        targets: (N,) int64 in [0, V).

    Returns:
        (N,) log-probs and (N,) entropies, in nats, float32 or, for float64 inputs, float64.
    """
    log_probs, entropy = _TwoPassHead.apply(hidden, weight, targets, head)
    return log_probs, entropy


def token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, loss: PartLoss, head: Head = PLAIN
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of a loss over the tokens; its gradient is formed here, and the backward pass scales it.

    The other arguments are those of `token_log_probs_and_entropy`.

    Args:
        loss: called for consecutive parts of the tokens, at least once and in order; what it returns for a
            token must not depend on the log-probs and entropies of others.

    Returns:
        () loss, differentiable once, and without gradient (N,) log-probs and (N,) entropies.
    """
    return _LossHead.apply(hidden, weight, targets, head, loss)


class _TwoPassHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, head: Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, dtype = len(hidden), _precision(hidden)
        # Of each token, over the blocks so far: its largest logit m, sum exp(z - m), sum exp(z - m) (z - m).
        largest = hidden.new_full((n,), _BANNED_LOGIT, dtype=dtype)
        mass, moment, of_target = hidden.new_zeros((3, n), dtype=dtype).unbind()
        for rows in _row_blocks(weight, n, head.chunk, dtype):
            logits = head.logits(hidden, weight, rows, dtype)
            column, inside = _columns(targets, rows)
            of_target = torch.where(inside, logits.gather(1, column)[:, 0], of_target)
            new = torch.maximum(largest, logits.amax(-1))
            shift = largest - new
            moment = torch.exp(shift) * (moment + shift * mass)
            mass = torch.exp(shift) * mass
            shifted = logits.sub_(new[:, None])
            masses = torch.exp(shifted)
            mass += masses.sum(-1)
            moment += _moments(masses, shifted)
            largest = new
            del logits, shifted, masses  # before the next block is made
        log_mass = torch.log(mass)
        # Both have no cancellation where logits are large: m is taken away before anything is rounded.
        log_probs = (of_target - largest) - log_mass
        entropy = log_mass - moment / mass
        ctx.save_for_backward(hidden, weight, targets, largest, mass, entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, largest, mass, entropy = ctx.saved_tensors
        head, dtype = ctx.head, _precision(hidden)
        of_log_prob, of_entropy = (None if slope is None else slope / head.temperature for slope in slopes)
        if of_log_prob is None:
            of_log_prob = torch.zeros_like(mass)
        grad_hidden = torch.zeros_like(hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for rows in _row_blocks(weight, len(hidden), head.chunk, dtype):
            shifted = head.logits(hidden, weight, rows, dtype).sub_(largest[:, None])
            grad = _logit_gradient(shifted, torch.exp(shifted), mass, entropy, of_log_prob, of_entropy)
            del shifted
            column, inside = _columns(targets, rows)
            grad.scatter_add_(1, column, torch.where(inside, of_log_prob, 0)[:, None])
            head.fill_banned(grad, rows, 0)
            grad = _factor(grad, weight)
            if grad_hidden is not None:
                _add_product(grad_hidden, grad, weight[rows])
            if grad_weight is not None:
                grad_weight[rows] = _product(grad.T, hidden, dtype)
            del grad
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, None, None


class _LossHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        head: Head,
        loss_of: PartLoss,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n, dtype = len(hidden), _precision(hidden)
        log_probs, entropy = hidden.new_empty((2, n), dtype=dtype).unbind()
        loss = hidden.new_zeros((), dtype=dtype)
        grad_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        blocks = [slice(0, len(weight))] if _adds_wide(weight) else list(_row_blocks(weight, 1, 1, dtype))
        for start in range(0, max(n, 1), head.chunk):
            part = slice(start, min(start + head.chunk, n))
            parts = [head.logits(hidden[part], weight, rows, dtype) for rows in blocks]
            logits = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            del parts
            shifted = logits.sub_(logits.amax(-1, keepdim=True))
            masses = torch.exp(shifted)
            mass = masses.sum(-1)
            log_mass = torch.log(mass)
            log_probs[part] = shifted.gather(1, targets[part, None])[:, 0] - log_mass
            entropy[part] = log_mass - _moments(masses, shifted) / mass
            of_part, of_log_prob, of_entropy = _slopes(loss_of, log_probs[part], entropy[part], part)
            loss += of_part
            of_log_prob = of_log_prob / head.temperature
            of_entropy = None if of_entropy is None else of_entropy / head.temperature
            grad = _logit_gradient(shifted, masses, mass, entropy[part], of_log_prob, of_entropy)
            del logits, shifted, masses
            grad.scatter_add_(1, targets[part, None], of_log_prob[:, None])
            head.fill_banned(grad, slice(0, len(weight)), 0)
            grad = _factor(grad, weight)
            if grad_hidden is not None:
                into = torch.zeros_like(grad_hidden[part], dtype=dtype)
                for rows in blocks:
                    _add_product(into, grad[:, rows], weight[rows])
                grad_hidden[part] = into
            if grad_weight is not None:
                for rows in blocks:
                    _add_product(grad_weight[rows], grad[:, rows].T, hidden[part])
            del grad
        ctx.gradients = grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        ctx.mark_non_differentiable(log_probs, entropy)
        return loss, log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor, *unused: Any) -> tuple[torch.Tensor | None, ...]:
        # In place, which a second backward pass would notice: it finds nothing here.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("the gradient of a token_loss can be taken only once")
        of_hidden, of_weight = (None if g is None else g.mul_(scale) for g in gradients)
        return of_hidden, of_weight, None, None, None


def _slopes(
    loss_of: PartLoss, log_probs: torch.Tensor, entropy: torch.Tensor, part: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """() loss of some tokens, and its (C,) derivatives by log-prob and, if it has any, by entropy."""
    log_probs, entropy = log_probs.clone().requires_grad_(), entropy.clone().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(log_probs, entropy, part)
        of_log_prob, of_entropy = torch.autograd.grad(loss, (log_probs, entropy), allow_unused=True)
    return loss.detach(), torch.zeros_like(log_probs) if of_log_prob is None else of_log_prob, of_entropy


def _logit_gradient(
    shifted: torch.Tensor,
    masses: torch.Tensor,
    mass: torch.Tensor,
    entropy: torch.Tensor,
    of_log_prob: torch.Tensor,
    of_entropy: torch.Tensor | None,
) -> torch.Tensor:
    """-p (of_log_prob + of_entropy (log p + H)): the gradient by the logits, but for the target's onehot.

    Args:
        shifted: (C, V') logits less the largest one of the token, s. Overwritten.
        masses: (C, V') exp(s). Overwritten.
        mass: (C,) the sum of them over the vocabulary, so that p = masses / mass, log p = s - log(mass).
        entropy: (C,) H.
        of_log_prob, of_entropy: (C,) derivatives of the loss, over the temperature; None is 0.
    """
    if of_entropy is None:
        return masses.mul_((-of_log_prob / mass)[:, None])
    slope = -of_entropy / mass
    level = slope * (entropy - torch.log(mass)) - of_log_prob / mass
    return shifted.mul_(slope[:, None]).add_(level[:, None]).mul_(masses)


def _columns(targets: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 1) the column of each target in a block of the vocabulary, and (N,) whether it is in there."""
    column = targets - rows.start
    inside = (column >= 0) & (column < rows.stop - rows.start)
    return torch.where(inside, column, 0)[:, None], inside


def _row_blocks(weight: torch.Tensor, tokens: int, chunk: int, dtype: torch.dtype) -> Iterator[slice]:
    """Blocks of the vocabulary in which so many tokens have at most ``chunk`` x V logits."""
    vocabulary = len(weight)
    size = max(1, min(vocabulary, chunk * vocabulary // max(tokens, 1)))
    if weight.dtype != dtype and not _adds_wide(weight):
        size = min(size, _CONVERTED_ROWS)
    if size > 128:
        size -= size % 64  # whole tiles
    for start in range(0, vocabulary, size):
        yield slice(start, min(start + size, vocabulary))


def _moments(masses: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
    """(C,) the sums of exp(s) * s over the vocabulary."""
    parts = zip(masses.split(_MULTIPLIED_TOKENS), shifted.split(_MULTIPLIED_TOKENS), strict=True)
    return torch.cat([torch.linalg.vecdot(m, s) for m, s in parts])


def _adds_wide(weight: torch.Tensor) -> bool:
    """Whether bfloat16 factors are multiplied into float32 as they are: not on a CPU."""
    return weight.device.type != "cpu"


def _factor(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A gradient by logits as it is multiplied with what has the precision of the weight."""
    return grad.to(weight.dtype) if _adds_wide(weight) else grad


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b with sums and result in ``dtype``."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    if _adds_wide(a):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _add_product(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """into += a @ b."""
    if a.dtype == b.dtype == into.dtype:
        into.addmm_(a, b)
    elif _adds_wide(a):
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
    else:
        into += _product(a, b, into.dtype)


def _precision(hidden: torch.Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)
