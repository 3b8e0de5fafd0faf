"""The whole loss of a micro-batch, from log-probs and entropies to one scalar.

Per response token, with A the advantage, H the entropy, w the rollout correction:

    A_t  = A + min(coef * stopgrad(H_t), |A| / divisor)                  where shaping is on
    A_t <- A_t + alpha * |A_t| where pi_t > confident                    where entropy is controlled
    A_t <- c_t * A_t                                                     of the tokens that are to learn
    l_t  = w_t * policy loss(A_t) + kl_coef * KL_t(pi, pi_ref)
           + anchor_coef * k3_t(pi, pi without the image) - entropy_coef * H_t
    loss = sum_t weight_t * l_t / denominator                            by the aggregation

Pure torch, no model and no config: the actor fills in what it measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike

from mssr.algorithms.correction import rollout_correction
from mssr.algorithms.credit import negative_filter
from mssr.algorithms.losses import aggregate, aggregation_denominator, aggregation_weights, kl_penalty
from mssr.algorithms.policy_losses import PolicyLoss, bind_loss, is_against_engine, is_token_wise
from mssr.algorithms.sequences import check_same_shape
from mssr.algorithms.shaping import entropy_balance, entropy_bonus, sampled_entropy

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
    """(S,) int64 tokens of each sequence that are among these, adding up to N. On the CPU wherever the others
    are."""
    reference_log_probs: torch.Tensor | None = None
    """(N,) of the frozen base model, where it is held."""
    anchor_log_probs: torch.Tensor | None = None
    """(N,) of the policy before the step, without the image; where the anchor is on."""
    has_image: torch.Tensor | None = None
    """(N,) bool, with ``anchor_log_probs``: without an image there is no anchor."""
    credit: torch.Tensor | None = None
    """(N,) factors of the advantages, see `mssr.algorithms.credit`; None for 1."""

    def after(self, log_probs: torch.Tensor, part: slice = slice(None)) -> TokenBatch:
        """Those of a part, n, whose (n,) log-probs the forward pass gave: on policy they are the old ones."""
        start, stop, _ = part.indices(len(self.engine_log_probs))
        ends = self.lengths.cumsum(0)
        inside = ends.clamp(start, stop) - (ends - self.lengths).clamp(start, stop)
        cut = {f.name: value[part] for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if self.old_log_probs is None:
            cut["old_log_probs"] = log_probs.detach()
        return replace(self, **cut | {"lengths": inside})


@dataclass(frozen=True)
class Objective:
    """What is minimised; `MicroBatchLoss` is its value."""

    loss: str = "ppo"
    """Name of the policy loss, see `mssr.algorithms.policy_losses`."""
    loss_options: Mapping[str, Any] = field(default_factory=dict)
    aggregation: str = "token_mean"
    """token_mean, sequence_mean or constant_length."""
    constant_length: int | None = None
    """Tokens of a response in constant_length."""
    shaping: bool = False
    """Whether advantages are shaped by entropy."""
    shaping_coef: float = 0.4
    shaping_divisor: float = 2.0
    shaping_entropy: Literal["exact", "sampled"] = "exact"
    negative_fraction: float = 1.0
    """Share of the tokens that learn where the advantage is negative."""
    confident: float = 0.95
    """Probability from which tokens take part in the control of entropy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coef: float = 0.0
    anchor_coef: float = 0.0
    correction: Mapping[str, Any] = field(default_factory=dict)
    """Options of `mssr.algorithms.correction.rollout_correction`."""
    _policy_loss: PolicyLoss = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Bound once: a loss from a file that is edited during a run must not change it.
        object.__setattr__(self, "_policy_loss", bind_loss(self.loss, self.loss_options))

    def denominator(self, lengths: ArrayLike) -> float:
        """Of a whole mini-batch, over all ranks, from the (S,) lengths of its responses."""
        return aggregation_denominator(lengths, self.aggregation, self.constant_length)

    def token_wise(self, old_known: bool) -> bool:
        """Whether no token's loss depends on the log-probs of others in the forward pass to come.

        Args:
            old_known: whether the old log-probs are known before it. If it gives them, a correction by
                sequences depends on all of a sequence.
        """
        levels = {self.correction.get(key, "none") for key in ("weight", "mask")}
        return is_token_wise(self._policy_loss) and (old_known or levels <= {"none", "token"})

    def correct(self, tokens: TokenBatch) -> Correction | None:
        """The rollout correction of tokens whose old log-probs are known; None where it is off."""
        if all(self.correction.get(key, "none") == "none" for key in ("weight", "mask")):
            return None
        assert tokens.old_log_probs is not None
        return rollout_correction(
            tokens.old_log_probs, tokens.engine_log_probs, tokens.lengths, **self.correction
        )

    def filtered(self, tokens: TokenBatch) -> TokenBatch:
        """Tokens of whole sequences, with the filter of negative ones among their ``credit``."""
        if self.negative_fraction == 1:
            return tokens
        kept = negative_filter(
            tokens.advantages, tokens.engine_log_probs, tokens.lengths, self.negative_fraction
        )
        return replace(tokens, credit=kept if tokens.credit is None else tokens.credit * kept)

    def shaped(
        self, tokens: TokenBatch, log_probs: torch.Tensor, entropy: torch.Tensor, entropy_alpha: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(N,) A_t of the formula at the top, and metrics, both without gradient."""
        advantages, metrics = tokens.advantages, {}
        if self.shaping:
            uncertainty = sampled_entropy(log_probs) if self.shaping_entropy == "sampled" else entropy
            bonus = entropy_bonus(advantages, uncertainty, self.shaping_coef, self.shaping_divisor)
            before, advantages = advantages, advantages + bonus
            from_entropy = self.shaping_coef * uncertainty <= before.abs() / self.shaping_divisor
            metrics["shaping/mean"] = bonus
            metrics["shaping/entropy_branch_fraction"] = from_entropy
            metrics["shaping/sign_flip_fraction"] = (before < 0) & (advantages > 0)
        if entropy_alpha:
            advantages = entropy_balance(advantages, log_probs, entropy_alpha, self.confident)
        if tokens.credit is not None:
            advantages = tokens.credit * advantages
            metrics["shaping/credit"] = tokens.credit
            metrics["shaping/left_out_fraction"] = tokens.credit == 0
        return advantages, metrics

    def per_token(
        self,
        tokens: TokenBatch,
        log_probs: torch.Tensor,
        entropy: torch.Tensor,
        correction: Correction | None,
        kl_coef: float,
        entropy_alpha: float = 0.0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(N,) loss of tokens `TokenBatch.after` their forward pass, and (N,) tensors by metric name."""
        old = tokens.old_log_probs
        assert old is not None
        advantages, metrics = self.shaped(tokens, log_probs, entropy, entropy_alpha)
        metrics["policy/entropy"] = entropy
        sampled_by = tokens.engine_log_probs if is_against_engine(self._policy_loss) else old
        loss, info = self._policy_loss(log_probs, sampled_by, advantages, tokens.lengths)
        check_same_shape(log_probs=log_probs, loss=loss, **info)  # it may be a user's
        metrics |= {f"policy/{key}": value for key, value in info.items()}
        metrics["rollout/mismatch_kl"] = kl_penalty(tokens.engine_log_probs, old, kind="k3")
        if correction is not None:
            factor, info = correction
            loss = factor * loss
            metrics |= {f"correction/{key}": value for key, value in info.items()}
        if tokens.reference_log_probs is not None:
            loss = loss + kl_coef * kl_penalty(log_probs, tokens.reference_log_probs, kind=self.kl_estimator)
            # Always k3 in the metrics: k1 of one batch may be negative, and runs are to be comparable.
            metrics["policy/kl_ref"] = kl_penalty(log_probs, tokens.reference_log_probs, kind="k3")
        if tokens.anchor_log_probs is not None:
            assert tokens.has_image is not None
            anchor = kl_penalty(log_probs, tokens.anchor_log_probs, kind="k3") * tokens.has_image
            loss = loss + self.anchor_coef * anchor
            metrics["policy/kl_anchor"] = anchor
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        return loss, metrics


@dataclass(eq=False)
class MicroBatchLoss:
    """What a micro-batch adds to the loss: called with what its forward pass gives, at once or, where the
    objective is `Objective.token_wise`, part by part in order."""

    objective: Objective
    tokens: TokenBatch
    """All of the micro-batch, of whole sequences."""
    denominator: float
    """Of the mini-batch, see `Objective.denominator`."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference; it may change from step to step."""
    entropy_alpha: float = 0.0
    """Of the control of entropy, see `mssr.algorithms.entropy_control`; it changes from step to step."""

    def __post_init__(self) -> None:
        objective = self.objective
        tokens = self.tokens = objective.filtered(self.tokens)
        device = tokens.advantages.device
        self._weights = aggregation_weights(tokens.lengths, objective.aggregation, device)
        # With known old log-probs it is of whole sequences, whichever part of them is asked for.
        self._correction = None if tokens.old_log_probs is None else objective.correct(tokens)
        self._parts: list[dict[str, torch.Tensor]] = []

    def __call__(
        self, log_probs: torch.Tensor, entropy: torch.Tensor, part: slice = slice(None)
    ) -> torch.Tensor:
        """() loss of the tokens ``part``, with gradient, from their (n,) log-probs and entropies."""
        old_known = self.tokens.old_log_probs is not None
        assert len(log_probs) == len(self.tokens.advantages) or self.objective.token_wise(old_known)
        tokens, correction = self.tokens.after(log_probs, part), self._correction
        if correction is not None:
            factor, info = correction
            correction = factor[part], {key: value[part] for key, value in info.items()}
        elif not old_known:
            correction = self.objective.correct(tokens)
        loss, metrics = self.objective.per_token(
            tokens, log_probs, entropy, correction, self.kl_coef, self.entropy_alpha
        )
        self._parts.append({key: value.detach() for key, value in (metrics | {"loss": loss}).items()})
        return aggregate(loss, self.denominator, None if self._weights is None else self._weights[part])

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """(N,) by name, without gradient, when all parts have come; ``loss`` is before aggregation."""
        return {key: torch.cat([part[key] for part in self._parts]) for key in self._parts[0]}
