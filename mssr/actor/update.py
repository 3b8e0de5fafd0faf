"""The update step: packed forward passes, the objective over their tokens, and the optimizer.

Which passes a step needs: the log-probs before the step (none for the first update, whose own forward
pass gives them), those of the reference and of the text-only anchor where the objective has them, then
forward and backward of every update, then the KL of the step on a share of the rollouts. An update in
which something is not finite is skipped on all ranks, see `mssr.actor.guard`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from mssr.actor.distributed import accumulate_locally, all_max, all_sum, clip_grad_norm, reshard
from mssr.actor.guard import NonFiniteGuard, Skipped
from mssr.actor.optimizers import Optimizer
from mssr.actor.planning import MicroBatch, Planner, UpdatePlan
from mssr.actor.prompts import PromptCache
from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.objective import KnownTokens, LossInParts, Objective, TokenBatch
from mssr.config import Config
from mssr.heartbeat import beat
from mssr.models.cost import CostModel
from mssr.models.packing import PackedBatch, pack
from mssr.models.policy import PolicyModel
from mssr.types import RankLogProbs, TrainBatch


@dataclass
class _Step:
    """What one step knows about each sequence of this rank."""

    batch: TrainBatch
    old: dict[int, torch.Tensor] = field(default_factory=dict)
    """(T,) log-probs before the step."""
    reference: dict[int, torch.Tensor] = field(default_factory=dict)
    """(T,) log-probs under the reference policy."""
    anchor: dict[int, torch.Tensor] = field(default_factory=dict)
    """(T,) log-probs before the step, given the prompt without its images."""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sums over this rank's tokens, for the metrics; on the device, so that nothing waits for them."""
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)
    """Likewise the largest values."""

    def __post_init__(self) -> None:
        self.response_offsets = self.batch.response_offsets


class PolicyUpdater:
    """Turns training batches into optimizer steps. The same calls must be made on all ranks.

    Args:
        policy: sharded model in training.
        reference: sharded frozen model, or the policy without its adapters; None when nothing needs it.
        optimizer: over the trainable parameters of ``policy``.
    """

    def __init__(
        self,
        config: Config,
        policy: PolicyModel,
        reference: torch.nn.Module | None,
        optimizer: Optimizer,
        prompts: PromptCache,
        rank: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.policy = policy
        self.reference = reference
        self.optimizer = optimizer
        self.prompts = prompts
        self.rank = rank
        self.device = device
        self.objective = make_objective(config)
        self.cost_model = CostModel(policy.model.config, train_vision=config.trains_vision)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.guard = NonFiniteGuard(
            config.run_dir / "nonfinite", rank, config.actor.max_nonfinite_updates, device
        )

    def step(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """Run ``actor.updates_per_step`` updates on a batch; returns metrics, equal on all ranks.

        Raises:
            TrainingError: too many updates in a row had something in them that is not finite.
        """
        state = _Step(batch)
        plans = self.plan(batch, step)
        lr = self._set_learning_rate(step)
        for number, plan in enumerate(plans):
            # The first update is on policy: its own forward pass gives the old log-probs.
            self._before_update(state, plan, needs_old=number > 0 and batch.old_log_probs is None)
        self._reshard()
        norms, tokens = [], 0
        for number, plan in enumerate(plans, 1):
            before = state.sums, state.maxima
            state.sums, state.maxima = dict(state.sums), dict(state.maxima)
            self.guard.begin()
            self.backward(state, plan)
            norm, flagged = clip_grad_norm(
                self.parameters, self.config.actor.max_grad_norm, self.guard.flag()
            )
            # Norm and flag are global, so every rank decides alike.
            if math.isfinite(norm) and not flagged:
                self.optimizer.step()
                norms.append(norm)
                tokens += plan.response_tokens
                self.guard.passed()
            else:
                self.guard.skipped(
                    Skipped(step + 1, number, norm, flagged), batch, self.policy.named_parameters()
                )
                if number < len(plans) or norms:
                    # The metrics are those of the updates that were made.
                    state.sums, state.maxima = before
            self.optimizer.zero_grad(set_to_none=True)
        self.guard.begin()
        self._probe_kl(state, plans)
        metrics = self._metrics(state, tokens or plans[-1].response_tokens)
        metrics["policy/grad_norm"] = float(np.mean(norms)) if norms else float("nan")
        metrics["policy/skipped_updates"] = float(len(plans) - len(norms))
        metrics["policy/lr"] = lr
        return metrics

    def plan(self, batch: TrainBatch, step: int) -> list[UpdatePlan]:
        """The step's updates, the same on every rank."""
        return self._planner(batch).updates(self.config.actor.updates_per_step, (self.config.seed, step))

    @torch.no_grad()
    def log_probs(self, batch: TrainBatch, reference: bool) -> RankLogProbs:
        """Log-probs of this rank's share of a batch under the policy as it is, and the reference."""
        models: list[torch.nn.Module] = [self.policy]
        if reference:
            assert self.reference is not None
            models.append(self.reference)
        sequences: list[int] = []
        values: list[list[np.ndarray]] = [[np.empty(0, np.float32)] for _ in models]
        for micro, packed in self._packed(batch, self._planner(batch).everything()[self.rank]):
            for model, found in zip(models, values, strict=True):
                scored = model(packed, micro.any_rank_has_images)[0]
                if micro.weight:
                    found.append(scored.cpu().numpy())
            if micro.weight:
                sequences += micro.sequences
        self._reshard()
        by_model = [np.concatenate(found) for found in values]
        return RankLogProbs(
            sequences=np.array(sequences, np.int64),
            policy=by_model[0],
            reference=by_model[1] if reference else None,
        )

    @torch.no_grad()
    def _before_update(self, state: _Step, plan: UpdatePlan, needs_old: bool) -> None:
        """Log-probs of the policy before the step and of the reference from one packing; the anchor's."""
        passes = plan.ranks[self.rank]
        use_reference = self.reference is not None and not self.config.kl_in_reward
        use_reference &= state.batch.reference_log_probs is None
        if needs_old or use_reference:
            for micro, packed in self._packed(state.batch, passes):
                if needs_old:
                    self._store(state.old, micro, packed, self.policy(packed, micro.any_rank_has_images)[0])
                if use_reference:
                    assert self.reference is not None
                    log_probs, _ = self.reference(packed, micro.any_rank_has_images)
                    self._store(state.reference, micro, packed, log_probs)
        if self.objective.anchor_coef:
            for micro in passes:
                items = self.prompts.text_only(state.batch, micro.sequences)
                packed = pack(items, self.policy.merge_size).to(self.device)
                self._store(state.anchor, micro, packed, self.policy(packed)[0])

    def backward(self, state: _Step, plan: UpdatePlan) -> None:
        """Accumulate the gradient of one update."""
        passes = plan.ranks[self.rank]
        denominator = self.objective.denominator(state.batch.response_lengths[list(plan.sequences)])
        for micro, packed in self._packed(state.batch, passes):
            if self.config.actor.keep_gathered:
                accumulate_locally(self.policy, last=micro is passes[-1])
            loss, tokens, metrics = self._loss(state, micro, packed, denominator)
            for key, values in metrics.items():
                self._add(state, micro, key, values)
            if micro.weight:
                self.guard.observe(micro.sequences, tokens, metrics["policy/loss"])
            self._max(state, "rollout/mismatch_max", (tokens.engine_log_probs - tokens.old_log_probs).abs())
            # FSDP averages over ranks; the loss is already divided by the tokens of all of them.
            (loss * micro.weight * self.config.actor.num_ranks).backward()

    def _loss(
        self, state: _Step, micro: MicroBatch, packed: PackedBatch, denominator: float
    ) -> tuple[torch.Tensor, TokenBatch, dict[str, torch.Tensor]]:
        """Forward pass and objective of a micro-batch; in one, where the objective is by tokens."""
        known, kl_coef = self._known(state, micro, packed), state.batch.kl_coef
        if self.objective.token_wise(old_known=known.old_log_probs is not None):
            parts = LossInParts(self.objective, known, denominator, kl_coef)
            loss, log_probs, entropy = self.policy(packed, micro.any_rank_has_images, parts)
            tokens, metrics = known.measured(log_probs, entropy), parts.metrics
        else:
            log_probs, entropy = self.policy(packed, micro.any_rank_has_images)
            tokens = known.measured(log_probs, entropy)
            loss, metrics = self.objective(tokens, denominator, kl_coef)
        if known.old_log_probs is None:
            self._store(state.old, micro, packed, tokens.old_log_probs)
        return loss, tokens, metrics

    def _known(self, state: _Step, micro: MicroBatch, packed: PackedBatch) -> KnownTokens:
        batch, sequences, lengths = state.batch, micro.sequences, packed.response_lengths
        if batch.old_log_probs is not None:
            old = self._of_tokens(state, batch.old_log_probs, sequences)
            self._store(state.old, micro, packed, old)
        if batch.token_advantages is not None:
            advantages = self._of_tokens(state, batch.token_advantages, sequences)
        else:
            per_sequence = torch.from_numpy(batch.advantages[list(sequences)]).to(self.device)
            advantages = per_sequence.repeat_interleave(lengths)
        reference = _gather(state.reference, sequences) if state.reference else None
        if batch.reference_log_probs is not None:
            reference = self._of_tokens(state, batch.reference_log_probs, sequences)
        has_image = None
        if state.anchor:
            images = torch.from_numpy(self._has_images(batch)[list(sequences)]).to(self.device)
            has_image = images.repeat_interleave(lengths)
        return KnownTokens(
            old_log_probs=_gather(state.old, sequences) if sequences[0] in state.old else None,
            engine_log_probs=self._of_tokens(state, batch.engine_log_probs, sequences),
            advantages=advantages,
            lengths=lengths,
            reference_log_probs=reference,
            anchor_log_probs=_gather(state.anchor, sequences) if state.anchor else None,
            has_image=has_image,
        )

    @torch.no_grad()
    def _probe_kl(self, state: _Step, plans: list[UpdatePlan]) -> None:
        """KL(before || after the step), k3, on a random share of the rollouts.

        The responses were sampled before the step, so the estimate is over the right distribution.
        """
        passes = self._planner(state.batch).probe(plans, self.config.actor.kl_probe_fraction)
        for micro, packed in self._packed(state.batch, passes[self.rank]):
            after, _ = self.policy(packed, micro.any_rank_has_images)
            # Where the rank only runs along (weight 0) it may not know the old log-probs.
            old = torch.cat([state.old[s] for s in micro.sequences]) if micro.weight else after
            kl = kl_penalty(old, after, kind="k3")
            self._add(state, micro, "policy/kl_update", kl)
            self._add(state, micro, "probe_tokens", torch.isfinite(kl))
        self._reshard()

    def _planner(self, batch: TrainBatch) -> Planner:
        return Planner(
            self.cost_model.work(batch),
            ranks=self.config.actor.num_ranks,
            token_budget=self.config.actor.micro_batch_tokens,
        )

    def _has_images(self, batch: TrainBatch) -> np.ndarray:
        """(B,) bool."""
        image_token = self.policy.model.config.image_token_id
        return np.logical_or.reduceat(batch.tokens == image_token, batch.offsets[:-1])

    def _packed(
        self, batch: TrainBatch, passes: tuple[MicroBatch, ...]
    ) -> Iterator[tuple[MicroBatch, PackedBatch]]:
        for micro in passes:
            beat()
            items = self.prompts.items(batch, micro.sequences)
            yield micro, pack(items, self.policy.merge_size).to(self.device)

    def _store(
        self, into: dict[int, torch.Tensor], micro: MicroBatch, packed: PackedBatch, values: torch.Tensor
    ) -> None:
        parts = torch.split(values, packed.response_lengths.tolist())
        into.update(zip(micro.sequences, parts, strict=True))

    def _add(self, state: _Step, micro: MicroBatch, key: str, values: torch.Tensor) -> None:
        total = micro.weight * _finite(values).double().sum()
        state.sums[key] = state.sums[key] + total if key in state.sums else total

    def _max(self, state: _Step, key: str, values: torch.Tensor) -> None:
        largest = _finite(values).max()
        state.maxima[key] = torch.maximum(state.maxima[key], largest) if key in state.maxima else largest

    def _of_tokens(self, state: _Step, values: np.ndarray, sequences: tuple[int, ...]) -> torch.Tensor:
        """The parts of an array over response tokens that belong to some sequences."""
        offsets = state.response_offsets
        parts = [values[offsets[s] : offsets[s + 1]] for s in sequences]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def _metrics(self, state: _Step, tokens: int) -> dict[str, float]:
        encoded_here, self.prompts.encoded = self.prompts.encoded, 0
        sums = all_sum(state.sums | {"encoded": torch.tensor(encoded_here, device=self.device)})
        probe_tokens, encoded = sums.pop("probe_tokens"), sums.pop("encoded")
        kl_update = sums.pop("policy/kl_update") / max(probe_tokens, 1.0)
        means = {key: value / tokens for key, value in sums.items()}
        return (
            means
            | all_max(state.maxima)
            | {"policy/kl_update": kl_update, "perf/prompts_encoded_by_ranks": encoded}
        )

    def _reshard(self) -> None:
        """After passes without backward; a reference that is kept gathered never changes."""
        reshard(self.policy)
        if self.reference is not None and not self.config.actor.keep_gathered:
            reshard(self.reference)

    def _set_learning_rate(self, step: int) -> float:
        """Warm-up, then the schedule; a function of the step number, so nothing is to be saved."""
        actor, steps = self.config.actor, self.config.trainer.steps
        if step < actor.warmup_steps:
            factor = (step + 1) / (actor.warmup_steps + 1)
        else:
            progress = (step - actor.warmup_steps) / max(1, steps - actor.warmup_steps)
            factor = {
                "constant": 1.0,
                "linear": 1.0 - progress,
                "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
            }[actor.lr_schedule]
        for group in self.optimizer.param_groups:
            group["lr"] = actor.lr * factor
        return actor.lr * factor


def _finite(values: torch.Tensor) -> torch.Tensor:
    """Without what is not finite: it is in a sequence of a skipped update, and the method that learns from
    the KL takes no NaN."""
    values = values.detach()
    return torch.where(torch.isfinite(values), values, 0)


def _gather(values: dict[int, torch.Tensor], sequences: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([values[s] for s in sequences])


def make_objective(config: Config) -> Objective:
    """The loss that a config describes."""
    section = config.algorithm
    return Objective(
        loss=section.loss.name,
        loss_options=config.loss_options,
        aggregation=config.aggregation,
        constant_length=config.constant_length,
        shaping=config.shapes_entropy,
        shaping_coef=section.shaping.coef,
        shaping_divisor=section.shaping.divisor,
        shaping_entropy=section.shaping.entropy,  # type: ignore[arg-type]
        kl_estimator=section.kl.estimator,  # type: ignore[arg-type]
        entropy_coef=section.loss.entropy_coef,
        anchor_coef=section.loss.text_anchor_coef,
        correction=config.correction_options,
    )
