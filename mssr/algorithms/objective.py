"""The whole loss of a micro-batch, from log-probs and entropies to one scalar.

Per response token, with A the advantage, H the entropy, w the rollout correction:

    A_t  = A + min(coef * stopgrad(H_t), |A| / divisor)                  where shaping is on
    l_t  = w_t * policy loss(A_t) + kl_coef * KL_t(pi, pi_ref)
           + anchor_coef * k3_t(pi, pi without the image) - entropy_coef * H_t
    loss = sum_t weight_t * l_t / denominator                            by the aggregation

A loss in which every token stands for itself can be taken part by part, see `LossInParts`.

Pure torch, no model and no config: the actor fills in what it measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy.typing as npt
import torch

from mssr.algorithms.correction import rollout_correction
from mssr.algorithms.losses import aggregate, aggregation_denominator, aggregation_weights, kl_penalty
from mssr.algorithms.policy_losses import PolicyLoss, bind_loss, is_token_wise
from mssr.algorithms.sequences import check_same_shape
from mssr.algorithms.shaping import entropy_bonus, sampled_entropy

Correction = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""What `mssr.algorithms.correction.rollout_correction` returns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What is known before the forward pass of N response tokens of S sequences, laid end to end.

    Log-probs are in nats.
    """

    old_log_probs: torch.Tensor | None
    """(N,) of the policy before the step; None where the forward pass gives them, see `after`."""
    engine_log_probs: torch.Tensor
    """(N,) as the engine sampled."""
    advantages: torch.Tensor
    """(N,) normalised, before shaping."""
    lengths: torch.Tensor
    """(S,) int64 tokens of each sequence that are among these, adding up to N."""
    reference_log_probs: torch.Tensor | None = None
    """(N,) of the frozen base model, where it is held."""
    anchor_log_probs: torch.Tensor | None = None
    """(N,) of the policy before the step, without the image; where the anchor is on."""
    has_image: torch.Tensor | None = None
    """(N,) bool, with ``anchor_log_probs``: without an image there is no anchor."""

    def after(self, log_probs: torch.Tensor, part: slice = slice(None)) -> TokenBatch:
        """Those of a part, n, whose (n,) log-probs the forward pass gave: on policy they are the old ones."""
        start, stop, _ = part.indices(len(self.engine_log_probs))
        ends = self.lengths.cumsum(0)
        inside = ends.clamp(start, stop) - (ends - self.lengths).clamp(start, stop)
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: dict[str, Any] = {name: None if value is None else value[part] for name, value in values.items()}
        if self.old_log_probs is None:
            cut["old_log_probs"] = log_probs.detach()
        return TokenBatch(**cut | {"lengths": inside})


@dataclass(frozen=True)
class Objective:
    """What is minimised."""

    loss: str = "ppo"
    """Name of the policy loss, see `mssr.algorithms.policy_losses`."""
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    """Its options."""
    aggregation: str = "token_mean"
    """token_mean, sequence_mean or constant_length."""
    constant_length: int | None = None
    """Tokens of a response in constant_length."""
    shaping: bool = False
    """Whether advantages are shaped by entropy."""
    shaping_coef: float = 0.4
    shaping_divisor: float = 2.0
    shaping_entropy: Literal["exact", "sampled"] = "exact"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    anchor_coef: float = 0.0
    correction: Mapping[str, Any] = field(default_factory=dict)
    """Options of `mssr.algorithms.correction.rollout_correction`."""
    _policy_loss: PolicyLoss = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Bound once: a loss from a file that is edited during a run must not change it.
        object.__setattr__(self, "_policy_loss", bind_loss(self.loss, self.loss_options))

    def denominator(self, lengths: npt.ArrayLike) -> float:
        """Of a whole mini-batch, over all ranks, from the (S,) lengths of its responses."""
        return aggregation_denominator(lengths, self.aggregation, self.constant_length)

    def __call__(
        self,
        tokens: TokenBatch,
        log_probs: torch.Tensor,
        entropy: torch.Tensor,
        denominator: float,
        kl_coef: float = 0.0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The part of the loss that these tokens contribute.

        Args:
            tokens: of whole sequences, with old log-probs.
            log_probs: (N,) of the policy in training, with gradient.
            entropy: (N,) exact entropy of its next-token distributions, with gradient.
            denominator: of the mini-batch, see `denominator`.
            kl_coef: weight of the KL to the reference; it may change from step to step.

        Returns:
            () loss with gradient, and (N,) tensors without, by metric name; ``loss`` is each token's before
            aggregation.
        """
        weights = aggregation_weights(tokens.lengths, self.aggregation, self.constant_length)
        correction = self._correct(tokens)
        return self._evaluate(tokens, log_probs, entropy, weights, correction, denominator, kl_coef)

    def token_wise(self, old_known: bool) -> bool:
        """Whether no token's loss depends on the log-probs of others in the forward pass to come.

        Args:
            old_known: whether the old log-probs are known before it. If it gives them, a correction by
                sequences depends on all of a sequence.
        """
        levels = {self.correction.get(key, "none") for key in ("weight", "mask")}
        return is_token_wise(self._policy_loss) and (old_known or levels <= {"none", "token"})

    def _evaluate(
        self,
        tokens: TokenBatch,
        log_probs: torch.Tensor,
        entropy: torch.Tensor,
        weights: torch.Tensor | None,
        correction: Correction | None,
        denominator: float,
        kl_coef: float,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """As `__call__`, with the two things that belong to whole sequences given: (N,) weights of the
        aggregation, and the rollout correction, None where there is none."""
        old = tokens.old_log_probs
        assert old is not None
        metrics: dict[str, torch.Tensor] = {"policy/entropy": entropy}
        advantages = tokens.advantages
        if self.shaping:
            advantages = self._shaped(advantages, log_probs, entropy, metrics)
        per_token, info = self._policy_loss(log_probs, old, advantages, tokens.lengths)
        check_same_shape(log_probs=log_probs, loss=per_token, **info)  # it may be a user's
        metrics |= {f"policy/{key}": value for key, value in info.items()}
        mismatch = kl_penalty(tokens.engine_log_probs, old, kind="k3")
        metrics["rollout/mismatch_kl"] = mismatch
        if correction is not None:
            factor, info = correction
            per_token = factor * per_token
            metrics |= {f"correction/{key}": value for key, value in info.items()}
        if tokens.reference_log_probs is not None:
            kl = kl_penalty(log_probs, tokens.reference_log_probs, kind=self.kl_estimator)
            per_token = per_token + kl_coef * kl
            # Always k3 in the metrics: k1 of one batch may be negative, and runs are to be comparable.
            metrics["policy/kl_ref"] = kl_penalty(log_probs, tokens.reference_log_probs, kind="k3")
        if tokens.anchor_log_probs is not None:
            assert tokens.has_image is not None
            anchor = kl_penalty(log_probs, tokens.anchor_log_probs, kind="k3") * tokens.has_image
            per_token = per_token + self.anchor_coef * anchor
            metrics["policy/kl_anchor"] = anchor
        if self.entropy_coef:
            per_token = per_token - self.entropy_coef * entropy
        metrics["loss"] = per_token
        loss = aggregate(per_token, denominator, weights)
        return loss, {key: value.detach() for key, value in metrics.items()}

    def _correct(self, tokens: TokenBatch) -> Correction | None:
        if all(self.correction.get(key, "none") == "none" for key in ("weight", "mask")):
            return None
        assert tokens.old_log_probs is not None
        return rollout_correction(
            tokens.old_log_probs, tokens.engine_log_probs, tokens.lengths, **self.correction
        )

    def _shaped(
        self,
        a: torch.Tensor,
        log_probs: torch.Tensor,
        entropy: torch.Tensor,
        metrics: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """The advantages with their bonus."""
        if self.shaping_entropy == "sampled":
            entropy = sampled_entropy(log_probs)
        bonus = entropy_bonus(a, entropy, coef=self.shaping_coef, divisor=self.shaping_divisor)
        shaped = a + bonus
        metrics["shaping/mean"] = bonus
        metrics["shaping/entropy_branch_fraction"] = (
            self.shaping_coef * entropy <= a.abs() / self.shaping_divisor
        )
        metrics["shaping/sign_flip_fraction"] = (a < 0) & (shaped > 0)
        return shaped


class LossInParts:
    """A token-wise objective on a micro-batch whose log-probs come part by part, in order.

    Args:
        objective: `Objective.token_wise`.
        tokens: all tokens of the micro-batch, of whole sequences.
        denominator, kl_coef: as in `Objective.__call__`.
    """

    def __init__(
        self, objective: Objective, tokens: TokenBatch, denominator: float, kl_coef: float = 0.0
    ) -> None:
        old_known = tokens.old_log_probs is not None
        assert objective.token_wise(old_known)
        self._objective = objective
        self._tokens = tokens
        self._denominator = denominator
        self._kl_coef = kl_coef
        self._weights = aggregation_weights(tokens.lengths, objective.aggregation, objective.constant_length)
        self._correction = objective._correct(tokens) if old_known else None
        self._parts: list[dict[str, torch.Tensor]] = []

    def __call__(self, log_probs: torch.Tensor, entropy: torch.Tensor, part: slice) -> torch.Tensor:
        """() what the tokens ``part`` contribute to the loss, from their (n,) log-probs and entropies."""
        tokens = self._tokens.after(log_probs, part)
        weights = None if self._weights is None else self._weights[part]
        if self._tokens.old_log_probs is None:
            correction = self._objective._correct(tokens)
        elif self._correction is not None:
            factor, info = self._correction
            correction = factor[part], {key: value[part] for key, value in info.items()}
        else:
            correction = None
        loss, metrics = self._objective._evaluate(
            tokens, log_probs, entropy, weights, correction, self._denominator, self._kl_coef
        )
        self._parts.append(metrics)
        return loss

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """(N,) by name, when all parts have come."""
        return {key: torch.cat([part[key] for part in self._parts]) for key in self._parts[0]}
