"""Runs of one process, stopped and resumed, and what they leave behind to compare."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mssr.actor.checkpoint import SafeReader
from mssr.runs.checkpoint import read_state
from tests.chaos.run import comparable

STEPS = 4
SMALL = [
    f"trainer.steps={STEPS}",
    f"trainer.save_every={STEPS}",
    "actor.num_ranks=1",
    "rollout.engine=hf",
    "rollout.rollouts_per_step=6",
    "rollout.max_response_length=6",
    "actor.lr=0.005",
]
_SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from mssr.runs.loggers import MetricsLog
from mssr.trainer.train import train

config, out, variants = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
write = MetricsLog.write
if any("cluster.launcher=ray" in options for _, options in variants.values()):
    from mssr.cluster.ray_start import init_ray
    from mssr.config import Config

    init_ray(Config(), processes=8)  # once for all, with room for those of the run before that still end

def stopping(at):
    def stop(self, record):
        write(self, record)
        if record["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)
    return stop

for name, (at, options) in variants.items():
    assert train(config, [*options, f"trainer.run_dir={out}/{name}-straight"]) == 0
    if at is None:
        continue
    again = [*options, f"trainer.run_dir={out}/{name}-stopped"]
    MetricsLog.write = stopping(at)
    assert train(config, again) == 143, name
    MetricsLog.write = write
    assert train(config, again) == 0
"""


def train_each(config: Path, out: Path, variants: dict[str, tuple[int | None, list[str]]]) -> None:
    """Train every variant (step to stop after, overrides) straight in ``out / "NAME-straight"``, and, unless
    the step is None, stopped by SIGTERM and resumed in ``out / "NAME-stopped"``; all in one process."""
    command = [sys.executable, "-c", _SCRIPT, str(config), str(out), json.dumps(variants)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def read_run(run_dir: Path, first: int = 0) -> dict[str, Any]:
    """What must be equal: metrics (from step ``first``), samples, parameters, optimizer, trainer's state."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(first, STEPS + 1))
    checkpoint = run_dir / "checkpoints" / f"step-{STEPS:06d}"
    return {
        "metrics": comparable(records),
        "samples": {p.name: p.read_text() for p in (run_dir / "samples").iterdir()},
        "state": repr(read_state(checkpoint)),
        "parameters and optimizer": tensors_of(checkpoint),
    }


def tensors_of(checkpoint: Path) -> dict[str, str]:
    """Parameters and moments by name, as hashes of their bytes. (Their order in the files may differ.)"""
    directory = str(checkpoint / "actor")
    index = SafeReader(directory).read_metadata().state_dict_metadata
    tensors = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in index.items()}  # type: ignore[union-attr]
    dcp.load(tensors, storage_reader=SafeReader(directory), no_dist=True)
    return {k: hashlib.sha256(t.numpy().tobytes()).hexdigest() for k, t in sorted(tensors.items())}
