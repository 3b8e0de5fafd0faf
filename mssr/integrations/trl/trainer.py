"""GRPOTrainer with the advantages of a single-rollout method.

In the order of a generation: `_calculate_rewards`, `_generate_and_score_completions` (advantages),
`_compute_loss` (entropy shaping) in each pass, and `end_generation` after the last update (eta, baseline).
All ranks hold the same method in the same state: what it is told is gathered from all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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

from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.shaping import entropy_bonus
from mssr.integrations.base import load_state, save_state
from mssr.integrations.trl import batches
from mssr.integrations.trl.batches import Batch, EpochSampler, loss_mask
from mssr.integrations.trl.config import MSSRConfig

STATE_FILE = "mssr.npz"
"""In a checkpoint: what the method has learned."""
_ROUNDING = 1e-6
"""How far outside [0, 1] a weighted sum of rewards within it may come."""


class MSSRTrainer(GRPOTrainer):
    """Takes what GRPOTrainer takes, with an `MSSRConfig` and data whose rows have an id.

    Raises:
        ValueError: no `MSSRConfig`; no column of ids, or one with an id twice; while training: a reward that
            the method does not take, a response with a placeholder, a checkpoint within a generation.
    """

    generation_kwargs: dict[str, Any]
    _tag_names: ClassVar[list[str]] = ["trl", "mssr"]
    _name = "MSSR"
    _paper: ClassVar[dict[str, str]] = {"title": "MSSR", "id": "2512.18215"}

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, train_dataset: Any = None, *rest: Any,
        **named: Any,
    ) -> None:  # fmt: skip
        if not isinstance(args, MSSRConfig):
            raise ValueError(f"args must be an MSSRConfig, not {type(args).__name__}")
        _check_ids(train_dataset, args.id_column)
        self.method = args.make_method()
        self._rewards: torch.Tensor | None = None
        self._observed: tuple[list[str], np.ndarray] | None = None
        self._in_loss: Batch | None = None
        super().__init__(model, reward_funcs, args, train_dataset, *rest, **named)
        self.banned = batches.placeholder_ids(self.model.config)
        self._ban_placeholders()
        self.add_callback(_Steps(self))

    def _ban_placeholders(self) -> None:
        if self.use_vllm:
            engine = self.vllm_generation
            engine.generation_kwargs = batches.ban(engine.generation_kwargs, self.banned, vllm=True)
        else:
            self.generation_kwargs = batches.ban(self.generation_kwargs, self.banned, vllm=False)
            self.generation_config.suppress_tokens = self.generation_kwargs.get("suppress_tokens")

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        plain = super()._get_train_sampler(dataset)
        self.sampler = EpochSampler(
            plain.data_source,
            plain.mini_repeat_count,
            plain.batch_size,
            plain.repeat_count,
            plain.shuffle,
            plain.seed,
        )
        return self.sampler

    # --- advantages

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
        ids = gather_object([_row_id(row, self.args.id_column) for row in inputs])
        rewards = self._summed_rewards()
        lengths = self.accelerator.gather(loss_mask(output).sum(1)).cpu().numpy()
        scored = np.flatnonzero(~np.isnan(rewards))
        advantages = np.zeros(len(ids), np.float32)
        self._observed = [ids[i] for i in scored], rewards[scored]
        if len(scored):
            advantages[scored], metrics = self.method.advantages(*self._observed, lengths[scored])
            score = float(rewards[scored].mean())
            self._tell(
                {**metrics, "reward/score": score, "reward/accuracy": score}
            )  # as of a reward without parts
        first = self.accelerator.process_index * len(inputs)
        local = torch.from_numpy(advantages[first : first + len(inputs)])
        output["advantages"] = local.to(self.accelerator.device)
        self._logs["advantages"].extend(advantages.tolist())
        self._metrics["train"].pop("frac_reward_zero_std", None)  # always 1 in groups of one
        return output

    def _summed_rewards(self) -> np.ndarray:
        """(B,) float64 weighted rewards of all ranks' rows; NaN where no function gave one."""
        assert self._rewards is not None
        each = self._rewards.cpu().numpy().astype(np.float64)
        rewards = np.nansum(each * (self.args.reward_weights or [1.0] * each.shape[1]), axis=1)
        if self.method.bounded_rewards:
            nearest = np.clip(rewards, 0.0, 1.0)
            rewards = np.where(np.abs(rewards - nearest) < _ROUNDING, nearest, rewards)
        return np.where(np.isnan(each).all(axis=1), np.nan, rewards)

    # --- the loss

    def _compute_loss(self, model: Any, inputs: Batch) -> torch.Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        self._in_loss = dict(inputs)
        try:
            loss: torch.Tensor = super()._compute_loss(model, self._in_loss)
            # On policy TRL keeps none, but the KL of the update needs them.
            inputs.setdefault("log_probs_before", self._in_loss["log_probs_before"])
        finally:
            self._in_loss = None
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **named: Any) -> tuple:
        found = super()._get_per_token_logps_and_entropies(*args, **named)
        if (batch := self._in_loss) is not None:  # what follows in TRL's loss reads the advantages from it
            log_probs, entropy, _ = found
            old = batch.get("old_per_token_logps")
            batch.setdefault("log_probs_before", log_probs.detach() if old is None else old)
            if self.args.shaping:
                batch["advantages"] = self._shaped(batch, entropy.detach().float())
        return found

    def _shaped(self, batch: Batch, entropy: torch.Tensor) -> torch.Tensor:
        """(B, T) advantages with the bonus of (B, T) entropies, from (B,) without."""
        plain = batch["advantages"][:, None].expand_as(entropy)
        coef, divisor = self.args.shaping_coef, self.args.shaping_divisor
        bonus = entropy_bonus(plain, entropy, coef, divisor)
        from_entropy = (coef * entropy <= plain.abs() / divisor).float()
        mean, fraction = self._token_means(loss_mask(batch), bonus, from_entropy)
        self._tell({"shaping/mean": mean, "shaping/entropy_branch_fraction": fraction})
        return plain + bonus

    # --- the end of a generation

    def end_generation(self) -> None:
        """After its last update: the method learns from rewards and KL."""
        if self._observed is None or not len(self._observed[0]):
            return
        kl = 0.0
        if self.method.baseline is not None:
            kl = self._kl_of_update()
            self._tell({"policy/kl_update": kl})
        self.method.observe(*self._observed, kl)
        self._observed = None
        self._tell(self.method.metrics())

    @torch.no_grad()
    def _kl_of_update(self) -> float:
        """Token mean of k3 of the policy before the generation's updates against the one after them, over a
        share of all ranks' rows; 0 if it is not finite: nothing was learned then."""
        sums, masks = [], []
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            for batch in self._buffered_inputs:
                part = batches.first_rows(batch, self.args.kl_probe_fraction)
                after = self._log_probs(part)
                sums.append(kl_penalty(part["log_probs_before"].float(), after.float(), kind="k3").flatten())
                masks.append(loss_mask(part).flatten())
        (kl,) = self._token_means(torch.cat(masks), torch.cat(sums))
        return kl if np.isfinite(kl) else 0.0

    def _log_probs(self, batch: Batch) -> torch.Tensor:
        """(B, T) of the responses under the policy of now."""
        found, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            batch_size=self.args.per_device_train_batch_size,
            **{key: batch[key] for key in batches.FORWARD if batch.get(key) is not None},
        )
        return found

    def _token_means(self, mask: torch.Tensor, *values: torch.Tensor) -> list[float]:
        """Of the tokens of all ranks; the same on each."""
        local = torch.stack([mask.sum().double(), *((v.double() * mask).sum() for v in values)])
        count, *sums = self.accelerator.gather(local[None]).sum(0).tolist()
        return [x / max(count, 1.0) for x in sums]

    def _tell(self, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            self._metrics["train"][key].append(value)

    # --- checkpoints

    @property
    def _checkpoint(self) -> str:
        return f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step % self.args.updates_per_generation:
            raise ValueError(
                f"a checkpoint after update {self.state.global_step}, within a generation of"
                f" {self.args.updates_per_generation}, could not be resumed exactly; save at its end"
            )
        if self.args.should_save:
            # First, so that no checkpoint is without it, whenever a run is killed.
            directory = Path(self._get_output_dir(trial=trial)) / self._checkpoint
            os.makedirs(directory, exist_ok=True)
            save_state(directory / STATE_FILE, {"method": self.method.state_dict()})
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            path = Path(checkpoint) / STATE_FILE
            if not path.exists():
                raise ValueError(
                    f"{checkpoint} is of another trainer, without {STATE_FILE}: begin with its weights"
                )
            self.method.load_state_dict(load_state(path)["method"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target = self.model if model is None else model
        if self.is_fsdp_enabled or is_peft_model(target):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            _load_weights(target, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or is_peft_model(self.model):
            super()._load_best_model()
        else:
            _load_weights(self.model, self.state.best_model_checkpoint)


class _Steps(transformers.TrainerCallback):
    """Tells the trainer of epochs, and of the end of a generation before it logs and saves."""

    def __init__(self, trainer: MSSRTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        updates = args.updates_per_generation
        if args.save_strategy != "steps":
            return
        for name, steps in (("save_steps", state.save_steps), ("max_steps", state.max_steps)):
            if steps % updates:
                raise ValueError(
                    f"{name}={steps} must be a multiple of the {updates} updates of a generation: within it a"
                    " checkpoint could not be resumed exactly"
                )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate's set_epoch does not reach the sampler where several processes skip batches to resume.
        self._trainer.sampler.epoch = int(state.epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.updates_per_generation == 0:
            self._trainer.end_generation()


def _load_weights(model: Any, directory: str) -> None:
    """Those of a checkpoint, every one of them, whichever names transformers saved them under."""
    widest = max((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    saved, info = type(model).from_pretrained(directory, dtype=widest, output_loading_info=True)
    if lost := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise ValueError(f"{directory} lacks {len(lost)} of the model's weights, such as {lost[0]}")
    model.load_state_dict(saved.state_dict(), strict=True)


def _check_ids(dataset: Any, column: str) -> None:
    """Every row has an id of its own. (That of a stream is seen when the row comes.)"""
    names: Sequence[str] | None = getattr(dataset, "column_names", None)
    if dataset is None or (names is not None and column not in names):
        raise ValueError(
            f"the data has no column {column!r}, which tells prompts apart: name another as id_column, or"
            " number the rows with data.map(lambda row, i: {'id': str(i)}, with_indices=True)"
        )
    if names is not None and hasattr(dataset, "__len__"):
        ids = [str(i) for i in dataset[column]]
        if len(set(ids)) < len(ids):
            twice = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"column {column!r} has {twice!r} twice: two prompts would share a baseline")


def _row_id(row: dict[str, Any], column: str) -> str:
    if row.get(column) is None:
        raise ValueError(f"a row has nothing in column {column!r}, which tells prompts apart")
    return str(row[column])
