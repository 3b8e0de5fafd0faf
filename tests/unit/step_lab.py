"""One tiny model in float64 whose update steps are compared by value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from mssr.actor.optimizers import make_optimizer
from mssr.actor.prompts import PromptCache
from mssr.actor.update import PolicyUpdater
from mssr.data.prompt_source import PromptSource
from mssr.models.loading import load_model
from mssr.models.policy import PolicyModel
from mssr.runs.config import load_config
from tests.conftest import Workspace
from tests.e2e.ranks import make_batch
from tests.unit.naive_step import NaiveStep, Recipe

IDS = ["t0", "t1", "t2", "t3", "t1", "t6"]
"""One, two, no and one image; a prompt that comes twice; text alone again."""


class StepLab:
    """Every updater starts from the same weights, which have moved away from the reference."""

    def __init__(self, workspace: Workspace, ids: list[str]) -> None:
        self.workspace = workspace
        config = load_config(workspace.config)
        self.policy = PolicyModel(load_model(config.model, torch.float32).double())
        self.reference = PolicyModel(load_model(config.model, torch.float32).double().requires_grad_(False))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.policy.parameters():
                p += 0.004 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
        self.start = {k: v.clone() for k, v in self.policy.model.state_dict().items()}
        self.source = PromptSource(config)
        self.batch = make_batch(workspace, ids)

    def updater(self, run_dir: Path, *overrides: str) -> PolicyUpdater:
        settings = [f"rollout.rollouts_per_step={len(self.batch)}", f"trainer.run_dir={run_dir}"]
        settings += ["actor.num_ranks=1", "actor.micro_batch_tokens=64"]
        settings += ["actor.kl_probe_fraction=1.0", "algorithm.kl.coef=0"]
        config = load_config(self.workspace.config, [*settings, *overrides])
        self.policy.model.load_state_dict(self.start)
        self.policy.zero_grad(set_to_none=True)
        for model in (self.policy, self.reference):
            model.temperature = config.rollout.temperature
        self.policy.head_chunk = 5  # less than a response
        reference = self.reference if config.needs_reference else None
        optimizer = make_optimizer(config, list(self.policy.parameters()), 0)
        prompts = PromptCache(self.source, self.policy)
        return PolicyUpdater(config, self.policy, reference, optimizer, prompts, 0, torch.device("cpu"))

    def naive(self, recipe: Recipe) -> NaiveStep:
        path = self.workspace.path
        return NaiveStep(path / "model", path / "train.parquet", recipe, self.start)


@contextlib.contextmanager
def open_lab(workspace: Workspace, directory: Path, ids: list[str] = IDS) -> Iterator[StepLab]:
    """With a process group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=0, world_size=1)
    try:
        yield StepLab(workspace, ids)
    finally:
        dist.destroy_process_group()
