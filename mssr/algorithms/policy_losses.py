"""The policy-gradient losses, by name. All have one signature::

    loss(log_probs, old_log_probs, advantages, lengths, *, option=default, ...) -> (per_token, info)

log_probs: (N,) nats, of the sampled tokens under the policy in training. old_log_probs: (N,) nats,
under the policy before the step; ``log_probs.detach()`` for a single on-policy update, where the
gradient of every loss here is that of -A * log pi; to losses ``against_engine`` they are those of the
engine. advantages: (N,) A_t, shaped or not. lengths: (S,) int64 tokens of each of the S whole sequences,
adding up to N, on the CPU while a run trains, where the others are on the device; None where a loss only
looks at tokens.
Gradient goes into log_probs only. With rho = exp(log_probs - old_log_probs), `info` holds (N,) tensors
without gradient, whose token means are reported as ``policy/<key>``:

- ``ratio``: rho, or what the loss has in its place;
- ``clip_fraction``: 1 where the clip decided, in losses that have one;
- ``dual_clip_fraction``: 1 where the dual clip did.

A ValueError names shapes that differ and options out of their range. float32 and float64 work.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from mssr.algorithms.checks import check_number
from mssr.algorithms.plugins import Registry
from mssr.algorithms.sequences import (
    check_lengths,
    check_same_shape,
    clamped_log_ratio,
    sequence_means,
    to_tokens,
)

Info = dict[str, torch.Tensor]
PolicyLoss = Callable[..., tuple[torch.Tensor, Info]]
_F = TypeVar("_F", bound=PolicyLoss)
AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
"""How tokens may be aggregated, see `mssr.algorithms.losses.aggregation_weights`."""
_INPUTS = ("log_probs", "old_log_probs", "advantages", "lengths")


def register_loss(
    name: str, aggregation: str | None = None, token_wise: bool = False, against_engine: bool = False
) -> Callable[[_F], _F]:
    """Function decorator: make a policy loss available as ``algorithm.loss.name``.

    Args:
        aggregation: How its tokens are aggregated unless the user says otherwise, see
            `mssr.algorithms.losses.aggregation_weights`; None leaves it to the method.
        token_wise: Whether no token's loss depends on the log-probs of other tokens. Its gradient is then
            formed in the forward pass, which takes three products with the head's weight and not four.
            ``lengths`` may then be those of the tokens seen together, parts of sequences.
        against_engine: Whether its ``old_log_probs`` are to be those of the engine that sampled: the loss
            itself corrects for what engine and actor disagree about.

    Raises:
        ValueError: The name is taken, the function has another signature, or no such aggregation.
    """

    def add(function: _F) -> _F:
        _check_aggregation(aggregation, name)
        LOSSES.register(name)(function)
        function.aggregation = aggregation  # type: ignore[attr-defined]
        function.token_wise = token_wise  # type: ignore[attr-defined]
        function.against_engine = against_engine  # type: ignore[attr-defined]
        return function

    return add


def _check(function: Any, called: str) -> None:
    """A loss is a function of `_INPUTS`, by position, whose options are keyword-only with defaults."""
    if not callable(function):
        raise ValueError(f"{called} is {type(function).__name__}, not a function")
    parameters = list(inspect.signature(function).parameters.values())
    inputs = parameters[: len(_INPUTS)]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if len(inputs) < len(_INPUTS) or any(p.kind not in by_position for p in inputs):
        raise ValueError(f"{called} must take {', '.join(_INPUTS)} by position, then its options by keyword")
    for option in parameters[len(_INPUTS) :]:
        if option.default is option.empty or option.kind is not option.KEYWORD_ONLY:
            raise ValueError(f"option {option.name!r} of {called} must be keyword-only and have a default")


LOSSES: Registry[PolicyLoss] = Registry("policy loss", "function", _check, inputs=len(_INPUTS))

get_loss, bind_loss, loss_options = LOSSES.get, LOSSES.bind, LOSSES.options
"""A loss from a file may have attributes ``aggregation``, ``token_wise`` and ``against_engine``, as in
`register_loss`. Its file is read at each call: a training resolves its loss once, with `bind_loss`, to be
called with the four tensors."""


def loss_aggregation(name: str) -> str | None:
    """The aggregation that a loss asks for; None leaves it to the method."""
    aggregation = getattr(get_loss(name), "aggregation", None)
    _check_aggregation(aggregation, name)
    return aggregation


def is_token_wise(loss: PolicyLoss) -> bool:
    """Whether a loss from `bind_loss` says so of itself, see `register_loss`."""
    return bool(getattr(getattr(loss, "func", loss), "token_wise", False))


def is_against_engine(loss: PolicyLoss) -> bool:
    """Whether a loss, from `get_loss` or `bind_loss`, says so of itself, see `register_loss`."""
    return bool(getattr(getattr(loss, "func", loss), "against_engine", False))


def _check_aggregation(aggregation: str | None, name: str) -> None:
    if aggregation is not None and aggregation not in AGGREGATIONS:
        raise ValueError(
            f"policy loss {name!r} asks for the aggregation {aggregation!r}: choose one of"
            f" {', '.join(AGGREGATIONS)}"
        )


# --- the losses ----------------------------------------------------------------------------------


@register_loss("ppo", token_wise=True)
def ppo(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    dual_clip: float | None = 3.0,
) -> tuple[torch.Tensor, Info]:
    """L_t = -min(rho*A, clip(rho, 1 - clip_low, 1 + clip_high)*A).

    PPO, arXiv 1707.06347; unequal bounds from DAPO, arXiv 2503.14476. Dual clip, arXiv 1912.09729:
    where A < 0 the loss is at most -dual_clip * A, because -rho*A has no upper bound there. A token
    that either clip decided has no gradient. clip_low is in [0, 1], clip_high >= 0, and dual_clip > 1, or
    None for no dual clip.
    """
    _check_clips(clip_low, clip_high)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be > 1 or None, not {dual_clip}")
    log_ratio, a = _inputs(log_probs, old_log_probs, advantages)
    ratio = torch.exp(log_ratio)
    loss, clipped = _pessimistic(ratio, a, clip_low, clip_high)
    dual = torch.zeros_like(a, dtype=torch.bool)
    if dual_clip is not None:
        dual = (a < 0) & (loss > -dual_clip * a)
        loss = torch.where(dual, -dual_clip * a, loss)
    return loss, {
        "ratio": ratio.detach(),
        "clip_fraction": clipped.to(a.dtype),
        "dual_clip_fraction": dual.to(a.dtype),
    }


@register_loss("gspo", aggregation="sequence_mean")
def gspo(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor | None,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[torch.Tensor, Info]:
    """L_t = -min(s_t*A, clip(s_t, 1 - clip_low, 1 + clip_high)*A), s_t = sg[s] * pi_t / sg[pi_t].

    s = exp(mean over the sequence of log rho) is the length-normalised likelihood ratio of the whole
    response. arXiv 2507.18071: this is its GSPO-token form, which takes a different advantage for
    each token; where they are equal, the mean over the sequence has the value and the gradient of the
    sequence form, so aggregate it as ``sequence_mean``. Defaults: its section 5.1. Each log rho is
    clamped before the mean, and a token beyond has no gradient. ``lengths`` are needed, and ``ratio`` is s.
    clip_low in [0, 1] and clip_high >= 0 are small because s hardly moves: it is a mean over many tokens.
    """
    _check_clips(clip_low, clip_high)
    log_ratio, a = _inputs(log_probs, old_log_probs, advantages)
    if lengths is None:
        raise ValueError("gspo compares whole sequences: it needs lengths")
    check_lengths(lengths, len(log_probs))
    mean = to_tokens(sequence_means(log_ratio, lengths), lengths, like=log_ratio)
    # In value exp(mean) and, because of the difference that is always 0, with gradient s at its own token.
    ratio = torch.exp(mean + (log_ratio - log_ratio.detach()))
    loss, clipped = _pessimistic(ratio, a, clip_low, clip_high)
    return loss, {"ratio": ratio.detach(), "clip_fraction": clipped.to(a.dtype)}


@register_loss("cispo", token_wise=True)
def cispo(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    clip_low: float = 1.0,
    clip_high: float = 4.0,
) -> tuple[torch.Tensor, Info]:
    """L_t = -sg[clip(rho, 1 - clip_low, 1 + clip_high)] * A * log pi.

    arXiv 2506.13585 (MiniMax-M1): the importance weight is clipped, not the update, so that every token
    keeps a gradient. The paper has no lower bound and does not state the upper one. Ours is a largest
    weight of 5, which ScaleRL (arXiv 2510.13786) calls eps_max and TRL recommends; verl's example has
    clip_low=10, clip_high=0.2. ``ratio`` is rho before the clip, and ``clip_fraction`` marks tokens whose
    weight was clipped. Both bounds are >= 0; with clip_low from 1 on there is no lower one.
    """
    _check_clips(clip_low, clip_high, largest_low=math.inf)
    log_ratio, a = _inputs(log_probs, old_log_probs, advantages)
    ratio = torch.exp(log_ratio).detach()
    weight = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    return -weight * a * log_probs, {"ratio": ratio, "clip_fraction": (weight != ratio).to(ratio.dtype)}


@register_loss("sapo", token_wise=True)
def sapo(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> tuple[torch.Tensor, Info]:
    """L_t = -f*A, f = sigmoid(tau*(rho - 1)) * 4/tau, tau = tau_positive where A > 0, else tau_negative.

    arXiv 2511.20347: a smooth gate in place of the clip. Its slope at rho = 1 is 1, so the gradient on
    policy is that of the others, and it falls off on both sides, faster for a larger tau. The paper
    has tau_negative > tau_positive, because lowering one token raises all others. Both are > 0.
    """
    check_number("tau_positive", tau_positive)
    check_number("tau_negative", tau_negative)
    log_ratio, a = _inputs(log_probs, old_log_probs, advantages)
    ratio = torch.exp(log_ratio)
    tau = torch.full_like(a, tau_negative).masked_fill(a > 0, tau_positive)
    gate = torch.sigmoid(tau * (ratio - 1)) * (4 / tau)
    return -gate * a, {"ratio": ratio.detach()}


@register_loss("dis", token_wise=True, against_engine=True)
def dis(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor | None = None,
    *,
    clip_low: float = 0.3,
    clip_high: float = 5.0,
) -> tuple[torch.Tensor, Info]:
    """L_t = -sg[rho] * A * log pi where 1 - clip_low < rho < 1 + clip_high, else 0; rho = pi / pi_engine.

    Direct double-sided importance sampling of SAO, arXiv 2607.07508, first in GLM-5, arXiv 2602.15763: what
    leaves the band has no gradient, whatever the sign of A. Neither says whether rho has a gradient; as a
    weight it has none. Defaults: those of SAO's reasoning tasks (coding: 0.8 and 3). ``clip_fraction`` marks
    tokens outside. clip_low is in [0, 1], clip_high >= 0.
    """
    _check_clips(clip_low, clip_high)
    log_ratio, a = _inputs(log_probs, old_log_probs, advantages)
    ratio = torch.exp(log_ratio).detach()
    inside = (ratio > 1 - clip_low) & (ratio < 1 + clip_high)
    weight = torch.where(inside, ratio, 0.0)
    return -weight * a * log_probs, {"ratio": ratio, "clip_fraction": (~inside).to(a.dtype)}


@register_loss("flash_reinforce", aggregation="sequence_mean", against_engine=True)
def flash_reinforce(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    lengths: torch.Tensor | None,
    *,
    max_kl: float = 3e-3,
) -> tuple[torch.Tensor, Info]:
    """L_t = -sg[rho] * A * log pi, rho = pi / pi_engine; 0 in sequences whose mean binary KL exceeds max_kl.

    The binary KL of a token is p log(p/q) + (1 - p) log((1 - p)/(1 - q)), with p the engine's and q the
    policy's probability of it, both kept in [1e-6, 1 - 1e-6]. FlashREINFORCE, as in its authors' code
    (github.com/yifanzhang-pro/FlashREINFORCE): no weight is truncated, and dropped sequences still count in
    the denominator, so aggregate it as ``sequence_mean``. It is defined for one update a step. max_kl > 0;
    infinity drops none. Default: its setting for Qwen2.5-Math-1.5B (5e-3 for R1-Distill-Qwen-1.5B).
    ``dropped_fraction`` marks tokens of dropped sequences, ``binary_kl`` is that of the token.
    """
    if not max_kl > 0:
        raise ValueError(f"max_kl must be > 0, not {max_kl}")
    log_ratio, a = _inputs(log_probs, old_log_probs, advantages)
    if lengths is None:
        raise ValueError("flash_reinforce drops whole sequences: it needs lengths")
    check_lengths(lengths, len(log_probs))
    p, q = (x.detach().double().exp().clamp(1e-6, 1 - 1e-6) for x in (old_log_probs, log_probs))
    binary_kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    # Not "> max_kl", so that a sequence with a NaN is dropped.
    kept = to_tokens(sequence_means(binary_kl, lengths) <= max_kl, lengths, like=a)
    ratio = torch.exp(log_ratio).detach()
    loss = -torch.where(kept > 0, ratio, 0.0) * a * log_probs
    return loss, {"ratio": ratio, "dropped_fraction": 1 - kept, "binary_kl": binary_kl.to(a.dtype)}


def _inputs(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log rho with gradient into ``log_probs`` only, and A without; ValueError if the shapes differ."""
    check_same_shape(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages)
    return clamped_log_ratio(log_probs, old_log_probs.detach()), advantages.detach()


def _pessimistic(
    ratio: torch.Tensor, a: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-min(ratio*A, clip(ratio)*A), and where the clipped term is the smaller one and stops the gradient."""
    unclipped = -ratio * a
    clipped = -torch.clamp(ratio, 1 - clip_low, 1 + clip_high) * a
    return torch.maximum(unclipped, clipped), clipped > unclipped


def _check_clips(clip_low: float, clip_high: float, largest_low: float = 1.0) -> None:
    if not 0 <= clip_low <= largest_low:
        raise ValueError(f"clip_low must be in [0, {largest_low:g}], not {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be >= 0, not {clip_high}")
