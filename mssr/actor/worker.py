"""One rank of the policy: model, reference, optimizer; update, export and checkpoint.

A plain class: Ray wraps it, tests and the local launcher call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mssr.actor.checkpoint import ActorCheckpoint
from mssr.actor.distributed import full_tensor, init_process_group, shard
from mssr.actor.prompts import PromptCache
from mssr.actor.update import PolicyUpdater
from mssr.config import Config
from mssr.data.prompt_source import PromptSource
from mssr.heartbeat import beat
from mssr.models.features import FeatureCache
from mssr.models.loading import load_model
from mssr.models.policy import PolicyModel
from mssr.types import TrainBatch


class PolicyWorker:
    """Rank ``rank`` of ``config.actor.num_ranks``. Every method is a collective: call it on all ranks.

    Args:
        device: "cpu" or "cuda".
        init_method: where the ranks meet, see `init_process_group`.
        local_rank: which of the visible GPUs.
        set_threads: give torch ``cluster.threads_per_actor`` threads.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        init_method: str,
        device: str = "cpu",
        local_rank: int = 0,
        set_threads: bool = True,
    ) -> None:
        self.config = config
        self.rank = rank
        self.device = torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")
        if set_threads and device == "cpu":
            torch.set_num_threads(config.cluster.threads_per_actor)
        torch.manual_seed(config.seed)
        limit_s = config.cluster.hang_timeout_s
        mesh = init_process_group(rank, config.actor.num_ranks, init_method, self.device, limit_s)
        self.compute_dtype = _compute_dtype(config.model.dtype, device)
        # Policy and reference have the same frozen tower, in memory too.
        self._tower: torch.nn.Module | None = None
        self._features = FeatureCache(int(config.actor.vision_cache_gib * 2**30))
        self.policy = self._build(mesh, trainable=True)
        self.reference = self._build(mesh, trainable=False) if config.needs_reference else None
        self.optimizer = torch.optim.AdamW(
            [p for p in self.policy.parameters() if p.requires_grad],
            lr=config.actor.lr,
            betas=(config.actor.betas[0], config.actor.betas[1]),
            weight_decay=config.actor.weight_decay,
        )
        self._checkpoint = ActorCheckpoint(self.policy.model, self.optimizer, rank)
        max_bytes = int(config.data.image_cache_gib * 2**30)
        prompts = PromptCache(PromptSource(config), self.policy, max_bytes)
        self.updater = PolicyUpdater(
            config, self.policy, self.reference, self.optimizer, prompts, rank, self.device
        )

    def _build(self, mesh: DeviceMesh, trainable: bool) -> PolicyModel:
        hf_model = load_model(self.config.model, torch.float32)
        if trainable and self.config.actor.activation_checkpointing:
            hf_model.gradient_checkpointing_enable({"use_reentrant": False})
            hf_model.train()  # transformers checkpoints only in train mode; Qwen2.5-VL has no dropout
        hf_model.requires_grad_(trainable)
        frozen = self.config.model.freeze_vision
        if frozen:
            hf_model.model.visual = self._frozen_tower(hf_model.model.visual)
        model = PolicyModel(
            hf_model.to(self.device),
            temperature=self.config.rollout.temperature,
            head_chunk=self.config.actor.head_chunk_tokens,
            features=self._features if frozen else None,
        ).to(self.device)
        return shard(model, mesh, self.compute_dtype, self.config.actor.keep_gathered)

    def _frozen_tower(self, tower: torch.nn.Module) -> torch.nn.Module:
        """The first one given, with weights in the dtype of the forward pass."""
        if self._tower is None:
            self._tower = tower.requires_grad_(False)
            for parameter in tower.parameters():
                parameter.data = parameter.data.to(self.compute_dtype)
        return self._tower

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        """See `PolicyUpdater.step`."""
        with self._profiled(step + 1):
            metrics = self.updater.step(batch, step)
        if self.device.type == "cuda":
            metrics["memory/actor_gpu_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return metrics

    @contextlib.contextmanager
    def _profiled(self, step: int) -> Iterator[None]:
        """Trace what runs inside if ``trainer.profile_steps`` names the step."""
        if step not in self.config.trainer.profile_steps:
            yield
            return
        directory = self.config.run_dir / "profiles"
        directory.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile(record_shapes=True, profile_memory=True) as profile:
            yield
        profile.export_chrome_trace(str(directory / f"step-{step:06d}-rank-{self.rank}.json"))

    def log_probs(self, batch: TrainBatch, reference: bool) -> dict[int, tuple[np.ndarray, ...]]:
        """See `PolicyUpdater.log_probs`: this rank's share of the batch."""
        return self.updater.log_probs(batch, reference)

    def export_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights by Hugging Face name, on CPU in the dtype of the forward pass, the tied head
        included; None on ranks other than 0."""
        weights = {}
        for name, value in self.policy.model.state_dict().items():
            beat()
            tensor = full_tensor(value)
            if self.rank == 0:
                # A copy: what is sent must not change under the receiver during the next update.
                weights[name] = tensor.detach().to("cpu", self.compute_dtype, copy=True)
        return weights if self.rank == 0 else None

    def begin_save(self, directory: str) -> None:
        """Write parameters and optimizer, in the background if ``trainer.save_in_background``."""
        self._checkpoint.begin(directory, self.config.trainer.save_in_background)

    def save_done(self) -> bool:
        """Whether `finish_save` would not wait, but for the checksums."""
        return self._checkpoint.done()

    def finish_save(self) -> dict[str, str]:
        """See `ActorCheckpoint.finish`."""
        return self._checkpoint.finish()

    def load(self, directory: str) -> None:
        """Take parameters and optimizer from a directory that was saved on any number of ranks."""
        self._checkpoint.load(directory)

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _compute_dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    return getattr(torch, name)


def resolve_device(name: str) -> str:
    """cluster.device -> "cpu" or "cuda"."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
