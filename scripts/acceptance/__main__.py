"""Run all parts, each in a process of its own, and write one report: ``python -m scripts.acceptance --quick``.

A part has passed, failed, or is not possible on this machine. One that fails or takes too long does not stop
the others. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil

from mssr.cluster.machine import Machine, describe
from scripts.acceptance.parts import NotPossible, Part, Place, Told

MARK = "MSSR_ACCEPTANCE"
"""Environment variable by which every process of a part is known."""
REPORTS = Path("docs/gpu_reports")
LIMITS_S = {
    "doctor": 300,
    "attention": 300,
    "head": 300,
    "model": 300,
    "optimizers": 300,
    "offload": 600,
    "tests marked gpu": 1800,
    "transport colocated ipc": 900,
    "transport colocated object_store": 900,
    "transport apart broadcast": 900,
    "transport apart object_store": 900,
    "digits colocated": 3600,
    "digits apart": 3600,
    "memory over the steps": 60,
    "shape 3b": 3600,
    "shape 7b": 5400,
    "kill and resume": 1800,
}
"""The parts in their order, and how long each may take."""
ON_CPU_LEFT_OUT = {
    "tests marked gpu": "no GPU",
    "transport colocated object_store": "on a CPU part of the digits run",
    "transport apart broadcast": "on a CPU part of the digits run",
    "transport apart object_store": "on a CPU it is what all tests use",
    "shape 7b": "on a CPU there is one shape, a tiny one",
}


def part_of(name: str) -> Part:
    """The function of a part. Imports torch, which the process that runs all parts does without."""
    from scripts.acceptance import kernels, runs

    kind, *words = name.split()
    if kind in ("transport", "digits", "shape"):
        return lambda place: getattr(runs, kind)(place, *words)
    if name == "tests marked gpu":
        return gpu_tests
    module = runs if kind in ("doctor", "memory", "kill") else kernels
    return getattr(module, f"{kind}_part")


def gpu_tests(place: Place) -> Told:
    """Those that the other tests leave out."""
    ran = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"])
    if ran.returncode == 5:
        raise NotPossible("no test is marked so")
    assert ran.returncode == 0, "see its log"
    return {}


def child(name: str, place: Place) -> int:
    """Run a part in this process, and leave what it says in a file."""
    try:
        found = {"told": part_of(name)(place)}
    except NotPossible as reason:
        found = {"not possible here": str(reason)}
    except BaseException as error:
        traceback.print_exc()
        found = {"failed": " ".join(f"{error}".split())[:400] or type(error).__name__}
    (place.scratch / f"{name}.json").write_text(json.dumps(found))
    return 1 if "failed" in found else 0


@dataclass(frozen=True)
class Outcome:
    """A line of the report."""

    name: str
    verdict: str
    """passed, failed, or not possible here"""
    seconds: float
    told: str


def run_part(name: str, place: Place, limit_s: float) -> Outcome:
    """Run a part in a process of its own, whatever becomes of it; nothing that it started stays."""
    if not place.gpus and name in ON_CPU_LEFT_OUT:
        return Outcome(name, "not possible here", 0.0, ON_CPU_LEFT_OUT[name])
    mark, began, log = uuid.uuid4().hex, time.monotonic(), place.scratch / f"{name}.log"
    command = [sys.executable, "-m", "scripts.acceptance", "--part", name, "--scratch", str(place.scratch)]
    command += ["--gpus", str(place.gpus)] + ["--quick"] * place.quick
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env=os.environ | {MARK: mark}
        )
        late = ""
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            late = f"took longer than {limit_s:.0f} s"
        finally:
            end(mark)
            process.wait()
    seconds = time.monotonic() - began
    file = place.scratch / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {"failed": f"ended with {process.returncode}"}
    if late:
        found = {"failed": late}
    [(verdict, told)] = found.items()
    if verdict == "told":
        return Outcome(name, "passed", seconds, "; ".join(f"{k}: {v}" for k, v in told.items()))
    return Outcome(name, verdict, seconds, told)


def end(mark: str) -> None:
    """Kill all processes of a part, Ray's included."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.environ().get(MARK) == mark:
                process.send_signal(signal.SIGKILL)


def report(machine: Machine, outcomes: list[Outcome], quick: bool, cpu: bool) -> str:
    """Markdown, to be committed."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    kinds = sorted({gpu.name for gpu in machine.gpus})
    gpus = f"{len(machine.gpus)} x {', '.join(kinds)}, driver {machine.driver}" if machine.gpus else "no GPU"
    cpu_note = ["The CPU stood in: nothing here was seen on a GPU.", ""] if cpu else []
    failed = [o.name for o in outcomes if o.verdict == "failed"]
    impossible = [o for o in outcomes if o.verdict == "not possible here"]
    lines = [
        f"# GPU acceptance, {datetime.date.today()}: {'failed' if failed else 'passed'}",
        "",
        f"`scripts/gpu_acceptance.sh{' --quick' if quick else ''}{' --cpu' if cpu else ''}`, commit "
        f"{commit.stdout.strip() or 'unknown'}",
        "",
        *cpu_note,
        f"- machine: {gpus}; {machine.cores} CPU cores, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"/dev/shm {machine.shm_bytes / 2**30:.0f} GiB",
        f"- versions: {', '.join(f'{k} {v}' for k, v in machine.versions.items() if v)}"
        + (f", CUDA {machine.cuda}" if machine.cuda else ""),
        "",
        "| part | verdict | seconds | what was seen |",
        "| --- | --- | --- | --- |",
        *(f"| {o.name} | {o.verdict} | {o.seconds:.0f} | {o.told.replace('|', '/')} |" for o in outcomes),
        "",
        f"Not done: {', '.join(o.name for o in impossible) or 'nothing'}. Failed: {', '.join(failed) or 'none'}.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/gpu_acceptance.sh")
    parser.add_argument("--quick", action="store_true", help="smaller runs, fewer steps")
    parser.add_argument("--cpu", action="store_true", help="let the CPU stand in, also where there are GPUs")
    parser.add_argument("--out", type=Path, help=f"the report; else in {REPORTS}, and without GPUs nowhere")
    parser.add_argument("--only", nargs="+", choices=LIMITS_S, metavar="PART", help=", ".join(LIMITS_S))
    parser.add_argument("--scratch", type=Path, help="where runs and logs are kept; else they are deleted")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return child(args.part, Place(args.scratch, args.quick, args.gpus))
    machine = describe()
    gpus = 0 if args.cpu else len(machine.gpus)
    with contextlib.ExitStack() as stack:
        scratch = args.scratch or stack.enter_context(tempfile.TemporaryDirectory(prefix="mssr-acceptance-"))
        place = Place(Path(scratch).absolute(), args.quick, gpus)
        place.scratch.mkdir(parents=True, exist_ok=True)
        outcomes = []
        for name in args.only or LIMITS_S:
            outcome = run_part(name, place, LIMITS_S[name])
            outcomes.append(outcome)
            print(
                f"[acceptance] {name}: {outcome.verdict} ({outcome.seconds:.0f} s): {outcome.told}",
                flush=True,
            )
            if outcome.verdict == "failed":
                log = (place.scratch / f"{name}.log").read_text(errors="replace")
                print(log[-3000:], file=sys.stderr, flush=True)
    text = report(machine, outcomes, args.quick, cpu=not gpus)
    out = args.out
    if out is None and gpus:
        kind = machine.gpus[0].name.removeprefix("NVIDIA ").replace(" ", "-")
        out = REPORTS / f"{datetime.date.today()}-{gpus}x{kind}.md"
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
        print(f"[acceptance] the report is {out}; please commit it")
    return 1 if any(o.verdict == "failed" for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
