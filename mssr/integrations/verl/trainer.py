"""verl's synchronous V1 trainer with a method of single rollouts. Imported after verl's (see the package)."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
import verl
from omegaconf import DictConfig
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_from_nested

from mssr.algorithms.losses import kl_penalty
from mssr.algorithms.shaping import entropy_bonus
from mssr.integrations import base
from mssr.integrations.verl.estimators import ESTIMATE, Pair
from mssr.integrations.verl.settings import MODE, read

Metrics = dict[str, Any]
STATE = "mssr.npz"  # in a checkpoint of verl's, beside what it keeps of the actor


@register_trainer(MODE)
class MSSRTrainer(PPOTrainerSync):
    """`PPOTrainerSync` whose advantages come from the history of each prompt.

    Raises:
        ValueError: as `read`; in a step, as `prompt_ids`, or a reward is not in [0, 1].
    """

    def __init__(self, config: DictConfig) -> None:
        self.method, self.settings = read(config, verl.__version__)
        self.shaping = self.method.shapes_entropy if self.settings.shaping is None else self.settings.shaping
        self._ids: dict[str, str] = {}  # prompt ids of the step by key, without padding
        self._rewards: list[float] = []  # in the same order
        super().__init__(config)

    def _build_replay_buffer(self) -> ReplayBuffer:
        # What verl does in its mode "sync" alone it decides by this name, from here on.
        self.trainer_mode = "sync"
        return super()._build_replay_buffer()

    def _compute_advantage(self, batch: KVBatchMeta, metrics: Metrics) -> KVBatchMeta:
        fields = ["data_source", "extra_info", "prompts", "entropy"]
        rows = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        real = [i for i, tag in enumerate(batch.tags) if not tag.get("is_padding", False)]
        columns = [list(rows[name]) for name in fields[:2]] + [rows["prompts"].unbind()]
        ids = prompt_ids(*([column[i] for i in real] for column in columns))
        keys = [batch.keys[i] for i in real]
        if len({key.rsplit("_", 2)[0] for key in keys}) < len(keys):
            raise ValueError("a prompt has several responses, of an agent or by __rollout_n__")
        self._ids = dict(zip(keys, ids, strict=True))
        entropy = rows["entropy"].to_padded_tensor(0.0)
        context = copy_context()
        context.run(ESTIMATE.set, partial(self._estimate, real, entropy, metrics))
        return context.run(super()._compute_advantage, batch, metrics)

    def _estimate(self, real: list[int], entropy: Tensor, metrics: Metrics, *verls: Tensor) -> Pair:
        """(B, T) advantages and returns for verl's token rewards and mask; 0 in padding, not ``real``."""
        scores, mask = verls
        tokens = torch.zeros_like(mask, dtype=torch.bool)
        tokens[real] = mask[real].bool()
        rewards = scores.sum(-1, keepdim=True)
        self._rewards = rewards[real, 0].tolist()
        lengths = tokens[real].sum(-1).numpy()
        of_rows, reported = self.method.advantages(list(self._ids.values()), self._rewards, lengths)
        advantages = torch.zeros(mask.shape)
        advantages[real] = torch.from_numpy(of_rows)[:, None] * tokens[real]
        if self.shaping:
            coef, divisor = self.settings.shaping_coef, self.settings.shaping_divisor
            bonus = entropy_bonus(advantages, entropy, coef, divisor)
            for name, value in (
                ("shaping/mean", bonus),
                ("shaping/entropy_branch_fraction", coef * entropy <= advantages.abs() / divisor),
                ("shaping/sign_flip_fraction", (advantages < 0) & (advantages + bonus > 0)),
            ):
                reported[name] = value[tokens].double().mean().item()
            advantages = advantages + bonus
        metrics.update(reported)
        return advantages, rewards * tokens

    def _update_actor(self, batch: KVBatchMeta, metrics: Metrics) -> KVBatchMeta:
        batch = super()._update_actor(batch, metrics)
        kl = self._measure_kl(batch)
        self.method.observe(list(self._ids.values()), self._rewards, kl)
        metrics.update({"policy/kl_update": kl, **self.method.metrics()})
        return batch

    def _measure_kl(self, batch: KVBatchMeta) -> float:
        """KL(before || after the update), k3, nats per token, on a random part of the batch.

        verl orders rows by rank and length, and keys differ from run to run: the part is drawn by prompt.
        """
        rows = sorted(self._ids, key=lambda key: self._ids[key])
        seed = [self.config.data.get("seed") or 0, self.global_steps]
        drawn = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
        # Ranks take equal parts, of whole micro-batches, which the whole batch can be divided into.
        rollout = self.config.actor_rollout_ref.rollout
        micro = 1 if rollout.log_prob_use_dynamic_bsz else rollout.log_prob_micro_batch_size_per_gpu
        unit = micro * (1 + max(self.actor_rollout_wg._dispatch_info["actor"]))
        count = unit * int(np.ceil(self.settings.kl_probe_fraction * len(rows) / unit))
        probe = batch.select_keys([*drawn, *(key for key in batch.keys if key not in self._ids)][:count])
        probe.extra_info = dict(calculate_entropy=False, compute_loss=False, temperature=rollout.temperature)
        self.actor_rollout_wg.compute_log_prob(probe)  # into log_probs; old_log_probs stay
        fields = ["log_probs", "old_log_probs", "response_mask"]
        data = tq.kv_batch_get(keys=probe.keys, partition_id=probe.partition_id, select_fields=fields)
        mask = data["response_mask"]  # 0 in padding
        after = response_from_nested(data["log_probs"], mask).values()
        kls = kl_penalty(data["old_log_probs"].values(), after)[mask.values().bool()]
        return kls.double().mean().item() if len(kls) else 0.0

    def _save_checkpoint(self) -> None:
        path = Path(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}", STATE)
        path.parent.mkdir(parents=True, exist_ok=True)
        base.save_state(path, self.method.state_dict())
        super()._save_checkpoint()  # whose last act is to name the checkpoint as the latest

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if not self.global_steps:
            return
        trainer, folder = self.config.trainer, f"global_step_{self.global_steps}"
        given = trainer.resume_mode == "resume_path"
        path = Path(trainer.resume_from_path if given else Path(trainer.default_local_dir, folder), STATE)
        if not path.exists():
            raise ValueError(f"{path} is missing: only what {MODE} has saved can be resumed by it")
        self.method.load_state_dict(base.load_state(path))


def prompt_ids(sources: Sequence[Any], infos: Sequence[Any], prompts: Sequence[Tensor]) -> list[str]:
    """Ids that are the same in every epoch and run, of B rows' ``data_source``, ``extra_info`` and tokens.

    Raises:
        ValueError: a row has no ``extra_info.index`` (verl would take 0), or shares it with another prompt.
    """
    seen: dict[str, Tensor] = {}
    ids = []
    for source, info, prompt in zip(sources, infos, prompts, strict=True):
        index = info.get("index") if isinstance(info, dict) else None
        if index is None:
            raise ValueError(f"a row of data_source {source!r} has no extra_info.index: number the rows")
        ids.append(f"{str(source)!r} {index}")
        if not torch.equal(seen.setdefault(ids[-1], prompt), prompt):
            raise ValueError(f"two prompts have data_source {source!r} and extra_info.index {index!r}")
    return ids
