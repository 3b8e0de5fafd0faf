#!/usr/bin/env python
"""The runs of docs/study.md: a queue of jobs, of which a process takes one after the other.

python scripts/study/run.py all                        # everything: data, runs, document
python scripts/study/run.py run --only 'grid/*/100'    # some; several processes may work at the same time

What is done is never done again, and a stop loses the run in hand only. README.md has the files.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

# One thread a process, and no spinning while others work; before anything loads OpenMP.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from mssr.errors import UserError  # noqa: E402
from mssr.models.files import replace_text  # noqa: E402
from mssr.runs.jsonl import append_record, read_records, to_lines  # noqa: E402
from scripts.study.records import RECORDS, SELECTION_SEED, own_best_lr, read_all  # noqa: E402

OWN_BEST = "best"
Train = Callable[[str, Sequence[str], Path], dict[str, Any]]
"""`scripts.study.training.train`."""


@dataclass(frozen=True, slots=True)
class Job:
    """A run. Example: ``Job("controls", "rloo", "rloo_shaping", "3e-4", 0, "habit", 60, 4, [...])``"""

    part: str
    method: str
    label: str
    """The method, or the name of a control of it."""
    lr: str
    """As in names, or "best": the method's own, once the runs that choose it are there."""
    seed: int
    base: str
    steps: int
    updates: int
    overrides: list[str]
    """Those of method and control."""

    @property
    def name(self) -> str:
        return f"{self.part}/{self.label}/{self.lr}/{self.seed}"


def lr_name(lr: float) -> str:
    """0.0003 -> "3e-4"."""
    return f"{lr:.0e}".replace("e-0", "e-")


def jobs(spec: dict[str, Any]) -> Iterator[Job]:
    """The study, so ordered that a stop at any time leaves as many seeds of everything: what chooses the
    learning rates, then in each round a seed of the grid, of the controls and of the rest;
    last what no claim rests on."""
    methods, escape, timing = spec["methods"], spec["escape"], spec["timing"]
    published = spec["published"]

    def job(part: str, method: str, lr: float | str, seed: int, **other: Any) -> Job:
        name = lr if isinstance(lr, str) else lr_name(lr)
        usual = Job(
            part, method, method, name, seed, "habit", spec["steps"], spec["updates"], methods[method]
        )
        return replace(usual, **other)

    def leave(method: str, seed: int) -> Job:
        return job("escape", method, OWN_BEST, seed, base=escape["base"])

    for turn, seed in enumerate([SELECTION_SEED, *spec["seeds"]]):
        yield from (job("grid", m, lr, seed) for lr in spec["learning_rates"] for m in methods)
        if turn == 0:
            continue
        for lr in (max(spec["learning_rates"]), OWN_BEST):
            for label, control in spec["controls"].items():
                overrides = methods[control["of"]] + control["overrides"]
                yield job("controls", control["of"], lr, seed, label=label, overrides=overrides)
        for m, updates in published["updates"].items():
            yield job("published", m, published["lr"], seed, updates=updates)
        for k in range(escape["seeds_a_round"]):
            another = (turn - 1) * escape["seeds_a_round"] + k
            yield from (leave(m, another) for m in escape["first"])
    for seed in range(timing["rounds"]):
        yield from (job("timing", m, timing["lr"], seed, steps=timing["steps"]) for m in methods)
    for seed in range(escape["seeds_a_round"] * len(spec["seeds"])):
        yield from (leave(m, seed) for m in methods if m not in escape["first"])


class Study:
    """The queue, and what is known of its jobs."""

    def __init__(self, queue: Path, records: Path, work: Path, spec: Path, only: str = "*") -> None:
        self.spec = yaml.safe_load(spec.read_text())
        self.records, self.work, self.only = records, work, only
        for directory in (queue.parent, records, work / "locks"):
            directory.mkdir(parents=True, exist_ok=True)
        if not queue.exists():
            replace_text(queue, to_lines(map(asdict, jobs(self.spec))))
        self.queue = [Job(**line) for line in read_records(queue)]

    def failed(self) -> Counter[str]:
        """How often each job has."""
        path = self.work / "failed.jsonl"
        path.touch()
        return Counter(line["job"] for line in read_records(path, skip_damaged=True))

    def state(self) -> tuple[list[Job], list[Job], list[Job]]:
        """Jobs that are done, that are left, and that wait for the choice of a learning rate."""
        records = read_all(self.records)
        named = {record["job"] for record in records}
        ended = named | self.failed().keys()
        chooses = [j for j in self.queue if (j.part, j.seed) == ("grid", SELECTION_SEED)]
        undecided = {job.method for job in chooses if job.name not in ended}
        best = {j.method: own_best_lr(records, j.method) for j in chooses if j.method not in undecided}
        known: dict[str, Job] = {}
        waiting = []
        for job in self.queue:
            if job.lr == OWN_BEST and best.get(job.method) is None:
                waiting.append(job)
                continue
            if job.lr == OWN_BEST:  # it may be that of another job: then they are one
                job = replace(job, lr=lr_name(best[job.method]))
            known[job.name] = job
        found = [job for job in known.values() if fnmatch(job.name, self.only)]
        done, left = ([job for job in found if (job.name in named) == is_done] for is_done in (True, False))
        return done, left, [job for job in waiting if fnmatch(job.name, self.only)]

    def config_of(self, job: Job) -> tuple[str, list[str]]:
        """Config file and overrides of a run."""
        fixed = {
            "model.path": self.spec["bases"][job.base],
            "actor.lr": float(job.lr),
            "actor.updates_per_step": job.updates,
            "rollout.rollouts_per_step": self.spec["rollouts"],
            "trainer.steps": job.steps,
            "seed": job.seed,
        }
        return self.spec["config"], [*(f"{key}={value}" for key, value in fixed.items()), *job.overrides]

    def run(self, train: Train, retry: bool = False, tell: Callable[[str], None] = print) -> None:
        """Do what is left, one job after the other.

        Args:
            retry: what has failed once, too.
        """
        passed: set[str] = set()  # in this call

        def left() -> Iterator[Job]:
            failed = self.failed()
            return (j for j in self.state()[1] if j.name not in passed and failed[j.name] <= retry)

        def take(job: Job) -> bool:
            """Do a job unless another process has it."""
            with held(self.work / "locks" / flat(job.name)) as mine:
                if mine:
                    passed.add(job.name)
                    # Nothing may work beside a run whose seconds count.
                    with held(self.work / "locks" / "machine", shared=job.part != "timing", wait=True):
                        self._run_one(job, train, tell)
                return mine

        # Looked at anew after each: others work, too, and a choice may have been made.
        while any(take(job) for job in left()):
            pass

    def _run_one(self, job: Job, train: Train, tell: Callable[[str], None]) -> None:
        if job.name in {record["job"] for record in read_all(self.records)}:
            return  # another process has done it meanwhile
        start, directory = time.monotonic(), self.work / flat(job.name)
        shutil.rmtree(directory, ignore_errors=True)  # of one that was killed
        try:
            result = train(*self.config_of(job), directory)
        except UserError as error:  # a method that this version does not have, or no base
            tell(f"{job.name}: skipped: {error}")
        except Exception as error:
            tell(f"{job.name}: failed: {error!r:.300}")
            failure = {"job": job.name, "error": repr(error), "traceback": traceback.format_exc()}
            append_record(self.work / "failed.jsonl", failure)
        else:
            wall_s = round(time.monotonic() - start, 1)
            if job.part != "timing":
                del result["seconds"]  # others worked beside it
            self._add(job, {"wall_s": wall_s} | result)
            tell(f"{job.name}: validation accuracy {result['final']['val']}, {wall_s} s")
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _add(self, job: Job, result: dict[str, Any]) -> None:
        """Append a record; a reader finds all of it or nothing.

        Raises:
            UserError: those that are there are of another task.
        """
        tasks = {record["task"] for record in read_all(self.records) if record["base"] == job.base}
        if tasks - {result["task"]}:
            raise UserError(
                f"{job.name} is of the task {result['task']} and {self.records} has runs of {tasks}, "
                "which cannot be compared; move them away, or prepare their task again"
            )
        record = {"job": job.name, "setting": Path(self.spec["config"]).stem, "lr": float(job.lr)}
        record |= {key: getattr(job, key) for key in ("part", "base", "method", "label", "seed")}
        record["overrides"] = dict(one.split("=", 1) for one in job.overrides)
        path = self.records / f"{job.part}.jsonl"
        with held(self.work / "locks" / path.name, wait=True):
            before = path.read_text() if path.exists() else ""
            replace_text(path, before + to_lines([record | provenance() | result]))


def flat(name: str) -> str:
    """A job's name as that of a file."""
    return name.replace("/", "+")


@contextmanager
def held(path: Path, shared: bool = False, wait: bool = False) -> Iterator[bool]:
    """Whether the lock could be had; it ends with the process, however that ends."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@cache
def provenance() -> dict[str, Any]:
    """What the runs of this process are made with; to be asked first when that is loaded."""

    def git(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)

    changed = git("diff", "--quiet", "HEAD", "--", "mssr", "configs").returncode
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(": ")[2] for line in lines if "model name" in line), platform.machine())
    return {
        "commit": git("rev-parse", "--short=12", "HEAD").stdout.strip() + ("-dirty" if changed else ""),
        "machine": f"{cpu}, {os.cpu_count()} cores, one thread a run",
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def show(study: Study) -> None:
    """What is done and left, by part, and how long that takes."""
    state, failed, hours = study.state(), study.failed(), 0.0
    seconds: dict[str, list[float]] = {}
    for record in read_all(study.records):
        for part in (record["part"], "any"):
            seconds.setdefault(part, []).append(record["wall_s"])
    for part in dict.fromkeys(job.part for job in study.queue):
        done, left, waiting = (sum(job.part == part for job in found) for found in state)
        bad = sum(job.part == part and failed[job.name] > 0 for job in state[1])
        known = seconds.get(part) or seconds.get("any") or [0.0]
        hours += (left + waiting) * sum(known) / len(known) / 3600
        print(f"{part:10}{done:4} done{left:4} left ({bad} failed){waiting:4} wait for a learning rate")
    print(f"about {hours:.1f} hours left for one process")
    if {job.name for job in study.queue} != {job.name for job in jobs(study.spec)}:
        print("the queue is not that of study.yaml; `run.py queue` makes it anew")


def main() -> int:
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("command", choices=("queue", "list", "run", "all"))
    parser.add_argument("--only", default="*", help="jobs whose name matches: 'grid/*/3e-4/*'")
    parser.add_argument("--queue", type=Path, default=ROOT / "runs/study/queue.jsonl")
    parser.add_argument("--records", type=Path, default=RECORDS, help="directory")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("--retry", action="store_true", help="what failed once, too")
    asked = parser.parse_args()
    if asked.command == "queue":
        asked.queue.unlink(missing_ok=True)
    queue, records = asked.queue.absolute(), asked.records.absolute()
    os.chdir(ROOT)
    study = Study(queue, records, queue.parent, HERE / "study.yaml", asked.only)
    if asked.dry_run:
        for job in study.state()[1]:
            print(job.name, *study.config_of(job)[1])
        return 0
    show(study)
    if asked.command in ("queue", "list"):
        return 0
    if asked.command == "all":
        prepare = [sys.executable, "-m", "mssr.tools.cli", "prepare", "chains", "--out", "data/chains"]
        subprocess.run(prepare, check=True)
    from scripts.study.training import train

    provenance()
    try:
        study.run(train, asked.retry, lambda line: print(time.strftime("%H:%M:%S"), line, flush=True))
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        sys.exit(f"run.py: {error}")
    if asked.command == "all":
        subprocess.run([sys.executable, str(HERE / "report.py")], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
