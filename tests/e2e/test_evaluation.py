"""`mssr eval` as a user runs it, on a random tiny model: real engines, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from mssr.errors import EXIT_SIGINT
from tests.chaos.run import PATIENCE_S
from tests.conftest import Workspace
from tests.unit.benchmark_data import write_parquet

pytestmark = pytest.mark.e2e
RunMssr = Callable[..., subprocess.CompletedProcess[str]]

COMPARED = ("items.jsonl", "results.json", "table.md", "items.html", "responses.jsonl")


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


PAUSING = """
import sys, time
from pathlib import Path
from mssr.tools.cli import main
from mssr.evaluation.responses import ResponseFile

go_on, most, append = Path(sys.argv[1]), int(sys.argv[2]), ResponseFile.append

def pausing(self, responses):
    append(self, responses)
    while len(self.found) >= most and not go_on.exists():
        time.sleep(0.01)

ResponseFile.append = pausing
sys.exit(main(sys.argv[3:]))
"""
"""The command, which does not get far beyond so many responses before it may go on: however late the tests
get to see its responses and to interrupt it, it has not ended."""


def started(arguments: list[Any], go_on: Path, most: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PAUSING, str(go_on), str(most), *map(str, arguments)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


def wait_for_responses(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    file = out / "responses.jsonl"
    while not file.is_file() or file.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, "the evaluation ended before it could be interrupted"
        time.sleep(0.01)


def test_two_engines_interrupted_and_killed_give_what_one_engine_gives(
    workspace: Workspace, run_mssr: RunMssr, tmp_path: Path
) -> None:
    """A benchmark in its public columns, several samples of every item; two engines on Ray, and the one in
    the command's own process. The engine is that of transformers, which starts in half of vLLM's time; vLLM
    evaluates in `test_mssr_learns_digits`."""
    write_parquet("mathvista", tmp_path / "data" / "mathvista.parquet")
    arguments = ["eval", "--model", workspace.path / "model", "--config", workspace.config]
    arguments += ["--benchmarks", "mathvista", "--data-dir", tmp_path / "data", "--n", 4]
    arguments += ["--temperature", 1, "--part-size", 2, "data.max_prompt_length=512"]
    # The last bits of a matrix product on several threads may depend on which of them came first.
    arguments += ["rollout.engine=hf", "cluster.threads_per_rollout=1", "cluster.threads_per_actor=1"]
    one, two = tmp_path / "one", tmp_path / "two"
    done = run_mssr(*arguments, "--out", one, "cluster.launcher=local")
    assert (done.returncode, done.stderr) == (0, "")
    kept = b""
    for number in (signal.SIGINT, signal.SIGKILL):
        before = max(kept.count(b"\n") - 1, 0)
        go_on = tmp_path / f"go-on-{number}"
        process = started([*arguments, "--out", two, "rollout.workers=2"], go_on, before + 12)
        try:
            wait_for_responses(two, before + 4, process)
            children = psutil.Process(process.pid).children(recursive=True)
            if number == signal.SIGKILL:  # Ray's own agents take a minute to see that their driver is gone
                children = [child for child in children if "Agent" not in child.name()]
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as Ctrl-C does
                go_on.touch()
            else:
                process.kill()
            assert process.wait() == (EXIT_SIGINT if number == signal.SIGINT else -number)
        finally:
            process.kill()
        assert len(children) > 2 and not psutil.wait_procs(children, timeout=PATIENCE_S)[1]
        now = (two / "responses.jsonl").read_bytes()
        assert now.startswith(kept) and 1 + before + 4 <= now.count(b"\n") < 1 + 52
        assert not (two / "results.json").exists()
        kept = now[: now.rindex(b"\n") + 1]
    done = run_mssr(*arguments, "--out", two, "cluster.launcher=local")  # the number of engines is no matter
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMPARED:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert not (two / "scratch").exists()
    results = json.loads((one / "results.json").read_text())["benchmarks"]["mathvista"]
    assert (results["items"], results["total"]) == (13, 52)
    assert set(results["breakdowns"]) == {"task", "question_type", "answer_type"}
    assert len({row["response"] for row in lines_of(one / "items.jsonl")}) > 26
