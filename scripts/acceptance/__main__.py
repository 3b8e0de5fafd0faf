"""Run all parts and write one report: ``python -m scripts.acceptance --quick``.

On a GPU each part is a process of its own: one that fails, crashes or takes too long stops no other. A part
has passed, failed, or is not possible on this machine. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path

import psutil

from mssr.cluster.machine import Machine, describe
from mssr.models.families import FAMILIES
from scripts.acceptance.parts import NotPossible, Place, Told

MARK = "MSSR_ACCEPTANCE"
"""Environment variable by which every process of a part is known."""
REPORTS = Path("docs/gpu_reports")
OTHERS = [name for name in FAMILIES if name != "qwen2_5_vl"]
"""Families beside the one that the other parts run."""
PARTS: dict[str, tuple[int, str]] = {
    "doctor": (300, ""),
    "attention": (300, ""),
    "head": (300, ""),
    "optimizers": (300, ""),
    "offload": (600, ""),
    "gpu_tests": (1800, "no GPU"),
    "transport colocated ipc": (900, "no GPU whose memory two processes could share"),
    "transport colocated object_store": (900, "how kill gets its weights"),
    "transport apart broadcast": (900, "part of the digits run"),
    "transport apart object_store": (900, "what all tests use"),
    **{f"family {name}": (900, "what test_family_engines.py does") for name in OTHERS},
    "digits colocated": (3600, "digits apart stands for both, and kill is colocated"),
    "digits apart": (3600, ""),
    "memory": (300, ""),
    "shape 3b": (3600, ""),
    "shape 7b": (5400, "one shape, a tiny one, stands for both"),
    "kill": (1800, ""),
}
"""How many seconds a part may take on GPUs, and why it is left out on a CPU."""


def run_here(names: Sequence[str], place: Place) -> None:
    """Run parts in this process; each leaves a file that says (verdict, seconds, what was seen)."""
    from scripts.acceptance import kernels, runs

    for name in names:
        began, (function, *words) = time.monotonic(), name.split()
        print(f"=== {name}", flush=True)
        try:
            part = getattr(runs, function, None) or getattr(kernels, function)
            told: Told = part(place, *words)
            outcome = "passed", "; ".join(f"{k}: {v}" for k, v in told.items())
        except NotPossible as reason:
            outcome = "not possible here", str(reason)
        except Exception as error:
            traceback.print_exc()
            outcome = "failed", " ".join(f"{type(error).__name__}: {error}".split())[:400]
        seconds = round(time.monotonic() - began)
        (place.scratch / f"{name}.json").write_text(json.dumps([outcome[0], seconds, outcome[1]]))


def run_apart(names: Sequence[str], place: Place) -> list[tuple[str, int, str]]:
    """Run parts in another process, whatever becomes of it; nothing that it started stays."""
    mark, log = uuid.uuid4().hex, place.scratch / f"{names[0]}.log"
    command = [sys.executable, "-m", "scripts.acceptance", "--scratch", str(place.scratch), "--only", *names]
    command += ["--here", str(place.gpus)] + ["--quick"] * place.quick
    limit_s = sum(PARTS[name][0] for name in names)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {MARK: mark})
        try:
            process.wait(limit_s)
            lost = f"the process ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            lost = f"it takes longer than {limit_s} s"
        finally:
            for left in psutil.process_iter():  # Ray's, too
                with contextlib.suppress(psutil.Error):
                    if left.environ().get(MARK) == mark:
                        left.kill()
            process.wait()
    files = [place.scratch / f"{name}.json" for name in names]
    found = [tuple(json.loads(f.read_text())) if f.exists() else ("failed", 0, lost) for f in files]
    if any(verdict == "failed" for verdict, _, _ in found):
        print(log.read_text(errors="replace")[-5000:], file=sys.stderr, flush=True)
    return found


def report(machine: Machine, outcomes: dict[str, tuple[str, int, str]], place: Place) -> str:
    """Markdown, to be committed."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    kinds = ", ".join(sorted({gpu.name for gpu in machine.gpus}))
    gpus = f"{len(machine.gpus)} x {kinds}, driver {machine.driver}" if machine.gpus else "no GPU"
    named = {v: [n for n, o in outcomes.items() if o[0] == v] for v in ("failed", "not possible here")}
    rows = [f"| {n} | {v} | {s} | {told.replace('|', '/')} |" for n, (v, s, told) in outcomes.items()]
    lines = [
        f"# GPU acceptance, {datetime.date.today()}: {'failed' if named['failed'] else 'passed'}",
        "",
        f"- `scripts/gpu_acceptance.sh{' --quick' * place.quick}`, commit {git.stdout.strip() or 'unknown'}",
        *([] if place.gpus else ["- **the CPU stood in: nothing here was seen on a GPU**"]),
        f"- {gpus}; {machine.cores} CPU cores, {machine.memory_bytes / 2**30:.0f} GiB, /dev/shm "
        f"{machine.shm_bytes / 2**30:.0f} GiB",
        "- " + ", ".join(f"{k} {v}" for k, v in {**machine.versions, "CUDA": machine.cuda}.items() if v),
        *(f"- {verdict}: {', '.join(names) or 'nothing'}" for verdict, names in named.items()),
        "",
        "| part | verdict | seconds | what was seen |",
        "| --- | --- | --- | --- |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/gpu_acceptance.sh")
    parser.add_argument("--quick", action="store_true", help="smaller runs, fewer steps")
    parser.add_argument("--cpu", action="store_true", help="let the CPU stand in, also where there are GPUs")
    parser.add_argument("--out", type=Path, help=f"the report; else in {REPORTS}, and without GPUs nowhere")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, metavar="PART", help="some of: " + ", ".join(PARTS)
    )
    parser.add_argument("--scratch", type=Path, help="where runs and logs are kept; else they are deleted")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = args.only or list(PARTS)
    if args.here is not None:
        run_here(names, Place(args.scratch, args.quick, args.here))
        return 0
    machine = describe()
    with contextlib.ExitStack() as stack:
        scratch = args.scratch or stack.enter_context(tempfile.TemporaryDirectory(prefix="mssr-acceptance-"))
        named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",") if gpu]
        gpus = len(machine.gpus) if named == ["all"] else min(len(named), len(machine.gpus))
        place = Place(Path(scratch).absolute(), args.quick, 0 if args.cpu else gpus)
        place.scratch.mkdir(parents=True, exist_ok=True)
        on_cpu = {n: ("not possible here", 0, PARTS[n][1]) for n in names if PARTS[n][1] and not place.gpus}
        to_do = [name for name in names if name not in on_cpu]
        outcomes = dict.fromkeys(names, ("", 0, "")) | on_cpu
        # On a CPU all in one process, for it is to be done soon.
        for group in [[name] for name in to_do] if place.gpus else [to_do]:
            for name, outcome in zip(group, run_apart(group, place), strict=True):
                outcomes[name] = outcome
                print(f"[acceptance] {name}: {outcome[0]} ({outcome[1]} s): {outcome[2]}", flush=True)
    text = report(machine, outcomes, place)
    print(text)
    out = args.out
    if out is None and place.gpus:
        kind = machine.gpus[0].name.removeprefix("NVIDIA ").replace(" ", "-")
        out = REPORTS / f"{datetime.date.today()}-{place.gpus}x{kind}.md"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
        print(f"[acceptance] the report is {out}; please commit it")
    return 1 if any(verdict == "failed" for verdict, _, _ in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
