"""How far the two ways to measure the KL of an update are from the truth, on the embedded task.

    mssr prepare digits --out data/digits
    python scripts/bench/kl_probe.py --out scripts/bench/results/kl_probe.md

In every step a large fresh sample of responses, by the policy before the step and never trained on, is scored
before and after the update: its k3 is the truth about that update. Beside it stands policy/kl_update. All
generate the same number of rollouts a step. One run goes on, so that the optimizer has moments.
"""

from __future__ import annotations

import math
import tempfile

import numpy as np
from report import arguments, publish, table

from mssr.cluster.local import LocalCluster
from mssr.data.dataset import PromptDataset
from mssr.rollout.seeds import request_seed
from mssr.trainer import session
from mssr.trainer.train import train
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


def measure(overrides: list[str], rollouts: int, steps: int, fresh: int) -> np.ndarray:
    """Train some steps, and compare in each, with a cluster that measures its updates.

    Returns:
        (3, steps): policy/kl_update and k3 of the fresh sample, in nats a token; standard error of the latter
        over responses.
    """
    found: list[tuple[float, ...]] = []

    class Measuring(LocalCluster):
        def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
            sample = fresh_sample(self, step, fresh)
            before = self.log_probs(sample).policy
            metrics = super().update(batch, step)
            change = self.log_probs(sample).policy.astype(np.float64) - before
            kl, lengths = np.expm1(change) - change, sample.response_lengths
            sums = np.add.reduceat(kl, sample.response_offsets[:-1])
            spread = np.std(sums - kl.mean() * lengths) / lengths.mean() / math.sqrt(fresh)
            found.append((metrics["policy/kl_update"], float(kl.mean()), float(spread)))
            return metrics

    session.launch = lambda config, report, stop: Measuring(config, stop)
    with tempfile.TemporaryDirectory() as directory:
        options = ["cluster.launcher=local", "actor.num_ranks=1", "rollout.workers=1", "reward.workers=1"]
        options += [f"rollout.rollouts_per_step={rollouts}", f"trainer.steps={steps}", "data.val=null"]
        options += [f"trainer.run_dir={directory}/run", "trainer.save_every=0", "trainer.progress=off"]
        assert train("configs/digits/mssr.yaml", [*options, *overrides]) == 0
    return np.array(found).T


def fresh_sample(cluster: LocalCluster, step: int, count: int) -> TrainBatch:
    """Responses of the policy as it is to training prompts, with seeds of their own."""
    config = cluster.config
    ids, seed = PromptDataset(config.data.train, config.data).ids, config.seed
    rng = np.random.default_rng([seed, step, FRESH_SEED])
    prompts = [ids[i] for i in rng.integers(len(ids), size=count)]
    seeds = [request_seed(seed + FRESH_SEED, step, prompt, k) for k, prompt in enumerate(prompts)]
    requests = [RolloutRequest(prompts[k], k, seeds[k]) for k in range(count)]
    return TrainBatch.of(cluster.generate(requests, SamplingParams(temperature=1.0, max_tokens=32)))


def row(rollouts: int, way: str, found: np.ndarray) -> tuple[str, ...]:
    reported, truth, error = found
    ratios = reported / truth
    return (
        str(rollouts),
        way,
        str(len(truth)),
        f"{reported.mean():.2e}",
        f"{truth.mean():.2e}",
        f"{reported.sum() / truth.sum():.2f}",
        f"{np.median(ratios):.2f}",
        f"{ratios.min():.2f} to {ratios.max():.2f}",
        f"{(error / truth).mean():.1%}",
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rollouts", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--fresh", type=int, default=4096, help="responses of the fresh sample")
    args = parser.parse_args()

    def measure_all() -> list[str]:
        rows = []
        for rollouts in args.rollouts:
            steps = max(2, STEPS.get(rollouts, 6) // len(args.seeds))
            for way, overrides in WAYS.items():
                runs = ([*overrides, f"seed={seed}"] for seed in args.seeds)
                found = [measure(options, rollouts, steps, args.fresh) for options in runs]
                rows.append(row(rollouts, way, np.concatenate(found, axis=1)))
        return [
            f"Digits, MSSR, {args.fresh} fresh responses a step, seeds {', '.join(map(str, args.seeds))}. "
            "Reported over true KL of the same updates, nats a token.",
            "",
            *table(COLUMNS, rows),
        ]

    publish(args, measure_all)


if __name__ == "__main__":
    main()
