"""How far the two ways to measure the KL of an update are from the truth, on the embedded task.

    mssr prepare digits --out data/digits
    python scripts/bench/kl_probe.py --out scripts/bench/results/kl_probe.md

In every step a large fresh sample of responses, by the policy before the step and never trained on, is scored
before and after the update: its k3 is the truth about that update. Beside it stands what the update itself
reported as policy/kl_update. Both ways train on the same number of rollouts a step, those that are held out
included. The run goes on from step to step, so that the optimizer has moments.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from report import arguments, publish, table

from mssr.cluster.local import LocalCluster
from mssr.data.encoder import PromptEncoder
from mssr.data.loading import load_prompts
from mssr.models.loading import load_processor
from mssr.rewards import Scorer
from mssr.rollout.seeds import request_seed
from mssr.runs.config import load_config
from mssr.trainer.collect import RolloutCollector
from mssr.trainer.estimate import Estimator
from mssr.trainer.loop import make_sampler
from mssr.trainer.timing import PhaseTimer
from mssr.types import RolloutRequest, SamplingParams, TrainBatch

WAYS = {
    "trained, 1/4": ["actor.kl_probe=trained"],
    "held out, 1/16": ["actor.kl_probe=held_out"],
    "held out, 1/4": ["actor.kl_probe=held_out", "actor.kl_probe_fraction=0.25"],
}
STEPS = {32: 24, 256: 10, 2048: 4}
"""Rollouts a step -> steps measured, of all seeds together."""
FRESH_SEED = 1_000_003
COLUMNS = ("rollouts", "probe", "steps", "reported, mean", "true, mean", "ratio of the means",
           "median ratio of a step", "least to largest", "standard error of the truth")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measured:
    """One update."""

    reported: float
    """policy/kl_update, nats a token."""
    truth: float
    """k3 of the fresh sample."""
    error: float
    """Standard error of the truth, over responses."""


def measure(config_file: str, overrides: list[str], rollouts: int, steps: int, fresh: int) -> list[Measured]:
    """Train some steps and compare in each."""
    with tempfile.TemporaryDirectory() as directory:
        config = load_config(
            config_file,
            [
                "cluster.launcher=local",
                "actor.num_ranks=1",
                "rollout.workers=1",
                f"rollout.rollouts_per_step={rollouts}",
                f"trainer.run_dir={directory}/run",
                "reward.workers=1",
                *overrides,
            ],
        )
        encoder = PromptEncoder(load_processor(config.model), config.data)
        dataset = load_prompts(config.data.train, config.data, encoder, Path(directory, "bad.jsonl")).dataset
        cluster, timer = LocalCluster(config, lambda: False), PhaseTimer()
        try:
            with Scorer(config.reward, config.rollout.max_response_length, clip=True) as scorer:
                estimator = Estimator(config, cluster, timer)
                sampler = make_sampler(config, dataset, estimator.algorithm)
                collector = RolloutCollector(config, dataset, sampler, scorer, cluster)
                found = []
                for step in range(steps):
                    cluster.sync_weights(step)
                    collected = collector.collect(step, collector.draw())
                    batch, signal = estimator.batch(collected)
                    sample = fresh_sample(cluster, dataset.ids, config.seed, step, fresh)
                    before = cluster.log_probs(sample).policy
                    metrics = signal | cluster.update(batch, step)
                    change = cluster.log_probs(sample).policy.astype(np.float64) - before
                    kl, lengths = np.expm1(change) - change, sample.response_lengths
                    sums = np.add.reduceat(kl, sample.response_offsets[:-1])
                    spread = np.std(sums - kl.mean() * lengths) / lengths.mean() / math.sqrt(fresh)
                    found.append(Measured(metrics["policy/kl_update"], float(kl.mean()), float(spread)))
                    estimator.observe(collected, metrics)
                    print(rollouts, overrides, step, found[-1], file=sys.stderr, flush=True)
                return found
        finally:
            cluster.shutdown()


def fresh_sample(cluster: LocalCluster, ids: list[str], seed: int, step: int, count: int) -> TrainBatch:
    """Responses of the policy as it is to training prompts, with seeds of their own."""
    rng = np.random.default_rng([seed, step, FRESH_SEED])
    prompts = [ids[i] for i in rng.integers(len(ids), size=count)]
    requests = [
        RolloutRequest(p, k, request_seed(seed + FRESH_SEED, step, p, k)) for k, p in enumerate(prompts)
    ]
    rollouts = cluster.generate(requests, SamplingParams(temperature=1.0, max_tokens=32))
    return TrainBatch.of(rollouts)


def row(rollouts: int, way: str, found: list[Measured]) -> tuple[str, ...]:
    reported, truth = sum(m.reported for m in found), sum(m.truth for m in found)
    ratios = [m.reported / m.truth for m in found]
    return (
        str(rollouts),
        way,
        str(len(found)),
        f"{reported / len(found):.2e}",
        f"{truth / len(found):.2e}",
        f"{reported / truth:.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        f"{statistics.mean(m.error / m.truth for m in found):.1%}",
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", default="configs/digits/mssr.yaml")
    parser.add_argument("--rollouts", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--fresh", type=int, default=4096, help="responses of the fresh sample")
    args = parser.parse_args()

    def measure_all() -> list[str]:
        rows = []
        for rollouts in args.rollouts:
            steps = max(2, STEPS.get(rollouts, 6) // len(args.seeds))
            for way, overrides in WAYS.items():
                found = []
                for seed in args.seeds:
                    options = [*overrides, f"seed={seed}"]
                    found += measure(args.config, options, rollouts, steps, args.fresh)
                rows.append(row(rollouts, way, found))
        return [
            f"Digits, MSSR, {args.fresh} fresh responses a step, seeds {', '.join(map(str, args.seeds))}. "
            "Reported over true KL of the same updates, nats a token.",
            "",
            *table(COLUMNS, rows),
        ]

    publish(args, measure_all)


if __name__ == "__main__":
    main()
