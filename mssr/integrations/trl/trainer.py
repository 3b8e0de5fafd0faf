"""GRPOTrainer with the advantages of a single-rollout method.

In the order of a generation: `_calculate_rewards`, `_generate_and_score_completions` (advantages),
`_compute_loss` (entropy shaping) in each pass, and `end_generation` after the last update (eta, baseline).
spo has each prompt's previous response scored before the updates, see `_drift_since_last_visits`.
All ranks hold the same method in the same state: what it is told is gathered from all of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object, is_peft_model
from torch.utils.data import Sampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from mssr.algorithms.last_visits import LastVisits
from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.shaping import entropy_bonus
from mssr.integrations.base import load_state, save_state
from mssr.integrations.trl import batches
from mssr.integrations.trl.batches import Batch, EpochSampler, loss_mask
from mssr.integrations.trl.config import MSSRConfig

STATE_FILE = "mssr.npz"  # in a checkpoint: what the method has learned


class MSSRTrainer(GRPOTrainer):
    """Takes what GRPOTrainer takes, with an `MSSRConfig` and data whose rows have an id.

    Raises:
        ValueError: no `MSSRConfig`; no column of ids, or one with an id twice; while training: a reward that
            the method does not take, a response with a placeholder, a checkpoint within a generation.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "mssr"]
    _name = "MSSR"
    _paper: ClassVar[dict[str, str]] = {"title": "MSSR", "id": "2512.18215"}

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *rest: Any, **kw: Any) -> None:
        if not isinstance(args, MSSRConfig):
            raise ValueError(f"args must be an MSSRConfig, not {type(args).__name__}")
        self.method = args.make_method()
        self.visits = LastVisits() if self.method.kl_source == "last_visit" else None
        self.sampler: EpochSampler | None = None
        self._rewards = torch.empty(0)
        self._observed: tuple[list[str], np.ndarray] = [], np.empty(0)
        self._drift = np.empty(0)
        self._in_loss: Batch | None = None
        super().__init__(model, reward_funcs, args, *rest, **kw)
        _check_ids(self.train_dataset, args.id_column)
        self.banned = batches.placeholder_ids(self.model.config)
        engine: Any = self.vllm_generation if self.use_vllm else self
        engine.generation_kwargs = batches.ban(engine.generation_kwargs, self.banned, vllm=self.use_vllm)
        if not self.use_vllm:
            self.generation_config.suppress_tokens = engine.generation_kwargs.get("suppress_tokens")
        self.add_callback(_Steps(self))

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        self.sampler = EpochSampler(super()._get_train_sampler(dataset))
        return self.sampler

    def _generate(self, prompts: list) -> tuple:
        generated = super()._generate(prompts)
        _, responses, own, *_ = generated
        for i, tokens in enumerate(responses):
            ours = own[i] if own is not None else [1] * len(tokens)  # 0: text of a tool or an environment
            if found := {t for t, mine in zip(tokens, ours, strict=True) if mine}.intersection(self.banned):
                raise ValueError(f"a response has placeholder {min(found)}, which must not be sampled")
        return generated

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        self._rewards = super()._calculate_rewards(*args)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        if len({bool(row.get("images") or row.get("image")) for row in inputs}) > 1:
            raise ValueError("a generation has rows with and without images, which TRL cannot score together")
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        ids = gather_object([row.get(self.args.id_column) for row in inputs])
        if None in ids:
            raise ValueError(
                f"a row has nothing in column {self.args.id_column!r}, which tells prompts apart"
            )
        rewards = self._summed_rewards()
        lengths = self.accelerator.gather(loss_mask(output).sum(1)).cpu().numpy()
        scored = np.flatnonzero(~np.isnan(rewards))
        advantages = np.zeros(len(ids), np.float32)
        self._observed = [str(ids[i]) for i in scored], rewards[scored]
        if len(scored):
            advantages[scored], metrics = self.method.advantages(*self._observed, lengths[scored])
            score = float(rewards[scored].mean())
            self._tell({**metrics, "reward/score": score, "reward/accuracy": score})
        local = torch.from_numpy(advantages).split(len(inputs))[self.accelerator.process_index]
        output["advantages"] = local.to(self.accelerator.device)
        if self.visits is not None:  # TRL shuffles the rows next
            places = torch.full((len(ids),), -1)  # among the rows of all ranks that were scored
            places[scored] = torch.arange(len(scored))
            output["place"] = places.split(len(inputs))[self.accelerator.process_index]
            self._drift = self._drift_since_last_visits(self.visits, output)
        self._logs["advantages"].extend(advantages.tolist())
        self._metrics["train"].pop("frac_reward_zero_std", None)  # always 1 in groups of one
        return output

    def _summed_rewards(self) -> np.ndarray:
        """(B,) float64 weighted rewards of all ranks' rows; NaN where no function gave one."""
        each = self._rewards.cpu().numpy().astype(np.float64)
        rewards = np.nansum(each * (self.args.reward_weights or [1.0] * each.shape[1]), axis=1)
        if self.method.bounded_rewards:  # weights such as 0.7, 0.2 and 0.1 may add up to a little more than 1
            nearest = np.clip(rewards, 0.0, 1.0)
            rewards = np.where(np.abs(rewards - nearest) < 1e-6, nearest, rewards)
        return np.where(np.isnan(each).all(axis=1), np.nan, rewards)

    def _compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        plain, self._in_loss = inputs["advantages"], inputs if self.model.training else None
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._in_loss, inputs["advantages"] = None, plain

    def _get_per_token_logps_and_entropies(self, *args: Any, **named: Any) -> tuple:
        found = super()._get_per_token_logps_and_entropies(*args, **named)
        if (batch := self._in_loss) is not None:
            log_probs, entropy, _ = found
            old = batch.get("old_per_token_logps")  # on policy TRL keeps none, but the KL needs them
            batch.setdefault("log_probs_before", log_probs.detach() if old is None else old)
            if self.args.shaping:  # TRL's loss has asked for the entropies and reads the advantages next
                batch["advantages"] = self._shaped(batch, entropy.detach().float())
        return found

    def _shaped(self, batch: Batch, entropy: torch.Tensor) -> torch.Tensor:
        """(B, T) advantages with the bonus of (B, T) entropies, from (B,) without."""
        plain = batch["advantages"][:, None].expand_as(entropy)
        coef, divisor = self.args.shaping_coef, self.args.shaping_divisor
        bonus = entropy_bonus(plain, entropy, coef, divisor)
        from_entropy = (coef * entropy <= plain.abs() / divisor).float()
        flipped = ((plain < 0) & (plain + bonus > 0)).float()
        means = self._token_means(loss_mask(batch), bonus, from_entropy, flipped)
        names = "shaping/mean", "shaping/entropy_branch_fraction", "shaping/sign_flip_fraction"
        self._tell(dict(zip(names, means, strict=True)))
        return plain + bonus

    def end_generation(self) -> None:
        """After its last update: the method learns from rewards and KL."""
        ids, rewards = self._observed
        if ids and self.method.baseline is not None:
            kl = self._kl_of_update()
            self.method.observe(ids, rewards, kl if self.visits is None else self._drift)
            self._tell({"policy/kl_update": kl, **self.method.metrics()})
            if self.visits is not None:
                self._remember(self.visits)

    def _drift_since_last_visits(self, visits: LastVisits, output: Batch) -> np.ndarray:
        """(B,) of the scored rows of all ranks: the change of each prompt's previous response until now."""
        if "tool_mask" in output:
            raise ValueError(f"{self.args.method} scores responses again, in which no other text may be")
        ids, places, now = self._observed[0], output["place"].tolist(), {}
        if previous := visits.previous(ids):  # on all ranks, which know all visits, or on none
            then = [previous[i][0] if i in previous else np.empty(0, np.int32) for i in places]
            again = batches.with_responses(output, then, self._tokenizer.pad_token_id)
            found = self._log_probs(again).float().cpu().numpy()
            local = [(i, found[row, : len(then[row])]) for row, i in enumerate(places)]
            now = {i: values for i, values in gather_object(local) if i in previous}
        drift, metrics = visits.drift(ids, now, self.method.divergence)
        self._tell(metrics)
        return drift

    def _remember(self, visits: LastVisits) -> None:
        """The scored responses of all ranks, with their log-probs before the updates."""
        local, names = [], ("completion_mask", "completion_ids", "log_probs_before")
        for batch in self._buffered_inputs:
            mask, tokens, values = (batch[name].cpu() for name in names)
            for place, m, t, v in zip(batch["place"].tolist(), mask.bool(), tokens, values, strict=True):
                local.append((place, t[m].int().numpy(), v[m].float().numpy()))
        seen = {place: pair for place, *pair in gather_object(local)}
        ids = self._observed[0]
        visits.remember(ids, *zip(*(seen[i] for i in range(len(ids))), strict=True))

    @torch.no_grad()
    def _log_probs(self, batch: Batch) -> torch.Tensor:
        """(B, T) of the responses, under the policy of now."""
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            log_probs, _, _ = self._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                batch["completion_ids"].size(1),
                self.args.per_device_train_batch_size,
                **{key: batch[key] for key in batches.FORWARD if batch.get(key) is not None},
            )
        return log_probs

    def _kl_of_update(self) -> float:
        """Token mean of k3 of the policy before the generation's updates against the one after them, over a
        share of all ranks' rows; 0 if it is not finite: nothing was learned then."""
        kls, masks = [], []
        for batch in self._buffered_inputs:
            part = batches.first_rows(batch, self.args.kl_probe_fraction)
            before, after = part["log_probs_before"].float(), self._log_probs(part).float()
            kls.append(kl_penalty(before, after, kind="k3").flatten())
            masks.append(loss_mask(part).flatten())
        (kl,) = self._token_means(torch.cat(masks), torch.cat(kls))
        return kl if np.isfinite(kl) else 0.0

    def _token_means(self, mask: torch.Tensor, *values: torch.Tensor) -> list[float]:
        """Of the tokens of all ranks; the same on each."""
        local = torch.stack([mask.sum().float(), *((v * mask).sum() for v in values)])
        count, *sums = self.accelerator.gather(local[None]).sum(0).tolist()
        return [x / max(count, 1.0) for x in sums]

    def _tell(self, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._metrics["train"][key].append(value)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        self.args.check_end("the checkpoint's step", step)
        if self.args.should_save:
            # First, so that no checkpoint is without it, whenever a run is killed.
            directory = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            directory.mkdir(parents=True, exist_ok=True)
            visits = {} if self.visits is None else {"visits": self.visits.state_dict()}
            save_state(directory / STATE_FILE, {"method": self.method.state_dict(), **visits})
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / STATE_FILE
            if not path.exists():
                raise ValueError(f"{checkpoint} has no {STATE_FILE}: begin with its weights")
            state = load_state(path)
            if ("visits" in state) != (self.visits is not None):
                raise ValueError(f"{path}: kl_source='last_visit' needs, and only it has, last visits")
            self.method.load_state_dict(state["method"])
            if self.visits is not None:
                self.visits.load_state_dict(state["visits"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """All weights, whichever names transformers saved them under. (Its own finds none and only warns.)"""
        target = self.model if model is None else model
        if self.is_fsdp_enabled or is_peft_model(target):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        widest = max((p.dtype for p in target.parameters()), key=lambda dtype: dtype.itemsize)
        options = {"dtype": widest, "output_loading_info": True}
        saved, found = type(target).from_pretrained(resume_from_checkpoint, **options)
        if lost := [*found["missing_keys"], *found["mismatched_keys"]]:
            raise ValueError(f"{resume_from_checkpoint} lacks {len(lost)} of the weights, such as {lost[0]}")
        target.load_state_dict(saved.state_dict(), strict=True)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


class _Steps(transformers.TrainerCallback):
    """Tells the trainer of epochs, and of the end of a generation before it logs and saves."""

    def __init__(self, trainer: MSSRTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.check_end("the checkpoint's step", state.global_step)  # which may be of other settings
        if args.save_strategy == "steps":
            args.check_end("save_steps", state.save_steps)
            args.check_end("max_steps", state.max_steps)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate's set_epoch does not reach the sampler where several processes skip batches to resume.
        if self._trainer.sampler is not None:
            self._trainer.sampler.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.updates_per_generation == 0:
            self._trainer.end_generation()


def _check_ids(dataset: Any, column: str) -> None:
    """Every row has an id of its own. (That of a stream is seen when the row comes.)"""
    names = getattr(dataset, "column_names", None)
    if dataset is None or (names is not None and column not in names):
        raise ValueError(
            f"the data has no column {column!r}, which tells prompts apart: name another as id_column, or"
            " number the rows with data.map(lambda row, i: {'id': str(i)}, with_indices=True)"
        )
    if names is not None and hasattr(dataset, "__len__"):
        twice = [i for i, count in Counter(map(str, dataset[column])).items() if count > 1]
        if twice:
            raise ValueError(f"column {column!r} has {twice[0]!r} twice: two prompts would share a baseline")
