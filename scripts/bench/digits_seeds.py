"""The embedded task over several seeds: accuracy, time, speed and memory, as a Markdown table.

    mssr prepare digits --out data/digits
    python scripts/bench/digits_seeds.py --seeds 0 1 2 --out scripts/bench/results/digits_seeds.md

Memory is the proportional set size of the command and all its descendants together (Ray's daemons,
workers, engine), sampled every two seconds.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from report import GIB, arguments, publish, table

TARGET = 0.65
COLUMNS = ("seed", "steps", "accuracy before", "accuracy after", f"first validation at {TARGET:.0%}",
           "minutes", "seconds to first step", "rollouts/s", "peak memory, GiB",
           "driver RSS, GiB, step 10 -> last")  # fmt: skip


def memory_gib(process: psutil.Process) -> float:
    total = 0
    for member in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            total += member.memory_full_info().pss
    return total / GIB


def run(config: str, seed: int, overrides: list[str], run_dir: Path) -> tuple[str, ...]:
    """A row of the table."""
    shutil.rmtree(run_dir, ignore_errors=True)
    options = [config, f"seed={seed}", f"trainer.run_dir={run_dir}", *overrides]
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "mssr.tools.cli", "train", *options])
    process = psutil.Process(child.pid)
    metrics = run_dir / "metrics.jsonl"
    first_step, peak, next_sample = None, 0.0, started
    while child.poll() is None:
        if first_step is None and metrics.is_file() and '"step": 1,' in metrics.read_text():
            first_step = time.monotonic() - started
        if time.monotonic() >= next_sample:  # seldom: reading the maps of a process holds it up
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                peak = max(peak, memory_gib(process))
            next_sample = time.monotonic() + 2
        time.sleep(0.2)
    if child.wait() != 0:
        raise SystemExit(f"seed {seed}: exit code {child.returncode}, see {run_dir}/logs")
    minutes = (time.monotonic() - started) / 60
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    validations = [(r["step"], r["val/accuracy"]) for r in records if "val/accuracy" in r]
    steps = [r for r in records if r["step"] > 0]
    driver = [r["memory/driver_rss_gib"] for r in steps]
    return (
        str(seed),
        str(records[-1]["step"]),
        f"{validations[0][1]:.1%}",
        f"{validations[-1][1]:.1%}",
        next((f"step {step}" for step, accuracy in validations if accuracy >= TARGET), "never"),
        f"{minutes:.1f}",
        f"{first_step:.0f}" if first_step else "?",
        f"{statistics.median(r['perf/rollouts_per_s'] for r in steps):.0f}",
        f"{peak:.1f}",
        f"{driver[min(9, len(driver) - 1)]:.3f} -> {driver[-1]:.3f}",
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--config", default="configs/digits/mssr.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run directories go")
    parser.add_argument("overrides", nargs="*", help="key=value for mssr train")
    args = parser.parse_args()
    rows = (run(args.config, seed, args.overrides, args.runs / f"digits-seed-{seed}") for seed in args.seeds)
    publish(args, lambda: table(COLUMNS, rows))


if __name__ == "__main__":
    main()
