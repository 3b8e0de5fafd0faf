"""verl's V1 trainer on the CPU, with its Ray, TransferQueue, replay buffer, padding and loop.

Only what needs a GPU or a model is replaced: the network of the ranks (`Actor`, in processes of their own
behind verl's `RayWorkerGroup`), the engines (`Rollouts`) and the data (`Rows`).
"""

from __future__ import annotations

import copy
import os
import random
import sys
import uuid
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.utils import tensordict_utils as tu

RANKS = 2
PROMPTS = 7
"""In a step, of 12 of the data; the padding makes them 8."""


def compose_config(*overrides: str) -> DictConfig:
    """verl's own config, as its command composes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


@cache
def _base() -> DictConfig:
    return compose_config(
        "trainer.v1.trainer_mode=mssr_sync",
        "algorithm.adv_estimator=mssr",
        "+algorithm.mssr.kl_target=0.05",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={RANKS}",
        f"data.train_batch_size={PROMPTS}",
        "trainer.val_before_train=false",
        "trainer.save_freq=1",
        "trainer.total_epochs=100",
        "trainer.logger=[file]",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    )


def config(out: Path, *overrides: str) -> DictConfig:
    """That of the tests' runs; ``overrides`` without hydra's plus, whose composition takes half a second."""
    composed = copy.deepcopy(_base())
    with open_dict(composed):
        composed.merge_with_dotlist([f"trainer.default_local_dir={out}", *overrides])
    OmegaConf.resolve(composed)
    return composed


class Actor(Worker):
    """A rank: a token's log-prob and entropy are functions of the token and of the number of updates."""

    def __init__(self) -> None:
        super().__init__()
        self._register_dispatch_collect_info("actor", dp_rank=self.rank, is_collect=True)
        self.updates = 0
        self.scored: list[list[int]] = []  # after an update
        self.trained: list[dict[int, tuple[list[float], list[float]]]] = []

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        out = {"log_probs": score(data["input_ids"], self.updates)}
        if tu.get_non_tensor_data(data, "calculate_entropy", default=False):
            out["entropy"] = uncertainty(data["input_ids"], self.updates)
        else:
            self.scored.append([int(tokens[0]) for tokens in data["input_ids"].unbind()])
        return tu.get_tensordict(out)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn("actor"))
    def update_actor(self, data: TensorDict) -> TensorDict:
        self.updates += 1
        columns = (data[name].unbind() for name in ("input_ids", "advantages", "returns"))
        self.trained.append({int(t[0]): (a.tolist(), r.tolist()) for t, a, r in zip(*columns, strict=True)})
        return tu.get_tensordict({}, non_tensor_dict={"metrics": {"mfu": [0.0], "grad_norm": [1.0]}})

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, path: str, remote: str | None, step: int, max_ckpt_to_keep: int | None) -> None:
        if self.rank == 0:
            os.makedirs(path, exist_ok=True)
            Path(path, "updates").write_text(str(self.updates))

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, local_path: str, del_local_after_load: bool) -> None:
        self.updates = int(Path(local_path, "updates").read_text())

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def told(self) -> tuple[list[list[int]], list[dict[int, tuple[list[float], list[float]]]]]:
        """What this rank scored after each update, by first token, and trained on; and starts afresh."""
        told = self.scored, self.trained
        self.updates, self.scored, self.trained = 0, [], []
        return told

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def plugin(self) -> tuple[bool, bool, bool]:
        """Whether our package and our trainer are imported here, and whether verl knows our names."""
        loaded = [f"mssr.integrations.verl{part}" in sys.modules for part in ("", ".trainer")]
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

        return (*loaded, "mssr" in ADV_ESTIMATOR_REGISTRY)


def _of_token(tokens: torch.Tensor, factor: float) -> torch.Tensor:
    """What a model gives at a position, of the next token: nested (B, P + T), shifted left by one."""
    values = tokens.values().float()
    return torch.nested.nested_tensor_from_jagged(torch.sin(values * factor).roll(-1).abs(), tokens.offsets())


def score(tokens: torch.Tensor, updates: int) -> torch.Tensor:
    """Log-probs under the policy after so many updates."""
    return _of_token(tokens, 1.0) * -(1.0 + 0.1 * updates)


def uncertainty(tokens: torch.Tensor, updates: int) -> torch.Tensor:
    """Entropies, likewise."""
    return _of_token(tokens, 2.0) * (1.0 + 0.5 * updates)


class Rows:
    """The data: prompts by index, in an order of their own, with the state that verl saves."""

    def __init__(self, total: int = 12) -> None:
        self.total, self.next = total, 0

    def batch(self, count: int) -> list[int]:
        rows = [(5 * (self.next + i)) % self.total for i in range(count)]
        self.next += count
        return rows

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Rollouts:
    """Engines and agents: puts a response to each prompt where verl's put theirs, and remembers it.

    ``spoil`` replaces fields of every row. The order of the rows is random.
    """

    def __init__(self, spoil: dict[str, Any] | None = None, responses: int = 1) -> None:
        self.spoil, self.responses = spoil or {}, responses
        self.steps: list[dict[int, tuple[float, list[int]]]] = []

    def generate_sequences(self, batch: TensorDict) -> None:
        step = int(tu.get_non_tensor_data(batch, "global_steps", default=0))
        seen, keys, rows, tags = {}, [], [], []
        uids, versions = list(batch["uid"]), ("global_steps", "min_global_steps", "max_global_steps")
        pairs = list(zip(uids, list(batch["index"]), strict=True))
        random.shuffle(pairs)
        for uid, index in pairs:
            rng = np.random.default_rng([step, index])
            prompt, response = [index + 20] * 3, rng.integers(1, 20, rng.integers(1, 6)).tolist()
            seen[index] = reward, _ = float(rng.integers(0, 2)), prompt + response
            for session in range(self.responses):
                keys.append(f"{uid}_{session}_0")
                rows.append({**_row(uid, index, prompt, response, reward), **self.spoil})
                length = len(prompt + response)
                tags.append({"prompt_len": 3, "response_len": len(response), "seq_len": length})
                tags[-1] |= dict.fromkeys(versions, step)
        fields = tu.list_of_dict_to_tensordict(rows)
        tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=tags)
        done = [{"is_prompt": True, "status": "finished", "global_steps": step} for _ in uids]
        tq.kv_batch_put(keys=uids, partition_id="train", tags=done)
        self.steps.append(seen)


def _row(uid: str, index: int, prompt: list[int], response: list[int], reward: float) -> dict[str, Any]:
    tokens, mask = torch.tensor(prompt + response), torch.ones(len(response), dtype=torch.int64)
    scores = torch.zeros(len(response))
    scores[-1] = reward
    return {
        "uid": uid,
        "data_source": "odd" if index % 2 else "even",
        "extra_info": {"index": index // 2, "split": "train"},
        "prompts": torch.tensor(prompt),
        "responses": torch.tensor(response),
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(len(tokens)),
        "rollout_log_probs": torch.zeros(len(response)),
        "rm_scores": scores,
        "num_turns": 2,
        "multi_modal_inputs": {},
    }


def make_actor() -> RayWorkerGroup:
    """verl's group of ranks, in processes of their own."""
    pool = RayResourcePool(process_on_nodes=[RANKS], use_gpu=False, max_colocate_count=1)
    made = RayClassWithInitArgs(cls=ray.remote(num_cpus=0)(Actor))
    return RayWorkerGroup(resource_pool=pool, ray_cls_with_init=made, device_name="cpu")


def make_trainer(config: DictConfig, actor: RayWorkerGroup, steps: int) -> Any:
    """verl's trainer of this config after what its `init` does with a GPU."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config)
    rows = Rows()

    def fetch(num_prompts: int | None = None) -> TensorDict:
        indices = rows.batch(PROMPTS)
        uids = np.array([uuid.uuid4().hex for _ in range(PROMPTS)], dtype=object)
        batch = tu.get_tensordict({"uid": uids, "index": np.array(indices, dtype=object)})
        tu.assign_non_tensor_data(batch, "global_steps", trainer.global_steps)
        return batch

    trainer._next_train_batch = fetch
    trainer.train_dataloader, trainer.actor_rollout_wg = rows, actor
    trainer.tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)
    nothing = SimpleNamespace(sleep_replicas=lambda: None, update_weights=lambda step: None)
    trainer.checkpoint_manager = nothing
    trainer.reward_loop_manager = SimpleNamespace(reward_loop_worker_handles=[])
    trainer.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: RANKS)
    trainer.total_training_steps, trainer.steps_per_epoch = steps, 1
    trainer.ref_in_actor, trainer.distillation_config = False, None
    trainer._init_dump_executor()
    trainer._load_checkpoint()
    return trainer
