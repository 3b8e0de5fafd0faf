"""What a step costs the driver: the real Trainer over Ray, with many workers that sleep (`fake_workers`).

    PYTHONPATH=. python scripts/bench/driver_scale.py --out scripts/bench/results/driver_scale.md
    PYTHONPATH=. python scripts/bench/driver_scale.py --generate-s 45 --update-s 12 --steps 6  # of 60 s
    PYTHONPATH=. python scripts/bench/driver_scale.py --score-early --steps 6  # as on GPUs
    PYTHONPATH=. python scripts/bench/driver_scale.py --generate-s 2 --update-s 0.1 --steps 90  # memory

Everything on the driver is real: sampler, requests, the stream of rollouts that end, the reward pool with
`exact_match`, MSSR's advantages, the batch, the call of the ranks, the tracker, the way of the weights, the
metrics. The workers are Ray actors that return rollouts of full length, and compute nothing. Engines share
the prompts of their rollouts, as in an epoch where all are new; the driver has references to them.

CPU is the time that all threads of the driver's process have worked, Ray's in it included; the reward pool,
Ray's own processes and the workers are apart. The driver waits in short turns, so a longer step costs it a
little more: hence the second command. Resident memory is told with and without what it shares with Ray's
object store, and its slope is that of a line through the second half of the steps: in the first it still
grows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from mssr.cluster.launch import launch
from mssr.config import Config
from mssr.data.dataset import PromptDataset
from mssr.rewards import Scorer
from mssr.runs.checkpoint import CheckpointStore
from mssr.runs.console import Console
from mssr.runs.events import EventLog
from mssr.runs.loggers import MetricsLog
from mssr.runs.run import Run
from mssr.runs.signals import StopRequest
from mssr.trainer.loop import Trainer
from scripts.bench.fake_workers import OPTIONS, use_fake_workers

MIB = 2**20
PHASES = {
    "generate": "rollouts, with rewards as they end",
    "collect": "draw, answers, requests, rest of the rewards",
    "batch": "advantages, batch",
    "update": "call of the update",
    "observe": "tracker",
    "sync_weights": "weights to the engines",
    "_finish_step": "metrics, log, memory of all workers",
}


class Watch:
    """Wall time and CPU time of the driver by phase; what lies within another phase counts only there."""

    def __init__(self) -> None:
        self._clocks = time.perf_counter, time.process_time
        self._inner: list[list[float]] = []
        self.seconds: dict[str, list[float]] = {}

    def phase(self, owner: Any, method: str) -> None:
        """Make every call of a method of an object a phase of that name."""
        call: Callable[..., Any] = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = [clock() for clock in self._clocks]
            self._inner.append([0.0, 0.0])
            result = call(*args, **kwargs)
            passed = [clock() - start for clock, start in zip(self._clocks, started, strict=True)]
            inner = self._inner.pop()
            if self._inner:
                self._inner[-1] = [a + b for a, b in zip(self._inner[-1], passed, strict=True)]
            own = [a - b for a, b in zip(passed, inner, strict=True)]
            so_far = self.seconds.get(method, [0.0, 0.0])
            self.seconds[method] = [a + b for a, b in zip(so_far, own, strict=True)]
            return result

        setattr(owner, method, watched)


def make_config(args: argparse.Namespace, directory: Path) -> Config:
    config = Config()
    config.data.train, config.data.id_column = str(write_rows(directory, args.prompts)), "id"
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


def write_rows(directory: Path, count: int) -> Path:
    path = directory / "rows.jsonl"
    rows = (
        {"id": f"prompt-{k}", "problem": f"{k} % 2?", "answer": str(k % 2), "images": []}
        for k in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    args: argparse.Namespace, directory: Path
) -> tuple[list[dict[str, list[float]]], list[dict[str, float]]]:
    """Of each step, wall and CPU seconds by phase, and memory in MiB."""
    config = make_config(args, directory)
    (config.run_dir / "samples").mkdir(parents=True)
    dataset = PromptDataset(config.data.train, config.data)
    dataset.check()
    console = Console(sys.stderr, "off", args.steps)
    events = EventLog(config.run_dir, console.announce, 0)
    log = MetricsLog(config, None)
    use_fake_workers()
    started = time.perf_counter()
    process, seconds, memory = psutil.Process(), [], []
    with Scorer(config.reward, args.tokens) as scorer, StopRequest(console.note) as stop:
        cluster = launch(config, events.restart, lambda: stop.requested)
        print(
            f"{args.engines + args.ranks} workers in {time.perf_counter() - started:.0f} s", file=sys.stderr
        )
        store = CheckpointStore(config.run_dir, 1)
        what = Run(config, store, log, events, console, stop)
        trainer = Trainer(what, dataset, [], scorer, cluster)
        watch = Watch()
        for method in ("generate", "update", "sync_weights"):
            watch.phase(cluster, method)
        watch.phase(trainer.collector, "collect")
        for method in ("batch", "observe"):
            watch.phase(trainer.estimator, method)
        watch.phase(trainer, "_finish_step")
        finish_step = trainer._finish_step

        def finish_and_tell() -> None:
            finish_step()
            info, cpu = process.memory_info(), time.process_time()
            seconds.append(watch.seconds | {"step": [time.perf_counter() - told[0], cpu - told[1]]})
            memory.append({"all": info.rss / MIB, "own": (info.rss - info.shared) / MIB})
            told[:] = time.perf_counter(), time.process_time()
            watch.seconds = {}
            print(
                f"step {len(seconds)}: {seconds[-1]['step'][0]:.1f} s, CPU {seconds[-1]['step'][1]:.2f} s, "
                f"{memory[-1]['own']:.0f} MiB",
                file=sys.stderr,
                flush=True,
            )

        trainer._finish_step = finish_and_tell  # type: ignore[method-assign]
        told = [time.perf_counter(), time.process_time()]
        try:
            trainer.run()
            worker = cluster.memory()["memory/rollout_rss_gib"]
        finally:
            cluster.shutdown()
            log.close()
    print(f"largest worker: {worker:.2f} GiB", file=sys.stderr)
    return seconds, memory


def report(
    args: argparse.Namespace, seconds: list[dict[str, list[float]]], memory: list[dict[str, float]]
) -> list[str]:
    measured = seconds[1:]  # the first warms up
    median = {k: [statistics.median(s.get(k, (0.0, 0.0))[c] for s in measured) for c in (0, 1)]
              for k in (*PHASES, "step")}  # fmt: skip
    lines = ["| phase | wall s | CPU s of the driver |", "| --- | --- | --- |"]
    lines += [f"| {name} | {median[k][0]:.2f} | {median[k][1]:.2f} |" for k, name in PHASES.items()]
    wall, cpu = median["step"]
    most = max(s["step"][1] for s in measured)
    lines += [
        f"| **step** | {wall:.2f} | {cpu:.2f} (at most {most:.2f}) |",
        "",
        f"CPU of the driver: {cpu:.2f} s a step, {cpu / 60:.1%} of one of 60 s, {cpu / wall:.1%} of these.",
        "",
        "| memory of the driver, MiB | step 1 | step 5 | halfway | last step | slope, MiB a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    half = len(memory) // 2
    for key, name in (("all", "resident"), ("own", "resident, not shared with Ray")):
        values = [m[key] for m in memory]
        slope = f"{np.polyfit(range(len(values) - half), values[half:], 1)[0]:.3f}" if half > 1 else ""
        told = [values[0], values[min(5, len(values)) - 1], values[half], values[-1]]
        lines.append(f"| {name} | {' | '.join(f'{v:.0f}' for v in told)} | {slope} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, default=56)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rollouts", type=int, default=8192, help="a step")
    parser.add_argument("--tokens", type=int, default=2000, help="of every response")
    parser.add_argument("--prompts", type=int, default=20000, help="of the data set")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--generate-s", type=float, default=10.0, help="longest response")
    parser.add_argument("--update-s", type=float, default=2.0)
    parser.add_argument("--score-early", action="store_true", help="ranks score while engines generate")
    parser.add_argument("--out", type=Path, help="append the tables to this file")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="mssr-driver-") as directory:
        seconds, memory = run(args, Path(directory))
    text = "\n".join(
        [
            f"`PYTHONPATH=. python scripts/bench/driver_scale.py {' '.join(sys.argv[1:])}`, "
            f"{datetime.date.today()}, {os.cpu_count()} CPU cores, no GPU; load average before {load:.1f}.",
            "",
            f"{args.engines} engines and {args.ranks} ranks that sleep, {args.rollouts} rollouts of"
            f" {args.tokens} tokens a step, {args.steps} steps; medians of all but the first. All processes"
            " share the cores, so wall times say little.",
            "",
            *report(args, seconds, memory),
            "",
            "",
        ]
    )
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
