"""What a step costs the driver: the real Trainer over Ray, with many workers that sleep (`fake_workers`).

    PYTHONPATH=. python scripts/bench/driver_scale.py --out scripts/bench/results/driver_scale.md
    PYTHONPATH=. python scripts/bench/driver_scale.py --generate-s 45 --update-s 12 --steps 6  # of 60 s
    PYTHONPATH=. python scripts/bench/driver_scale.py --score-early --steps 6  # as on GPUs
    PYTHONPATH=. python scripts/bench/driver_scale.py --generate-s 2 --update-s 0.1 --steps 90  # memory

All of the driver is real, from sampler to metrics, with `exact_match` and MSSR's advantages. The workers are
Ray actors that return rollouts of full length, and compute nothing. Engines share the prompts of their
rollouts, as in an epoch where all are new; the driver has references to them.

CPU is the time that all threads of the driver's process have worked; the reward pool, Ray's own processes and
the workers are apart. The driver waits in short turns, so a longer step costs it a little more: hence the
second command. Resident memory is told with and without what it shares with Ray's object store; its slope is
that of a line through the second half of the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from fake_workers import OPTIONS, use_fake_workers
from report import MIB, arguments, publish, table, watch

from mssr.cluster.launch import launch
from mssr.config import Config
from mssr.data.dataset import PromptDataset
from mssr.rewards import Scorer
from mssr.runs.checkpoint import CheckpointStore
from mssr.runs.console import Console
from mssr.runs.events import EventLog
from mssr.runs.loggers import MetricsLog
from mssr.runs.signals import StopRequest
from mssr.trainer.loop import Run, Trainer

PHASES = {
    "generate": "rollouts, with rewards as they end",
    "collect": "draw, answers, requests, rest of the rewards",
    "batch": "advantages, batch",
    "update": "call of the update",
    "observe": "tracker",
    "sync_weights": "weights to the engines",
    "_finish_step": "metrics, log, memory of all workers",
}


Clocks = np.ndarray
"""Wall seconds, and CPU seconds of all threads of this process."""
Step = tuple[dict[str, Clocks], float, float]
"""By phase; MiB of the driver, and those of them that are not shared with Ray's object store."""


def clocks() -> Clocks:
    return np.array([time.perf_counter(), time.process_time()])


def make_config(args: argparse.Namespace, directory: Path) -> Config:
    path = directory / "rows.jsonl"
    with path.open("w") as file:
        for k in range(20_000):
            row = {"id": f"prompt-{k}", "problem": f"{k} % 2?", "answer": str(k % 2), "images": []}
            print(json.dumps(row), file=file)
    config = Config()
    config.data.train, config.data.id_column = str(path), "id"
    config.data.cache_dir, config.trainer.run_dir = str(directory / "cache"), str(directory / "run")
    config.trainer.steps, config.trainer.save_every, config.trainer.val_every = args.steps, 0, 0
    config.rollout.rollouts_per_step, config.rollout.workers = args.rollouts, args.engines
    config.rollout.max_response_length = args.tokens
    config.rollout.engine_options = {OPTIONS: {"generate_s": args.generate_s, "update_s": args.update_s}}
    config.actor.num_ranks, config.cluster.device = args.ranks, "cpu"
    config.actor.score_early = "always" if args.score_early else "never"
    # On a machine with more workers than cores the pool may have to wait.
    config.reward.format, config.reward.workers, config.reward.time_limit_s = "none", 2, 120.0
    return config


def train(args: argparse.Namespace, directory: Path) -> list[Step]:
    config = make_config(args, directory)
    (config.run_dir / "samples").mkdir(parents=True)
    dataset = PromptDataset(config.data.train, config.data)
    dataset.check()
    console, log = Console(sys.stderr, "off", args.steps), MetricsLog(config, None)
    events = EventLog(config.run_dir, console.announce, 0)
    use_fake_workers()
    process, steps, seconds = psutil.Process(), list[Step](), dict[str, Clocks]()

    @contextlib.contextmanager
    def clocked(phase: str) -> Iterator[None]:
        started = clocks()
        yield
        seconds[phase] = seconds.get(phase, 0.0) + clocks() - started

    with Scorer(config.reward, args.tokens) as scorer, StopRequest(console.note) as stop:
        cluster = launch(config, events, lambda: stop.requested)
        run = Run(config, CheckpointStore(config.run_dir, 1), log, events, console, stop)
        trainer = Trainer(run, dataset, [], scorer, cluster)
        owners = {"collect": trainer.collector, "batch": trainer.estimator, "observe": trainer.estimator}
        for method in PHASES:
            owner = owners.get(method, trainer if method == "_finish_step" else cluster)
            watch(owner, method, functools.partial(clocked, method))
        finish_step = trainer._finish_step

        def finish_and_tell() -> None:
            nonlocal began
            finish_step()
            passed, info = clocks() - began, process.memory_info()
            seconds["collect"] -= seconds["generate"]  # which is part of it
            own = (info.rss - info.shared) / MIB
            steps.append((seconds | {"step": passed}, info.rss / MIB, own))
            seconds.clear()
            told = f"step {len(steps)}: {passed[0]:.1f} s, CPU {passed[1]:.2f} s, {own:.0f} MiB"
            print(told, file=sys.stderr, flush=True)
            began = clocks()

        trainer._finish_step = finish_and_tell  # type: ignore[method-assign]
        began = clocks()
        try:
            trainer.run()
            worker = cluster.metrics()["memory/rollout_rss_gib"]
        finally:
            cluster.shutdown()
            log.close()
    print(f"largest worker: {worker:.2f} GiB", file=sys.stderr)
    return steps


def tables(steps: list[Step]) -> list[str]:
    measured = [seconds for seconds, _, _ in steps[1:]]  # the first warms up
    median = {k: np.median([s.get(k, np.zeros(2)) for s in measured], axis=0) for k in (*PHASES, "step")}
    (wall, cpu), most = median["step"], max(s["step"][1] for s in measured)
    rows = [(name, *(f"{x:.2f}" for x in median[key])) for key, name in PHASES.items()]
    rows.append(("**step**", f"{wall:.2f}", f"{cpu:.2f} (at most {most:.2f})"))
    half = len(steps) // 2
    memory = []
    for k, title in ((1, "resident"), (2, "resident, not shared with Ray")):
        values = [step[k] for step in steps]
        slope = f"{np.polyfit(range(len(values) - half), values[half:], 1)[0]:.3f}" if half > 1 else ""
        told = [values[0], values[min(5, len(values)) - 1], values[half], values[-1]]
        memory.append((title, *(f"{value:.0f}" for value in told), slope))
    columns = "memory of the driver, MiB", "step 1", "step 5", "halfway", "last step", "slope, MiB a step"
    return [
        *table(("phase", "wall s", "CPU s of the driver"), rows),
        "",
        f"CPU of the driver: {cpu:.2f} s a step, {cpu / 60:.1%} of one of 60 s, {cpu / wall:.1%} of these.",
        "",
        *table(columns, memory),
        "",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--engines", type=int, default=56)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8192, help="a step")
    parser.add_argument("--tokens", type=int, default=2000, help="of every response")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--generate-s", type=float, default=10.0, help="longest response")
    parser.add_argument("--update-s", type=float, default=2.0)
    parser.add_argument("--score-early", action="store_true", help="ranks score while engines generate")
    args = parser.parse_args()

    def measure() -> list[str]:
        with tempfile.TemporaryDirectory(prefix="mssr-driver-") as directory:
            steps = train(args, Path(directory))
        return [
            f"{args.engines} engines and {args.ranks} ranks that sleep, {args.rollouts} rollouts of"
            f" {args.tokens} tokens a step, {args.steps} steps; medians of all but the first. All processes"
            " share the cores, so wall times say little.",
            "",
            *tables(steps),
        ]

    publish(args, measure, append=True)


if __name__ == "__main__":
    main()
