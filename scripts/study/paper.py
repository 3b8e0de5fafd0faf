"""The paper's main table and ablation (arXiv 2512.18215) from configs/paper; started by paper.sh.

For each row: training, export, the five benchmarks. Under ``<out>/<size>``:

- ``<row>/run``: the run directory
- ``<row>/step-000120/model``: the policy after the last step, and beside it the manifest of its checkpoint,
  which stands for a whole export
- ``<row>/step-000120/<benchmark>``: an evaluation of it; ``base/<benchmark>`` of the base model
- ``table.md``, ``table.json``: all rows beside the published numbers; ``compare``: curves of the runs
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mssr.config import Config, to_dict  # noqa: E402
from mssr.config.options import READ, describe, nearest  # noqa: E402
from mssr.errors import EXIT_FAILURE, EXIT_OK, EXIT_USER_ERROR, UserError  # noqa: E402
from mssr.evaluation.results import RESULTS  # noqa: E402
from mssr.models.files import replace_text  # noqa: E402
from mssr.runs import manifest as manifests  # noqa: E402
from mssr.runs.checkpoint import resolve  # noqa: E402
from mssr.runs.config import load_config  # noqa: E402
from mssr.runs.run_directory import compare_configs  # noqa: E402
from scripts.study.paper_rows import ROWS, Row, chosen  # noqa: E402
from scripts.study.paper_table import BENCHMARKS, write_table  # noqa: E402

PROMPT_LENGTH = "data.max_prompt_length"
MAX_PROMPT_LENGTH = 8192
"""Of evaluations: an image of data.max_pixels has 5350 tokens, and a longer prompt would count as wrong."""
COMMAND = "paper_command.json"
"""In an evaluation's directory: by which command it was finished."""


@dataclass(frozen=True, slots=True)
class Step:
    """A command, unless what it makes is there."""

    command: list[str]
    done: bool
    then: Callable[[], object] = lambda: None
    """Called when the command has ended well."""
    needed: bool = True
    """Whether the row ends where it fails."""


class Paper:
    """What a call is about: sizes, places and settings of all rows."""

    def __init__(self, args: argparse.Namespace, overrides: Sequence[str]) -> None:
        for override in overrides:
            if override.partition("=")[0] == "trainer.run_dir":
                raise UserError("trainer.run_dir: each row has its own; use --out")
        self.args, self.overrides = args, list(overrides)
        self.out = Path(args.out) / args.size

    def recipe(self, row: Row) -> str:
        return f"paper/qwen2_5_vl_{self.args.size}/{row.recipe or row.name}"

    def _training(self, row: Row) -> list[str]:
        return [f"trainer.run_dir={self.run(row)}", *row.overrides, *self.overrides]

    @cache  # noqa: B019  one object a process
    def config(self, row: Row) -> Config:
        """Of the row's training, checked."""
        config = load_config(self.recipe(row), self._training(row))
        if not config.trainer.steps:
            raise UserError("trainer.steps: a row is evaluated after so many steps; give a number")
        if not config.trainer.save_every:
            raise UserError("trainer.save_every=0: without a checkpoint there is nothing to evaluate")
        return config

    def run(self, row: Row) -> Path:
        return self.out / row.name / "run"

    def evaluated(self, row: Row) -> Path:
        """Directory of what is evaluated, and of its evaluations."""
        steps = self.config(row).trainer.steps
        return self.out / row.name / (f"step-{steps:06d}" if row.trained else "")

    def manifest(self, row: Row) -> manifests.Manifest | None:
        """Of the checkpoint after the row's last step; None where it is not trained so far.

        Raises:
            UserError: the row was trained anew after its export.
        """
        steps = self.config(row).trainer.steps
        exported, run, latest = self.evaluated(row), self.run(row), None
        if (run / "checkpoints/latest").is_file():
            latest = manifests.read_manifest(resolve(run))
        if not (exported / manifests.FILE).is_file():
            return latest if latest and latest.step == steps else None
        kept = manifests.read_manifest(exported)
        if latest and latest.step == steps and latest != kept:
            raise UserError(f"{run} was trained anew after its export; remove {exported}")
        return kept

    def drift(self, row: Row) -> list[str]:
        """By what the training that is there differs from the one that this call means."""
        manifest = self.manifest(row) if row.trained else None
        if manifest is None:
            return []
        drift = compare_configs(manifest.config, to_dict(self.config(row)))
        return [*drift.refused, *drift.listed]

    def steps(self, row: Row) -> Iterator[Step]:
        """The row's steps in order; each is to be carried out before the next is asked for.

        Raises:
            UserError: the row was trained with other settings.
        """
        target, model = self.evaluated(row), self.config(row).model.path
        if row.trained:
            if drift := self.drift(row):
                raise UserError(
                    f"{self.out / row.name} is trained with other settings ({'; '.join(drift)}); give those, "
                    "another --out, or remove it"
                )
            run = self.run(row)
            train = ["mssr", "train", self.recipe(row), *self._training(row)]
            yield Step(train, self.manifest(row) is not None, lambda: self._check_trained(row))
            model, exported = str(target / "model"), (target / manifests.FILE).is_file()
            yield Step(["rm", "-rf", model], exported)  # half an export
            keep = ["cp", str(self._last(row) / manifests.FILE), f"{target}/"]
            yield Step(["mssr", "export", str(run), "--out", model], exported)
            yield Step(keep, exported)
            if self.args.prune:
                checkpoints, newest = run / "checkpoints", run / "checkpoints/latest"
                # A training that has gone on is still under way.
                ours = newest.is_file() and newest.read_text().strip() == self._last(row).name
                yield Step(["rm", "-rf", str(checkpoints)], exported and not ours)
        for benchmark in self.args.benchmarks:
            yield self._evaluation(row, benchmark, model, target / benchmark)

    def _last(self, row: Row) -> Path:
        return self.run(row) / "checkpoints" / f"step-{self.config(row).trainer.steps:06d}"

    def _check_trained(self, row: Row) -> None:
        if self.manifest(row) is None:
            steps = self.config(row).trainer.steps
            raise UserError(f"{self.run(row)}: the latest checkpoint is not of step {steps}")

    def _evaluation(self, row: Row, benchmark: str, model: str, directory: Path) -> Step:
        args = self.args
        command = ["mssr", "eval", "--model", model, "--config", self.recipe(row)]
        command += ["--benchmarks", benchmark, "--out", str(directory)]
        for name in ("data_dir", "limit", "judge"):
            if (value := getattr(args, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        known = describe(Config)
        for override in self.overrides:
            key = override.partition("=")[0]
            option = nearest(known, key)
            read = option and option.evaluation == READ and not key.startswith("reward.")
            if read and key != PROMPT_LENGTH:
                command.append(override)
        command += [f"{PROMPT_LENGTH}={MAX_PROMPT_LENGTH}", *args.eval]
        file = directory / COMMAND
        done = (directory / RESULTS).is_file() and file.is_file() and json.loads(file.read_text()) == command
        return Step(command, done, lambda: replace_text(file, json.dumps(command)), needed=False)

    def comparison(self, rows: Sequence[Row]) -> list[str] | None:
        """The command that draws validation accuracy over steps; None for fewer than two runs. GRPO's best
        accuracy is what the others are to reach."""
        runs = [row for row in rows if row.trained and self.config(row).trainer.val_every]
        runs = [row for row in runs if self.config(row).data.val]
        if len(runs) < 2:
            return None
        runs.sort(key=lambda row: row.name != "grpo")
        return ["mssr", "compare", *(str(self.run(row)) for row in runs), "--out", str(self.out / "compare")]


class Runner:
    """Carries commands out, one at a time; Ctrl-C and SIGTERM are handed on to the one under way, once."""

    def __init__(self) -> None:
        self.stopped = 0
        """The signal, if there was one."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stopped = number

    def __call__(self, command: Sequence[str]) -> int:
        # A session of its own: the terminal would send Ctrl-C a second time.
        process = subprocess.Popen(command, start_new_session=True)
        handed_on = False
        while True:
            try:
                return process.wait(0.2)
            except subprocess.TimeoutExpired:
                if self.stopped and not handed_on:
                    process.send_signal(self.stopped)
                    handed_on = True


def carry_out(paper: Paper, rows: Sequence[Row]) -> int:
    """Do what is not done; returns the exit code. A row that fails does not keep the next from being done."""
    run, failures = Runner(), []
    for row in rows:
        try:
            for step in paper.steps(row):
                shown = shlex.join(step.command)
                if step.done:
                    continue
                print(f"paper: {shown}", flush=True)
                code = run(step.command)
                if run.stopped:
                    return 128 + run.stopped
                if code == EXIT_OK:
                    step.then()
                    continue
                failures.append(f"{row.name}: exit code {code} of {shown}")
                if step.needed:
                    break
        except UserError as error:
            failures.append(f"{row.name}: {error}")
        tabulate(paper)
    there = [row for row in rows if row.trained and (paper.run(row) / "metrics.jsonl").is_file()]
    if command := paper.comparison(there):
        print(f"paper: {shlex.join(command)}", flush=True)
        if code := run(command):
            failures.append(f"exit code {code} of {shlex.join(command)}")
    print((paper.out / "table.md").read_text())
    for failure in failures:
        print(f"paper: error: {failure}", file=sys.stderr)
    return EXIT_FAILURE if failures else EXIT_OK


def tabulate(paper: Paper) -> dict[str, Any]:
    """Write the table of all rows, also those of other calls; without optional ones that are not begun."""
    notes, places = [], {}
    for row in ROWS.values():
        if not (paper.out / row.name).exists():
            if row.default:
                places[row.name] = row.published, paper.out / row.name
            continue
        places[row.name] = row.published, paper.evaluated(row)
        try:
            if drift := paper.drift(row):
                notes.append(f"{row.name} is trained with other settings than this call: {'; '.join(drift)}.")
        except UserError as error:
            notes.append(f"{row.name}: {error}.")
    return write_table(paper.out, paper.args.size, places, notes)


def listing(paper: Paper, rows: Sequence[Row]) -> Iterator[str]:
    """Every command in order, those that are done behind a #."""
    for row in rows:
        yield f"# {row.name}"
        for step in paper.steps(row):
            yield f"{'# done: ' if step.done else ''}{shlex.join(step.command)}"
    if command := paper.comparison(rows):
        yield "# curves of the runs"
        yield shlex.join(command)


def costs(paper: Paper, rows: Sequence[Row]) -> Iterator[str]:
    """GPU hours and disk by plan, of the whole of each row."""
    from mssr.evaluation.tables import PAPER_BENCHMARKS, WHOLE, paper_name
    from mssr.models.host_memory import disk_bytes
    from mssr.models.rank_memory import GIB
    from mssr.tools.plan import make_plan

    asked = paper.args
    names = [paper_name(benchmark) for benchmark in asked.benchmarks]
    items = sum(min(WHOLE[n], asked.limit or WHOLE[n]) for n in PAPER_BENCHMARKS if n in names)
    plans = [make_plan(paper.config(row), asked.gpus, 1, response=asked.response_tokens) for row in rows]
    total = [0.0, 0.0, 0.0]
    yield f"# {'':26}{'hours':>8}{'GPU hours':>11}{'disk, GiB':>11}"
    for row, plan in zip(rows, plans, strict=True):
        config, time = plan.config, plan.time()
        # The items are generated as the rollouts of a step are.
        seconds, disk = items / config.rollout.rollouts_per_step * time.generate, 0.0
        if row.trained:
            seconds += (config.trainer.steps or 0) * time.seconds
            kept = 0.0 if asked.prune else disk_bytes(config, plan.shape)
            disk = (kept + 2 * plan.shape.parameters) / GIB  # bfloat16
        numbers = seconds / 3600, plan.needed * seconds / 3600, disk
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        yield f"# {row.name:26}{numbers[0]:8.1f}{numbers[1]:11.0f}{disk:11.0f}"
        yield from (f"#   does not fit: {problem}" for problem in plan.problems)
    yield f"# {'in all':26}{total[0]:8.1f}{total[1]:11.0f}{total[2]:11.0f}"
    yield f"# on {asked.gpus}, by mssr plan, for responses of {plans[0].work.response_tokens} tokens"
    if asked.prune:
        most = max(disk_bytes(plan.config, plan.shape) for plan in plans)
        yield f"# and {most / GIB:.0f} GiB for the checkpoints of the row that is trained"
    yield (
        "# not counted: validation, checkpoints, starts, the anchor's pass, published_code's first rollouts; "
        "disk of the base model and of the benchmarks"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paper.sh", description=__doc__.splitlines()[0], usage="%(prog)s [options] [-- key=value ...]"
    )
    option = parser.add_argument
    option("--size", choices=["3b", "7b"], default="3b", help="of Qwen2.5-VL (3b)")
    optional = ", ".join(row.name for row in ROWS.values() if not row.default)
    option("--rows", nargs="+", metavar="ROW", help=f"all of the paper's tables by default; also {optional}")
    option("--dry-run", action="store_true", help="list every command, GPU hours and disk, and do nothing")
    option("--out", default="runs/paper", metavar="DIR", help="for runs, evaluations, table (runs/paper)")
    option("--data-dir", type=Path, metavar="DIR", help="local copies of the benchmarks; else the hub")
    option("--benchmarks", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME")
    option("--limit", type=int, metavar="N", help="the first so many items of each benchmark")
    option("--judge", help="as of mssr eval")
    option("--eval", nargs="+", default=[], metavar="key=value", help="overrides of evaluations alone")
    option("--prune", action="store_true", help="remove a row's checkpoints once its policy is exported")
    option("--gpus", metavar="8xH100-80GB", default="8xH100-80GB", help="to plan for")
    option("--response-tokens", type=int, metavar="N", help="of a response on average, to plan for")
    return parser


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: that of mssr, 1 where a row failed."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args = _parser().parse_args(argv[:cut])
    try:
        paper, rows = Paper(args, argv[cut + 1 :]), chosen(args.rows)
        for row in rows:
            paper.config(row)
        if not args.dry_run:
            return carry_out(paper, rows)
        try:
            print("\n".join(costs(paper, rows)))
        except UserError as error:
            print(f"# no plan: {error}")
        print("\n".join(listing(paper, rows)))
        return EXIT_OK
    except UserError as error:
        print(f"paper: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
