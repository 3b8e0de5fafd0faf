"""The update step: packed forward passes, the objective over their tokens, and the optimizer.

Which passes a step needs: the log-probs before the step (none for the first update, whose own forward
pass gives them unless it has dropout or there is visual credit), those of the reference and without the
images where the objective has them, then forward and backward of every update, then the KL of the step on
a share of the rollouts. An update in which something is not finite is skipped on all ranks, see
`mssr.actor.guard`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import numpy as np
import torch

from mssr.actor.distributed import accumulate_locally, clip_grad_norm, reduce_between_replicas, reshard
from mssr.actor.guard import NonFiniteGuard
from mssr.actor.operations import work_metrics
from mssr.actor.optimizers import OffloadedOptimizer, learning_rate
from mssr.actor.planning import MicroBatch, Passes, Planner, StepPlan, UpdatePlan
from mssr.actor.prompts import PromptCache
from mssr.actor.step import LogProbs, StepState
from mssr.actor.visual import Seen, visual_factors
from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.objective import MicroBatchLoss, Objective
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
        self.visual = config.algorithm.shaping.visual != "none"
        shape = policy.family.shape(policy.model.config.to_dict())
        self.cost_model = CostModel(shape, train_vision=config.trains_vision)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        most = config.actor.max_nonfinite_updates
        self.guard = NonFiniteGuard(config.run_dir / "nonfinite", rank, most, device)

    def step(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """Run ``actor.updates_per_step`` updates on a batch; returns metrics, equal on all ranks.

        Raises:
            TrainingError: too many updates in a row had something in them that is not finite.
        """
        state, plan = self.begin(batch), self.plan(batch, step)
        lr = learning_rate(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._before_updates(state, plan)
        norms = []
        for number, update in enumerate(plan.updates, 1):
            before = copy.deepcopy(state.measured)
            self.guard.begin()
            self.backward(state, update)
            max_norm = self.config.actor.max_grad_norm
            flag, replicas = self.guard.flag(), self.config.replicas
            norm, flagged = clip_grad_norm(self.parameters, max_norm, flag, replicas)
            # Norm and flag are global, so every rank decides alike.
            if math.isfinite(norm) and not flagged:
                self.optimizer.step()
                norms.append(norm)
                self.guard.in_a_row = 0
            else:
                named = self.policy.named_parameters()
                self.guard.skipped(batch, step + 1, number, norm, flagged, named)
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
        return metrics | work_metrics(self.config, self.cost_model, batch, plan, self.device)

    def begin(self, batch: TrainBatch) -> StepState:
        """What is known of a batch before its step."""
        return StepState(batch, self.device, self.cost_model.image_token)

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
        models = [self.policy, self.reference] if reference else [self.policy]
        sequences: list[int] = []
        found: list[list[torch.Tensor]] = [[] for _ in models]
        for micro, packed in self._packed(batch, self._planner(batch).everything()[self.rank]):
            sequences += micro.sequences if micro.weight else ()
            for model, parts in zip(models, found, strict=True):
                assert model is not None
                log_probs = model(packed, micro.any_rank_has_images)[0]
                parts.append(log_probs if micro.weight else log_probs[:0])
        self._reshard()
        policy, *others = (torch.cat(parts).cpu().numpy() for parts in found)
        return RankLogProbs(policy, others[0] if reference else None, np.array(sequences, np.int64))

    def _before_updates(self, state: StepState, plan: StepPlan) -> None:
        """The log-probs that updates and probe need, and that neither batch nor their own passes give."""
        for number, update in enumerate(plan.updates):
            # The first update is on policy: its own forward pass gives the old log-probs, unless it drops
            # some of the adapters' inputs, which the policy that sampled did not.
            own_pass = number == 0 and not self.config.actor.lora.dropout
            self._before_update(state, update.ranks[self.rank], needs_old=not own_pass)
        if self.config.holds_out:
            self._add_log_probs(state.batch, plan.probe[self.rank], (state.old, self.policy))
        self._reshard()

    @torch.no_grad()
    def _before_update(self, state: StepState, passes: Passes, needs_old: bool) -> None:
        if self.visual:
            self._add_credit(state, passes)
            needs_old = False
        wanted: list[tuple[LogProbs, torch.nn.Module]] = [(state.old, self.policy)] if needs_old else []
        if self.reference is not None and not self.config.kl_in_reward:
            wanted.append((state.reference, self.reference))
        self._add_log_probs(state.batch, passes, *wanted)
        if self.objective.anchor_coef and not self.visual:
            for micro, packed in self._packed(state.batch, passes, text_only=True):
                state.anchor.put(micro.sequences, self.policy(packed)[0])

    def _add_credit(self, state: StepState, passes: Passes) -> None:
        """Visual credit, and the log-probs with and without the images, which it is made of."""
        seen: list[Seen] = []
        both = (self._packed(state.batch, passes, text_only) for text_only in (False, True))
        for (micro, packed), (_, blind) in zip(*both, strict=True):
            log_probs, entropy = self.policy(packed, micro.any_rank_has_images)
            if not state.old.complete:
                state.old.put(micro.sequences, log_probs)
            blind_log_probs, blind_entropy = self.policy(blind)
            state.anchor.put(micro.sequences, blind_log_probs)
            seen.append((micro, state.tokens(micro.sequences), entropy, blind_entropy))
        for micro, factors in visual_factors(self.config.algorithm.shaping, seen):
            state.credit.put(micro.sequences, factors)

    @torch.no_grad()
    def _add_log_probs(
        self, batch: TrainBatch, passes: Passes, *wanted: tuple[LogProbs, torch.nn.Module]
    ) -> None:
        """Log-probs under some models, all from one packing, but for those that the batch brought along."""
        missing = [(known, model) for known, model in wanted if not known.complete]
        for micro, packed in self._packed(batch, passes) if missing else ():
            for known, model in missing:
                known.put(micro.sequences, model(packed, micro.any_rank_has_images)[0])

    def backward(self, state: StepState, plan: UpdatePlan) -> None:
        """Accumulate the gradient of one update."""
        passes, batch = plan.ranks[self.rank], state.batch
        denominator = self.objective.denominator(batch.response_lengths[list(plan.sequences)])
        for micro, packed in self._packed(batch, passes):
            last = micro is passes[-1]
            if self.config.actor.keep_gathered:
                accumulate_locally(self.policy, last=last)
            elif self.config.replicas > 1 and self.config.actor.offload != "all":
                # With that gradients are to leave the device, where these wait.
                reduce_between_replicas(self.policy, last)
            tokens = state.tokens(micro.sequences)
            loss_of = MicroBatchLoss(self.objective, tokens, denominator, batch.kl_coef, batch.entropy_alpha)
            if self.objective.token_wise(old_known=tokens.old_log_probs is not None):
                # Forward pass and objective in one. A method, because FSDP rebuilds a dataclass among the
                # arguments, with its tensors in the dtype of the pass.
                loss, log_probs, entropy = self.policy(packed, micro.any_rank_has_images, loss_of.__call__)
            else:
                log_probs, entropy = self.policy(packed, micro.any_rank_has_images)
                loss = loss_of(log_probs, entropy)
            tokens, metrics = tokens.after(log_probs), loss_of.metrics
            assert tokens.old_log_probs is not None
            state.old.put(micro.sequences, tokens.old_log_probs)
            per_token = metrics.pop("loss")
            for key, values in (metrics | self.policy.measured).items():
                state.measured.add(key, values, micro.weight)
            if micro.weight:
                self.guard.observe(micro.sequences, tokens, log_probs, entropy, per_token)
            mismatch = (tokens.engine_log_probs - tokens.old_log_probs).abs()
            state.measured.max("rollout/mismatch_max", mismatch)
            state.measured.total("policy/loss", loss if micro.weight else torch.zeros_like(loss))
            # FSDP averages over ranks; the loss is already divided by the tokens of all of them.
            (loss * micro.weight * self.config.actor.num_ranks).backward()

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
        actor, work = self.config.actor, self.cost_model.work(batch)
        return Planner(work, ranks=actor.num_ranks, token_budget=actor.micro_batch_tokens)

    def _packed(
        self, batch: TrainBatch, passes: Passes, text_only: bool = False
    ) -> Iterator[tuple[MicroBatch, PackedBatch]]:
        for micro in passes:
            beat()
            items = self.prompts.items(batch, micro.sequences, text_only)
            yield micro, pack(items, self.policy.merge_size).to(self.device)

    def _metrics(self, state: StepState, updates: int) -> dict[str, float]:
        encoded, self.prompts.encoded = self.prompts.encoded, 0
        state.measured.total("perf/prompts_encoded_by_ranks", torch.full((), encoded, device=self.device))
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
        loss=config.loss_name,
        loss_options=config.loss_options,
        aggregation=config.aggregation,
        constant_length=config.constant_length,
        shaping=config.shapes_entropy,
        shaping_coef=section.shaping.coef,
        shaping_divisor=section.shaping.divisor,
        shaping_entropy=section.shaping.entropy,  # type: ignore[arg-type]
        negative_fraction=section.shaping.negative_fraction,
        confident=section.entropy_control.confident,
        kl_estimator=section.kl.estimator,  # type: ignore[arg-type]
        entropy_coef=section.loss.entropy_coef,
        anchor_coef=section.loss.text_anchor_coef,
        correction=config.correction_options,
    )
