"""The update step: packed forward passes, the objective over their tokens, and the optimizer.

Which passes a step needs: the log-probs before the step (none for the first update, whose own forward
pass gives them unless it has dropout), those of the reference and of the text-only anchor where the
objective has them, then forward and backward of every update, then the KL of the step on a share of the
rollouts. An update in which something is not finite is skipped on all ranks, see `mssr.actor.guard`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from mssr.actor.distributed import accumulate_locally, clip_grad_norm, reshard
from mssr.actor.guard import NonFiniteGuard, Skipped
from mssr.actor.offload import OffloadedOptimizer
from mssr.actor.optimizers import learning_rate
from mssr.actor.planning import MicroBatch, Passes, Planner, StepPlan, UpdatePlan
from mssr.actor.prompts import PromptCache
from mssr.actor.step import LogProbs, StepState
from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.objective import KnownTokens, LossInParts, Objective, TokenBatch
from mssr.config import Config
from mssr.models.cost import CostModel
from mssr.models.packing import PackedBatch, pack
from mssr.models.policy import PolicyModel
from mssr.rollout.heartbeat import beat
from mssr.types import RankLogProbs, TrainBatch


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
        optimizer: torch.optim.Optimizer | OffloadedOptimizer,
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
        state, plan = StepState(batch, self.device), self.plan(batch, step)
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The first update is on policy: its own forward pass gives the old log-probs, unless it drops some
        # of the adapters' inputs, which the policy that sampled did not.
        for number, update in enumerate(plan.updates):
            own_pass = number == 0 and not self.config.actor.lora.dropout
            self._before_update(state, update.ranks[self.rank], needs_old=not own_pass)
        if plan.holds_out:
            self._score(state.old, state, plan.probe[self.rank])
        self._reshard()
        norms = []
        for number, update in enumerate(plan.updates, 1):
            before = state.measured.copy()
            norm, flagged = self._update(state, update)
            # Norm and flag are global, so every rank decides alike.
            if math.isfinite(norm) and not flagged:
                self.optimizer.step()
                norms.append(norm)
                self.guard.passed()
            else:
                self.guard.skipped(
                    Skipped(step + 1, number, norm, flagged), batch, self.policy.named_parameters()
                )
                if norms or number < len(plan.updates):
                    # The metrics are those of the updates that were made.
                    state.measured = before
            self.optimizer.zero_grad(set_to_none=True)
        self.guard.begin()
        self._probe_kl(state, plan)
        metrics = self._metrics(state, len(norms))
        metrics["policy/grad_norm"] = float(np.mean(norms)) if norms else float("nan")
        metrics["policy/skipped_updates"] = float(len(plan.updates) - len(norms))
        metrics["policy/lr"] = lr
        return metrics

    def plan(self, batch: TrainBatch, step: int) -> StepPlan:
        """The step's updates and the passes that measure its KL, the same on every rank."""
        return self._planner(batch).step(
            self.config.actor.updates_per_step,
            (self.config.seed, step),
            probe_fraction=self.config.kl_probe_fraction,
            hold_out=self.config.holds_out,
        )

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
    def _before_update(self, state: StepState, passes: Passes, needs_old: bool) -> None:
        """Log-probs that an update needs: of the policy before the step, of the reference, of the anchor."""
        self._score(state.old if needs_old else None, state, passes, reference=self._reference_in_loss)
        if self.objective.anchor_coef:
            for micro in passes:
                items = self.prompts.text_only(state.batch, micro.sequences)
                packed = pack(items, self.policy.merge_size).to(self.device)
                self._put(state.anchor, micro, packed, self.policy(packed)[0])

    @property
    def _reference_in_loss(self) -> bool:
        return self.reference is not None and not self.config.kl_in_reward

    @torch.no_grad()
    def _score(self, old: LogProbs | None, state: StepState, passes: Passes, reference: bool = False) -> None:
        """Put log-probs of the policy into ``old``, and those of the reference, from one packing; what the
        batch brought along is not computed again."""
        needs_old = old is not None and state.batch.old_log_probs is None
        needs_reference = reference and state.batch.reference_log_probs is None
        if not (needs_old or needs_reference):
            return
        for micro, packed in self._packed(state.batch, passes):
            if needs_old:
                self._put(state.old, micro, packed, self.policy(packed, micro.any_rank_has_images)[0])
            if needs_reference:
                assert self.reference is not None
                log_probs, _ = self.reference(packed, micro.any_rank_has_images)
                self._put(state.reference, micro, packed, log_probs)

    def _update(self, state: StepState, plan: UpdatePlan) -> tuple[float, bool]:
        """Gradient of one update, clipped: its norm before, and whether some rank saw what is not finite."""
        self.guard.begin()
        self.backward(state, plan)
        return clip_grad_norm(self.parameters, self.config.actor.max_grad_norm, self.guard.flag())

    def backward(self, state: StepState, plan: UpdatePlan) -> None:
        """Accumulate the gradient of one update."""
        passes = plan.ranks[self.rank]
        denominator = self.objective.denominator(state.batch.response_lengths[list(plan.sequences)])
        for micro, packed in self._packed(state.batch, passes):
            if self.config.actor.keep_gathered:
                accumulate_locally(self.policy, last=micro is passes[-1])
            loss, tokens, per_token, metrics = self._loss(state, micro, packed, denominator)
            for key, values in metrics.items():
                state.measured.add(key, values, micro.weight)
            if micro.weight:
                self.guard.observe(micro.sequences, tokens, per_token)
            mismatch = (tokens.engine_log_probs - tokens.old_log_probs).abs()
            state.measured.max("rollout/mismatch_max", mismatch)
            state.measured.total("policy/loss", loss if micro.weight else torch.zeros_like(loss))
            # FSDP averages over ranks; the loss is already divided by the tokens of all of them.
            (loss * micro.weight * self.config.actor.num_ranks).backward()

    def _loss(
        self, state: StepState, micro: MicroBatch, packed: PackedBatch, denominator: float
    ) -> tuple[torch.Tensor, TokenBatch, torch.Tensor, dict[str, torch.Tensor]]:
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
            self._put(state.old, micro, packed, tokens.old_log_probs)
        return loss, tokens, metrics.pop("loss"), metrics

    def _known(self, state: StepState, micro: MicroBatch, packed: PackedBatch) -> KnownTokens:
        batch, sequences, lengths = state.batch, micro.sequences, packed.response_lengths
        if batch.token_advantages is not None:
            advantages = self._of_tokens(state, batch.token_advantages, sequences)
        else:
            per_sequence = torch.from_numpy(batch.advantages[list(sequences)]).to(self.device)
            advantages = per_sequence.repeat_interleave(lengths)
        anchor, has_image = state.anchor.get(sequences), None
        if anchor is not None:
            images = torch.from_numpy(self._has_images(batch)[list(sequences)]).to(self.device)
            has_image = images.repeat_interleave(lengths)
        return KnownTokens(
            old_log_probs=state.old.get(sequences),
            engine_log_probs=self._of_tokens(state, batch.engine_log_probs, sequences),
            advantages=advantages,
            lengths=lengths,
            reference_log_probs=state.reference.get(sequences),
            anchor_log_probs=anchor,
            has_image=has_image,
        )

    @torch.no_grad()
    def _probe_kl(self, state: StepState, plan: StepPlan) -> None:
        """KL(before || after the step), k3, on the plan's share of the rollouts.

        They were sampled before the step. On those that were trained on the estimate is too high, because
        the step changed the probabilities of these very tokens most; on those held out it is unbiased.
        """
        for micro, packed in self._packed(state.batch, plan.probe[self.rank]):
            after, _ = self.policy(packed, micro.any_rank_has_images)
            # Where the rank only runs along (weight 0) it may not know the old log-probs.
            old = state.old.get(micro.sequences) if micro.weight else after
            assert old is not None
            state.measured.add("policy/kl_update", kl_penalty(old, after, kind="k3"), micro.weight)
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

    def _packed(self, batch: TrainBatch, passes: Passes) -> Iterator[tuple[MicroBatch, PackedBatch]]:
        for micro in passes:
            beat()
            items = self.prompts.items(batch, micro.sequences)
            yield micro, pack(items, self.policy.merge_size).to(self.device)

    def _put(self, into: LogProbs, micro: MicroBatch, packed: PackedBatch, values: torch.Tensor) -> None:
        into.put(micro.sequences, values, packed.response_lengths.tolist())

    def _of_tokens(self, state: StepState, values: np.ndarray, sequences: tuple[int, ...]) -> torch.Tensor:
        """The parts of an array over response tokens that belong to some sequences."""
        parts = [values[part] for part in state.response_slices(sequences)]
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def _metrics(self, state: StepState, updates: int) -> dict[str, float]:
        encoded, self.prompts.encoded = self.prompts.encoded, 0
        key = "perf/prompts_encoded_by_ranks"
        state.measured.total(key, torch.tensor(encoded, device=self.device))
        metrics = state.measured.reduce()
        # The mean of what each update minimised, of those that were made.
        metrics["policy/loss"] = metrics["policy/loss"] / updates if updates else math.nan
        for key in ("policy/kl_update", "policy/kl_ref"):
            # No log-prob was finite, so nothing was learned; what follows these takes no NaN.
            if math.isnan(metrics.get(key, 0.0)):
                metrics[key] = 0.0
        return metrics

    def _reshard(self) -> None:
        """After passes without backward; a reference that is kept gathered never changes."""
        reshard(self.policy)
        if self.reference is not None and not self.config.actor.keep_gathered:
            reshard(self.reference)


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
