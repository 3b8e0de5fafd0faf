"""A rank in this process, whose group it is alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from mssr.actor.worker import PolicyWorker
from mssr.runs.config import load_config
from tests.conftest import Workspace

LORA = ["actor.lora.rank=4", "actor.lr=0.01", "algorithm.kl.coef=0.1"]
"""Adapters that move enough in one update to be seen."""


@contextlib.contextmanager
def open_worker(workspace: Workspace, path: Path, *overrides: str) -> Iterator[PolicyWorker]:
    """One that trains on four rollouts a step and is closed in the end; ``path`` may have had others."""
    sizes = ["actor.num_ranks=1", "rollout.rollouts_per_step=4"]
    config = load_config(workspace.config, [*sizes, *overrides])
    worker = PolicyWorker(config, 0, f"file://{path}/rendezvous-{len(list(path.iterdir()))}")
    try:
        yield worker
    finally:
        worker.close()


def weights_of(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    weights = worker.export_weights()
    assert weights is not None
    return weights
