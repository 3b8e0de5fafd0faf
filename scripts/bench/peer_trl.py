"""GRPO in TRL's GRPOTrainer beside GRPO and MSSR here: the same tiny Qwen2.5-VL, rows, budget, machine.

    mssr prepare digits --out data/digits
    python scripts/bench/peer_trl.py --out scripts/bench/results/peer_trl.md
    python scripts/bench/peer_trl.py curves --out scripts/bench/results/peer_trl_curves.md

``speed``: seconds a step of 256 rollouts, (a) of 32 tokens each (a model that never ends a response), (b)
with a long tail of lengths (its end token has probability 1/48 at every position; at most 256 tokens);
first while all prompts are new, then in MSSR's second epoch, where what can be kept of a prompt is kept. All
trainers take turns, a step each, so that they see the same machine; while one works, the others stand still.

``curves``: mean reward over the steps of the digits task from the same base model, several seeds a side.

Both sides: float32, two cores in all, the same rows and images, the same number of prompts (GRPO: 32 with 8
responses each; MSSR: 256 with one), of updates a step, and learning rate; AdamW, gradient norm clipped at 1,
k3 towards the reference with coefficient 0.01, clip range 0.2 / 0.3, mean over all tokens of an update,
temperature 1, the same reward function. TRL's own environment is made at the first run.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from peer.turns import Side
from report import arguments, publish, table

HERE = Path(__file__).resolve().parent / "peer"
REPO = HERE.parents[2]
ROLLOUTS, GROUP = 256, 8
END_PROBABILITY = 1 / 48
CASES = {"a": ("32 tokens each", 0.0, 32), "b": ("long tail of lengths, at most 256", END_PROBABILITY, 256)}
EPOCH_ROWS = 2048
"""Rows of the digits task."""
PROMPTS = (
    "every prompt is new to its trainer",
    "MSSR's prompts come again, as in all epochs but the first; those of GRPO are new",
)
PHASES = ("rollout", "reward", "update", "sync")
SIDES = ("trl", "grpo", "mssr")
WARM_UP = 1
"""Steps of each side before those that are measured."""
TRL_BATCH = 256
"""per_device_train_batch_size, at most."""
TRL_PYTHON = REPO / ".venv-trl/bin/python"
CONFIG = REPO / "configs/digits/mssr.yaml"


def make_model(base: Path, out: Path, end_probability: float) -> None:
    """The base model changed so that its end token has a constant probability, all text tokens nearly the
    same, and the other special tokens none worth the name: TRL does not survive an image token.

    The last hidden dimension is made a constant, which every embedding and image feature holds and no layer
    writes to. It is so large that the final norm leaves little of the others, and the rows of the (tied) head
    say with it which tokens are likely.
    """
    import torch
    import transformers

    shutil.copytree(base, out, dirs_exist_ok=True)
    model = transformers.AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    core, constant = model.model, 100.0
    weight = core.language_model.embed_tokens.weight
    ids = transformers.AutoTokenizer.from_pretrained(base)
    special = sorted(ids.all_special_ids)
    text_tokens = len(weight) - len(special)
    with torch.no_grad():
        merger = core.visual.merger.mlp[2]
        merger.weight[-1], merger.bias[-1] = 0.0, constant
        for layer in core.language_model.layers:
            layer.self_attn.o_proj.weight[-1] = layer.mlp.down_proj.weight[-1] = 0.0
            layer.input_layernorm.weight[-1] = layer.post_attention_layernorm.weight[-1] = 0.0
        # After the norm the constant is 1 / constant, so a row of (1 + z) * constant gives logit 1 + z.
        core.language_model.norm.weight[-1] = len(weight[0]) ** -0.5 / constant
        weight[:, -1] = constant
        weight[special, -1] = constant * (1 - 30)
        if end_probability:
            odds = end_probability / (1 - end_probability) * text_tokens
            weight[ids.eos_token_id, -1] = constant * (1 + float(torch.tensor(odds).log()))
    model.save_pretrained(out)


def start(args: argparse.Namespace, name: str, algorithm: str, settings: dict[str, Any]) -> Side:
    """TRL's GRPO where ``algorithm`` is "trl", or ours, with the same settings in all that both have; ready
    for its first step."""
    environment = {"PYTHONPATH": str(REPO)}
    if algorithm == "trl":
        environment |= {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
        settings = settings | {
            "data": str(args.data / "train.parquet"),
            "out": str(args.work / name),
            "threads": args.threads,
            "rollouts": ROLLOUTS,
            "n": GROUP,
            "batch": TRL_BATCH,
        }
        command = [str(TRL_PYTHON), str(HERE / "trl_side.py"), json.dumps(settings)]
    else:
        shutil.rmtree(args.work / name, ignore_errors=True)
        command = [sys.executable, str(HERE / "mssr_side.py"), str(CONFIG)]
        command += [*overrides(args, name, algorithm, settings), *args.set]
    return Side(name, command, args.work / f"{name}.log", environment)


def overrides(args: argparse.Namespace, name: str, algorithm: str, settings: dict[str, Any]) -> list[str]:
    """Of the config of the digits run."""
    values = {
        "algorithm.name": algorithm,
        "algorithm.kl.coef": 0.01,
        "model.path": settings["model"],
        "data.train": args.data / "train.parquet",
        "data.val": "null",
        "reward.name": f"{HERE / 'rewards.py'}:{settings['reward']}",
        "rollout.rollouts_per_step": ROLLOUTS,
        "rollout.max_response_length": settings["limit"],
        "actor.updates_per_step": settings["updates"],
        "actor.lr": settings["lr"],
        "trainer.steps": settings["steps"],
        "trainer.save_every": 0,
        "trainer.run_dir": args.work / name,
        "seed": settings["seed"],
    }
    return [f"{key}={value}" for key, value in values.items()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Of a run of ours, by step."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["step"]]


def speed(args: argparse.Namespace) -> list[str]:
    # Steps before each of the two parts that are measured.
    epoch = EPOCH_ROWS // ROLLOUTS
    befores = WARM_UP, epoch * math.ceil((WARM_UP + args.rounds) / epoch) + WARM_UP
    lines: list[str] = []
    for case, (title, end_probability, limit) in CASES.items():
        model = args.work / f"model-{case}"
        make_model(args.data / "model", model, end_probability)
        settings = {
            "model": str(model),
            "reward": "even_length",
            "limit": limit,
            "updates": args.updates,
            "lr": 1e-6,
            "steps": befores[1] + args.rounds,
            "seed": 0,
            "banned": [],
        }
        # One after the other: starting is work, too.
        trainers = {side: start(args, f"{case}-{side}", side, settings) for side in SIDES}
        steps: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(settings["steps"]):
            for side, trainer in trainers.items():
                steps[side].append(trainer.step())
        for side, trainer in trainers.items():
            trainer.close()
            if side != "trl":
                pairs = zip(steps[side], metrics(args.work / f"{case}-{side}"), strict=True)
                steps[side] = [told | record for told, record in pairs]
        for first, prompts in zip(befores, PROMPTS, strict=True):
            part = {side: records[first : first + args.rounds] for side, records in steps.items()}
            rows = [speed_row(side, part[side], part["trl"]) for side in SIDES]
            heading = f"({case}) {title}, steps {first + 1} to {first + args.rounds}: {prompts}"
            lines += [heading, "", *table(SPEED_COLUMNS, rows), ""]
    return lines


SPEED_COLUMNS = ("trainer", "tokens a response", "s a step", "fastest to slowest", "CPU s a step",
                 "rollouts/s", "times TRL", "by CPU time", "phases, s")  # fmt: skip


def speed_row(side: str, steps: list[dict[str, Any]], trl: list[dict[str, Any]]) -> tuple[str, ...]:
    """One line of the table, from the records of measured steps."""

    def median(records: list[dict[str, Any]], key: str) -> float:
        return statistics.median(record[key] for record in records)

    tokens = [step["tokens" if side == "trl" else "rollout/tokens"] for step in steps]
    seconds = sorted(step["seconds"] for step in steps)
    ratios = [median(trl, key) / median(steps, key) for key in ("seconds", "cpu_seconds")]
    phases = [f"{phase} {median(steps, f'timing/{phase}_s'):.2f}" for phase in PHASES if side != "trl"]
    return (
        "TRL, GRPO" if side == "trl" else f"mssr, {side.upper()}",
        f"{statistics.mean(tokens) / ROLLOUTS:.1f}",
        f"{median(steps, 'seconds'):.2f}",
        f"{seconds[0]:.2f} to {seconds[-1]:.2f}",
        f"{median(steps, 'cpu_seconds'):.2f}",
        f"{ROLLOUTS / median(steps, 'seconds'):.0f}",
        *(f"{ratio:.2f}" for ratio in ratios),
        ", ".join(phases) or "-",
    )


def curves(args: argparse.Namespace) -> list[str]:
    import transformers

    from mssr.models.families import family_of

    model = args.data / "model"
    model_config = transformers.AutoConfig.from_pretrained(model)
    rewards: dict[str, list[list[float]]] = {"trl": [], "grpo": []}
    settings = {
        "model": str(model),
        "reward": "digits",
        "limit": 32,
        "updates": args.updates,
        "lr": 5e-5,
        "steps": args.steps,
        # TRL must not sample them; ours never does.
        "banned": family_of(model_config).placeholder_ids(model_config),
    }
    for seed in range(args.seeds):
        for side, of_side in rewards.items():
            name = f"curves-{side}-{seed}"
            trainer = start(args, name, side, settings | {"seed": seed})
            told = [trainer.step() for _ in range(args.steps)]
            trainer.close()
            if side == "trl":
                of_side.append([record["reward"] for record in told])
            else:
                of_side.append([record["reward/accuracy"] for record in metrics(args.work / name)])
    return curve_table(rewards["trl"], rewards["grpo"])


def curve_table(trl_runs: list[list[float]], our_runs: list[list[float]], window: int = 5) -> list[str]:
    """The two sides' means over seeds, and their difference in standard errors of it.

    Seeds are few, so the error of a side is that of single runs pooled over all windows and both sides.
    """
    runs = np.array([trl_runs, our_runs])
    starts = range(0, runs.shape[-1], window)
    means = np.stack([runs[..., k : k + window].mean(-1) for k in starts])  # (windows, sides, seeds)
    pooled = means.var(-1, ddof=1).mean() ** 0.5
    error = pooled * (2 / runs.shape[1]) ** 0.5
    rows = []
    for start, sides in zip(starts, means, strict=True):
        trl, ours = sides.mean(-1)
        steps = f"{start + 1} to {min(start + window, runs.shape[-1])}"
        each = (", ".join(f"{x:.3f}" for x in side) for side in sides)
        difference = f"{ours - trl:+.3f}", f"{(ours - trl) / error:+.1f}"
        rows.append((steps, *each, f"{trl:.3f}", f"{ours:.3f}", *difference))
    columns = ("steps", "TRL, each seed", "mssr, each seed", "TRL, mean", "mssr, mean", "difference",
               "in its standard errors")  # fmt: skip
    return [f"Mean reward; a run's window has a standard deviation of {pooled:.3f} between seeds.", "",
            *table(columns, rows), ""]  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("what", nargs="?", choices=("speed", "curves"), default="speed")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each side, in turn")
    parser.add_argument("--seeds", type=int, default=3, help="of each side's curve, at least 2")
    parser.add_argument("--steps", type=int, default=20, help="of a curve")
    parser.add_argument(
        "--threads", type=int, default=2, help="of TRL; 1 is far quicker where others use the machine, too"
    )
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further overrides of ours")
    parser.add_argument("--work", type=Path, default=REPO / "runs/peer")
    args = parser.parse_args()
    args.updates = {"speed": 1, "curves": 4}[args.what]  # optimizer steps a step
    subprocess.run([REPO / "scripts/test_plugins.sh", "--install", "trl"], check=True)
    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    how = {
        "speed": f"medians of {args.rounds} after {WARM_UP}, the sides in turn",
        "curves": f"GRPO with {args.seeds} seeds a side, {args.steps} steps",
    }

    def measure() -> list[str]:
        tables = {"speed": speed, "curves": curves}[args.what](args)
        names = "trl", "transformers", "torch"
        code = f"import {', '.join(names)}; print({', '.join(f'{name}.__version__' for name in names)})"
        output = subprocess.check_output([TRL_PYTHON, "-c", code], text=True)
        trl, transformers, torch = output.split()[-3:]
        return [
            f"TRL {trl} with transformers {transformers}, torch {torch}. {ROLLOUTS} rollouts and "
            f"{args.updates} updates a step, {how[args.what]}. TRL: per_device_train_batch_size at most "
            f"{TRL_BATCH}, {args.threads} threads, no gradient checkpointing. Ours: {CONFIG.name}, "
            f"{' '.join(args.set) or 'as it is'}.",
            "",
            *tables,
        ]

    publish(args, measure)


if __name__ == "__main__":
    main()
