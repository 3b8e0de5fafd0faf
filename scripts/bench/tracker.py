"""Time and memory of the Beta baseline with millions of prompts, as a Markdown table.

    python scripts/bench/tracker.py --out scripts/bench/results/tracker.md

For each size, two fresh processes. The first visits that many prompts, 2048 a step (`values`, then
`update`), then already seen ones, then saves as a checkpoint does. The second loads, and draws 2048 of all
prompts by uncertainty. Times are medians with quartiles in brackets; no file is synced to the disk. Memory
is the growth of the resident set since the process had no tracker; its peak is the kernel's (Linux only).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from report import MIB, arguments, in_new_process, publish, resident, table, timed

from mssr.algorithms import BetaBaseline
from mssr.data.sampler import UncertaintySampler
from mssr.runs.checkpoint import read_state, write_state

STEP = 2048
ROWS = {
    "memory": "memory of the tracker, MiB",
    "peak_growing": "its peak while growing, MiB",
    "peak_saving": "peak with the first save, MiB",
    "peak_loading": "peak with the first load, MiB",
    "new_ms": f"values + update of {STEP} new ids, ms",
    "seen_ms": f"values + update of {STEP} seen ids, ms",
    "longest_ms": "longest values + update (doubling), ms",
    "mean_ms": "mean of all values, ms",
    "save_s": "save, s",
    "load_s": "load, s",
    "draw_s": f"draw of {STEP} of all prompts by uncertainty, s",
}
"""What the stages measure, by its name in their results."""


def seconds(call: Callable[[], object], repeats: int = 1) -> list[float]:
    return [timed(call)[0] for _ in range(repeats)]


def shown(times: list[float], unit: float = 1.0) -> str:
    low, middle, high = np.percentile(times, [25, 50, 75]) * unit
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def prompt_ids(numbers: Any) -> list[str]:
    return [f"prompt-{i:08d}" for i in numbers]


def step(baseline: BetaBaseline, ids: list[str], rewards: np.ndarray) -> float:
    """Seconds of it."""
    return timed(lambda: (baseline.values(ids), baseline.update(ids, rewards, eta=0.9)))[0]


def grow_and_save(prompts: int, directory: Path, repeats: int) -> dict[str, str]:
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, (64, STEP)).astype(np.float64)
    step(BetaBaseline(), prompt_ids(range(STEP)), rewards[0])  # load what is loaded lazily
    before = resident()
    baseline = BetaBaseline()
    new: list[float] = []
    for start in range(0, prompts, STEP):
        ids = prompt_ids(range(start, min(start + STEP, prompts)))
        new.append(step(baseline, ids, rewards[len(new) % 64][: len(ids)]))
    assert len(baseline) == prompts
    memory, peak_growing = resident() - before, resident("VmHWM") - before
    seen = [step(baseline, prompt_ids(rng.integers(0, prompts, STEP)), rewards[k % 64]) for k in range(300)]
    means = seconds(baseline.mean, 20)

    def save() -> None:
        write_state(directory, {"b": baseline.state_dict()})

    saves = seconds(save)
    peak_saving = resident("VmHWM") - before
    return {
        "memory": f"{memory / MIB:.0f}",
        "peak_growing": f"{peak_growing / MIB:.0f}",
        "peak_saving": f"{peak_saving / MIB:.0f}",
        "new_ms": shown(new[-301:-1], 1e3),  # the last is not whole
        "seen_ms": shown(seen, 1e3),
        "longest_ms": f"{1e3 * max(new):.0f}",
        "mean_ms": shown(means, 1e3),
        "save_s": shown(saves + seconds(save, repeats - 1)),
    }


def load_and_draw(prompts: int, directory: Path, repeats: int) -> dict[str, str]:
    before = resident()
    baseline = BetaBaseline()

    def load() -> None:
        baseline.load_state_dict(read_state(directory)["b"])

    loads = seconds(load)
    peak_loading = resident("VmHWM") - before
    loads += seconds(load, repeats - 1)
    assert len(baseline) == prompts
    ids = prompt_ids(range(prompts))
    keys = baseline.keys(ids)
    sampler = UncertaintySampler(ids, 0, lambda: baseline.values(keys))
    draws = seconds(lambda: sampler.next(STEP), max(5, repeats))
    return {"peak_loading": f"{peak_loading / MIB:.0f}", "load_s": shown(loads), "draw_s": shown(draws)}


STAGES = {"grow_and_save": grow_and_save, "load_and_draw": load_and_draw}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=5, help="how often to save and to load (5)")
    parser.add_argument("--stage", choices=tuple(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(STAGES[args.stage](args.prompts[0], args.directory, args.repeats)))
        return

    def measure() -> list[str]:
        found: list[dict[str, str]] = [{} for _ in args.prompts]
        for prompts, results in zip(args.prompts, found, strict=True):
            with tempfile.TemporaryDirectory() as directory:
                sizes = "--prompts", str(prompts), "--repeats", str(args.repeats)
                for stage in STAGES:
                    results |= in_new_process("--stage", stage, "--directory", directory, *sizes)
        rows = [[title, *(results[name] for results in found)] for name, title in ROWS.items()]
        return table(["", *(f"{prompts:,} prompts" for prompts in args.prompts)], rows)

    publish(args, measure, "numpy")


if __name__ == "__main__":
    main()
