"""One rank of the policy: model, reference, optimizer; update, export and checkpoint.

A plain class: Ray wraps it, tests and the local launcher call it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mssr.actor.checkpoint import ActorCheckpoint
from mssr.actor.distributed import init_process_group, limit_waits, peak_memory, shard
from mssr.actor.initial_weights import InitialWeights
from mssr.actor.optimizers import make_optimizer, with_offload
from mssr.actor.prompts import Prepared, PromptCache
from mssr.actor.sending import WeightSender
from mssr.actor.update import PolicyUpdater
from mssr.config import Config
from mssr.data.prompt_source import PromptSource
from mssr.models.bounded_cache import BoundedCache
from mssr.models.families import family_of
from mssr.models.loading import compute_dtype, load_model
from mssr.models.lora import WithoutAdapters, add_adapters
from mssr.models.policy import PolicyModel
from mssr.types import RankLogProbs, TrainBatch


class PolicyWorker:
    """Rank ``rank`` of ``config.actor.num_ranks``. Every method is a collective: call it on all ranks.

    Args:
        device: "cpu" or "cuda".
        init_method: where the ranks meet, see `init_process_group`.
        set_threads: give torch as many threads as `host_threads` says.
    """

    def __init__(
        self, config: Config, rank: int, init_method: str, device: str = "cpu", set_threads: bool = True
    ) -> None:
        self.config = config
        self.rank = rank
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
        torch.manual_seed(config.seed)
        # The others wait while rank 0 reads the model.
        start_s, ranks = config.cluster.start_timeout_s, config.actor.num_ranks
        mesh = init_process_group(rank, ranks, init_method, self.device, start_s, config.replicas)
        if set_threads:
            torch.set_num_threads(host_threads(config, device, _ranks_here(ranks)))
        self.compute_dtype = compute_dtype(config.model.dtype, device)
        # Policy and reference have the same frozen tower, in memory too.
        self._tower: torch.nn.Module | None = None
        feature_bytes = int(config.actor.vision_cache_gib * 2**30)
        self._features: BoundedCache[bytes, torch.Tensor] = BoundedCache(feature_bytes)
        adapters = config.actor.lora.rank > 0
        two_models = config.needs_reference and not adapters
        weights = InitialWeights(lambda: self._model(trainable=True, empty=False), rank, self.device)
        self.policy = self._build(mesh, weights, trainable=True, last=not two_models)
        self.reference: torch.nn.Module | None = None
        if two_models:
            self.reference = self._build(mesh, weights, trainable=False, last=True)
        elif config.needs_reference:
            self.reference = WithoutAdapters(self.policy)
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = make_optimizer(config, parameters, shard=mesh.get_local_rank(-1))
        steps = with_offload(optimizer, config.actor.offload, self.device)
        on_device = getattr(steps, "on_device", contextlib.nullcontext)
        background = config.trainer.save_in_background
        self.checkpoint = ActorCheckpoint(self.policy.model, optimizer, rank, background, on_device)
        self.sender = WeightSender(self.policy.model, self.compute_dtype, self.device)
        self._prompts = PromptCache(PromptSource(config), self.policy, config.data.image_cache_bytes)
        self.updater = PolicyUpdater(
            config, self.policy, self.reference, steps, self._prompts, rank, self.device
        )
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        limit_waits(mesh, config.cluster.hang_timeout_s)

    def _model(self, trainable: bool, empty: bool) -> Any:
        """The model of the config; the one in training has the adapters."""
        hf_model = load_model(self.config.model, torch.float32, empty=empty).requires_grad_(trainable)
        if trainable and self.config.actor.lora.rank:
            add_adapters(hf_model, self.config.actor.lora, self.config.seed)
        return hf_model

    def _build(self, mesh: DeviceMesh, weights: InitialWeights, trainable: bool, last: bool) -> PolicyModel:
        actor = self.config.actor
        hf_model = self._model(trainable, empty=True)
        if trainable and actor.activation_checkpointing:
            hf_model.gradient_checkpointing_enable({"use_reentrant": False})
            hf_model.train()  # transformers checkpoints only in train mode; these models have no dropout
        family = family_of(hf_model.config)
        tower = family.tower(hf_model)
        frozen_tower = tower is not None and not self.config.trains_vision
        if frozen_tower:
            tower.requires_grad_(False)
        master = getattr(torch, actor.master_dtype)
        for parameter in hf_model.parameters():
            # What is not trained need not be more exact than the forward pass makes it.
            parameter.data = parameter.data.to(master if parameter.requires_grad else self.compute_dtype)
        fill = weights.filler(hf_model, last)
        if frozen_tower:
            self._tower = self._tower or tower
            hf_model.set_submodule(family.tower_name, self._tower)
        model = PolicyModel(
            hf_model,
            temperature=self.config.rollout.temperature,
            head_chunk=actor.head_chunk(self.device.type),
            features=self._features if frozen_tower else None,
        )
        offload = actor.offload == "all" or (not trainable and actor.offload_reference)
        return shard(model, mesh, self.compute_dtype, actor.keep_gathered, offload, fill)

    def update(self, batch: TrainBatch, step: int, prepared: Prepared | None = None) -> dict[str, float]:
        """See `PolicyUpdater.step`; ``prepared`` is asked for prompts before this rank encodes them."""
        if self.config.actor.lora.dropout:
            # So that a run that is resumed drops what it would have dropped.
            torch.manual_seed(hash((self.config.seed, step, self.rank)) % 2**63)
        with self._profiled(step + 1), self._prompts.using(prepared):
            return self.updater.step(batch, step) | peak_memory(self.device)

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

    def log_probs(self, batch: TrainBatch, reference: bool, prepared: Prepared | None = None) -> RankLogProbs:
        """See `PolicyUpdater.log_probs`: this rank's share of the batch."""
        with self._prompts.using(prepared):
            return self.updater.log_probs(batch, reference)

    def export_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights by Hugging Face name, on CPU in the dtype of the forward pass, the tied head
        included and adapters merged in; None on ranks other than 0."""
        weights = {}
        for name, tensor in self.sender.weights():
            if self.rank == 0:
                # A copy: what is sent must not change under the receiver during the next update.
                weights[name] = tensor.to("cpu", copy=True)
        return weights if self.rank == 0 else None

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def host_threads(config: Config, device_type: str, ranks_here: int) -> int:
    """CPU threads of one of so many ranks on a machine: several where its optimizer steps on the host."""
    on_host = device_type == "cuda" and config.actor.offload == "all"
    share = len(os.sched_getaffinity(0)) // ranks_here if on_host else 1
    return config.cluster.threads_per_actor or max(1, share)


def _ranks_here(ranks: int) -> int:
    """How many ranks run on this machine; a collective."""
    hosts = [""] * ranks
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts.count(socket.gethostname())
