"""MSSR inside TRL beside MSSR here: do they learn alike?

    mssr prepare digits --out data/digits
    scripts/test_plugins.sh --install trl
    python scripts/bench/plugin_trl.py --out scripts/bench/results/plugin_trl.md

Mean reward over the steps of the digits task from the same base model. Both sides: 128 rollouts of other
prompts and four updates a step, AdamW with the same learning rate, gradient norm clipped at 1, k3 towards the
reference with coefficient 0.01, clip range 0.2 / 0.3 and dual clip 3, mean over tokens, temperature 1, at
most 32 tokens, the same reward function, and all options of the method as they are. The order of prompts and
the random numbers are each trainer's own. TRL's side is examples/trl/digits.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from peer_trl import CONFIG, REPO, TRL_PYTHON, curve_table, metrics
from report import arguments, publish

EXAMPLE = REPO / "examples/trl"
ROLLOUTS, UPDATES, LIMIT, LEARNING_RATE = 128, 4, 32, 5e-5
"""As in the example."""


def inside_trl(args: Any, seed: int) -> list[float]:
    """reward/accuracy of each step."""
    out = args.work / f"trl-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    words = ["--data", args.data, "--out", out, "--steps", args.steps, "--seed", seed]
    finish([args.trl_python, EXAMPLE / "digits.py", *words], args.work / f"trl-{seed}.log")
    logs = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [log["reward/accuracy"] for log in logs if "reward/accuracy" in log]


def here(args: Any, seed: int) -> list[float]:
    """reward/accuracy of each step."""
    out = args.work / f"mssr-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    values = {
        "model.path": args.data / "model",
        "data.train": args.data / "train.parquet",
        "data.val": "null",
        "reward.name": f"{EXAMPLE / 'reward.py'}:right",
        "rollout.rollouts_per_step": ROLLOUTS,
        "rollout.max_response_length": LIMIT,
        "actor.updates_per_step": UPDATES,
        "actor.lr": LEARNING_RATE,
        "trainer.steps": args.steps,
        "trainer.save_every": 0,
        "trainer.run_dir": out,
        "seed": seed,
    }
    overrides = [f"{key}={value}" for key, value in values.items()]
    log = args.work / f"mssr-{seed}.log"
    finish([sys.executable, "-m", "mssr.tools.cli", "train", CONFIG, *overrides], log)
    return [record["reward/accuracy"] for record in metrics(out)]


def finish(command: list[Any], log: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(REPO), "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as output:
        done = subprocess.run(map(str, command), stdout=output, stderr=output, env=environment)
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{log.stem} failed, see {log}:\n{tail}")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of each side, at least 2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    parser.add_argument("--trl-python", type=Path, default=TRL_PYTHON, help="of an environment with TRL 1.16")
    parser.add_argument("--work", type=Path, default=REPO / "runs/plugin-trl")
    args = parser.parse_args()
    args.work, args.data = args.work.absolute(), args.data.absolute()
    args.work.mkdir(parents=True, exist_ok=True)

    def measure() -> list[str]:
        seeds = range(args.seeds)
        rewards = [[side(args, seed) for seed in seeds] for side in (inside_trl, here)]
        size = f"{args.steps} steps of {ROLLOUTS} rollouts and {UPDATES} updates"
        return [f"MSSR with {args.seeds} seeds a side, {size}.", "", *curve_table(*rewards)]

    publish(args, measure, "torch transformers")


if __name__ == "__main__":
    main()
