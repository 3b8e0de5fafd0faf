"""The update step: packed forward passes, the loss of design section 4, and the optimizer.

Per token, with A the sequence's advantage and H the exact entropy of the policy:

    A_t  = A + min(coef * stopgrad(H_t), |A| / divisor)       where shaping is on
    loss = sum over tokens (clipped policy gradient + kl_coef * k3) / tokens of all ranks
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from mssr.actor.distributed import accumulate_locally, all_max, all_sum, clip_grad_norm, reshard
from mssr.actor.planning import MicroBatch, Planner, UpdatePlan
from mssr.actor.prompts import PromptCache
from mssr.algorithms.losses import aggregate, kl_penalty, policy_loss
from mssr.algorithms.shaping import entropy_bonus
from mssr.config import Config
from mssr.errors import TrainingError
from mssr.models.packing import PackedBatch, pack
from mssr.models.policy import PolicyModel
from mssr.types import TrainBatch

_log = logging.getLogger(__name__)


@dataclass
class _Step:
    """What one step knows about each sequence of this rank."""

    batch: TrainBatch
    old: dict[int, torch.Tensor] = field(default_factory=dict)
    """(T,) log-probs before the step."""
    reference: dict[int, torch.Tensor] = field(default_factory=dict)
    """(T,) log-probs under the reference policy."""
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
        reference: sharded frozen model, or None when ``algorithm.kl_coef`` is 0.
        optimizer: over the trainable parameters of ``policy``.
    """

    def __init__(
        self,
        config: Config,
        policy: PolicyModel,
        reference: PolicyModel | None,
        optimizer: torch.optim.Optimizer,
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
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.nonfinite_in_a_row = 0

    def step(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """Run ``actor.updates_per_step`` updates on a batch; returns metrics, equal on all ranks.

        Raises:
            TrainingError: too many updates in a row had a non-finite gradient.
        """
        state = _Step(batch)
        plans = self.plan(batch, step)
        lr = self._set_learning_rate(step)
        for number, plan in enumerate(plans):
            # The first update is on policy: its own forward pass gives the old log-probs.
            self._before_update(state, plan, needs_old=number > 0)
        self._reshard()
        norms, skipped = [], 0
        for plan in plans:
            self.backward(state, plan)
            norm = clip_grad_norm(self.parameters, self.config.actor.max_grad_norm)
            if math.isfinite(norm):
                self.optimizer.step()
                norms.append(norm)
                self.nonfinite_in_a_row = 0
            else:
                # The norm is global, so every rank skips alike.
                skipped += 1
                self._note_nonfinite(step, [batch.prompt_ids[s] for s in plan.sequences])
            self.optimizer.zero_grad(set_to_none=True)
        self._probe_kl(state, plans)
        metrics = self._metrics(state, sum(p.response_tokens for p in plans))
        metrics["policy/grad_norm"] = float(np.mean(norms)) if norms else float("nan")
        metrics["policy/skipped_updates"] = float(skipped)
        metrics["policy/lr"] = lr
        return metrics

    def _note_nonfinite(self, step: int, prompt_ids: list[str]) -> None:
        self.nonfinite_in_a_row += 1
        prompts = f"{len(set(prompt_ids))} prompts: {', '.join(sorted(set(prompt_ids))[:20])}"
        _log.warning("step %d: gradient not finite, update skipped; it held %s", step + 1, prompts)
        if self.nonfinite_in_a_row >= self.config.actor.max_nonfinite_updates:
            raise TrainingError(
                f"{self.nonfinite_in_a_row} updates in a row had a non-finite gradient; the last one held "
                f"{prompts}"
            )

    def plan(self, batch: TrainBatch, step: int) -> list[UpdatePlan]:
        """The step's updates, the same on every rank."""
        return self._planner(batch).updates(self.config.actor.updates_per_step, (self.config.seed, step))

    @torch.no_grad()
    def _before_update(self, state: _Step, plan: UpdatePlan, needs_old: bool) -> None:
        """Log-probs of the policy before the step and of the reference, from one packing."""
        if not needs_old and self.reference is None:
            return
        for micro, packed in self._packed(state.batch, plan.ranks[self.rank]):
            if needs_old:
                self._store(state.old, micro, packed, self.policy(packed, micro.any_rank_has_images)[0])
            if self.reference is not None:
                log_probs, _ = self.reference(packed, micro.any_rank_has_images)
                self._store(state.reference, micro, packed, log_probs)

    def backward(self, state: _Step, plan: UpdatePlan) -> None:
        """Accumulate the gradient of one update."""
        passes = plan.ranks[self.rank]
        for micro, packed in self._packed(state.batch, passes):
            if self.config.actor.keep_gathered:
                accumulate_locally(self.policy, last=micro is passes[-1])
            log_probs, entropy = self.policy(packed, micro.any_rank_has_images)
            if micro.sequences[0] not in state.old:
                self._store(state.old, micro, packed, log_probs.detach())
            loss = self._loss(state, micro, packed, log_probs, entropy, plan.response_tokens)
            # FSDP averages over ranks; the loss is already divided by the tokens of all of them.
            (loss * micro.weight * self.config.actor.num_ranks).backward()

    def _loss(
        self,
        state: _Step,
        micro: MicroBatch,
        packed: PackedBatch,
        log_probs: torch.Tensor,
        entropy: torch.Tensor,
        tokens: int,
    ) -> torch.Tensor:
        algorithm = self.config.algorithm
        old = torch.cat([state.old[s] for s in micro.sequences])
        per_sequence = torch.from_numpy(state.batch.advantages[list(micro.sequences)]).to(self.device)
        advantages = per_sequence.repeat_interleave(packed.response_lengths)
        shaped = advantages
        if self.config.shapes_entropy:
            bonus = entropy_bonus(
                advantages, entropy, coef=algorithm.shaping.coef, divisor=algorithm.shaping.divisor
            )
            shaped = advantages + bonus
            entropy_decides = algorithm.shaping.coef * entropy <= advantages.abs() / algorithm.shaping.divisor
            self._add(state, micro, "shaping/mean", bonus)
            self._add(state, micro, "shaping/entropy_branch_fraction", entropy_decides)
            self._add(state, micro, "shaping/sign_flip_fraction", (advantages < 0) & (shaped > 0))
        per_token, info = policy_loss(
            log_probs,
            old,
            shaped,
            clip_low=algorithm.clip_low,
            clip_high=algorithm.clip_high,
            dual_clip=algorithm.dual_clip,
        )
        if self.reference is not None:
            reference = torch.cat([state.reference[s] for s in micro.sequences])
            kl = kl_penalty(log_probs, reference, kind="k3")
            per_token = per_token + algorithm.kl_coef * kl
            self._add(state, micro, "policy/kl_ref", kl)
        engine_log_probs = self._engine_log_probs(state, micro.sequences)
        self._add(state, micro, "rollout/mismatch_kl", kl_penalty(engine_log_probs, old, kind="k3"))
        self._max(state, "rollout/mismatch_max", (engine_log_probs - old).abs())
        self._add(state, micro, "policy/entropy", entropy)
        self._add(state, micro, "policy/loss", per_token)
        self._add(state, micro, "policy/clip_fraction", info["clipped"])
        return aggregate(per_token, tokens)

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
            self._add(state, micro, "policy/kl_update", kl_penalty(old, after, kind="k3"))
            self._add(state, micro, "probe_tokens", torch.ones_like(after))
        self._reshard()

    def _planner(self, batch: TrainBatch) -> Planner:
        image_token = self.policy.model.config.image_token_id
        return Planner(
            batch.lengths,
            batch.response_lengths,
            np.logical_or.reduceat(batch.tokens == image_token, batch.offsets[:-1]),
            ranks=self.config.actor.num_ranks,
            token_budget=self.config.actor.micro_batch_tokens,
        )

    def _packed(
        self, batch: TrainBatch, passes: tuple[MicroBatch, ...]
    ) -> Iterator[tuple[MicroBatch, PackedBatch]]:
        for micro in passes:
            items = [self.prompts.item(batch, s) for s in micro.sequences]
            yield micro, pack(items, self.policy.merge_size).to(self.device)

    def _store(
        self, into: dict[int, torch.Tensor], micro: MicroBatch, packed: PackedBatch, values: torch.Tensor
    ) -> None:
        parts = torch.split(values, packed.response_lengths.tolist())
        into.update(zip(micro.sequences, parts, strict=True))

    def _add(self, state: _Step, micro: MicroBatch, key: str, values: torch.Tensor) -> None:
        total = micro.weight * values.detach().double().sum()
        state.sums[key] = state.sums[key] + total if key in state.sums else total

    def _max(self, state: _Step, key: str, values: torch.Tensor) -> None:
        largest = values.detach().max()
        state.maxima[key] = torch.maximum(state.maxima[key], largest) if key in state.maxima else largest

    def _engine_log_probs(self, state: _Step, sequences: tuple[int, ...]) -> torch.Tensor:
        offsets, log_probs = state.response_offsets, state.batch.engine_log_probs
        parts = [log_probs[offsets[s] : offsets[s + 1]] for s in sequences]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def _metrics(self, state: _Step, tokens: int) -> dict[str, float]:
        sums = all_sum(state.sums)
        probe_tokens = sums.pop("probe_tokens")
        kl_update = sums.pop("policy/kl_update") / max(probe_tokens, 1.0)
        means = {key: value / tokens for key, value in sums.items()}
        return means | all_max(state.maxima) | {"policy/kl_update": kl_update}

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
