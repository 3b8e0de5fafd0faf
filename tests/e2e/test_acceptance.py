"""scripts/acceptance on the CPU, where what only a GPU runs is replaced by what stands in for it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from scripts.acceptance.__main__ import PARTS, run_apart
from scripts.acceptance.parts import NotPossible, Place, layout

pytestmark = pytest.mark.e2e
REPO = Path(__file__).parents[2]


def test_all_parts_pass_and_are_in_the_report(tmp_path: Path) -> None:
    out = tmp_path / "reports" / "report.md"
    # The environment that runs this was set up, so the script's set-up has nothing to do.
    command = ["bash", "scripts/gpu_acceptance.sh", "--quick", "--cpu", "--out", str(out)]
    ran = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    text = out.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    verdicts = {name: (verdict, told) for name, verdict, _, told in rows[2:]}
    assert list(verdicts) == list(PARTS)
    for name, (_, reason) in PARTS.items():
        assert verdicts[name] == ("not possible here", reason) if reason else verdicts[name][0] == "passed"
    assert "the CPU stood in" in text
    assert "in 3 steps" in verdicts["digits apart"][1] and "KL at most" in verdicts["kill"][1]


def test_a_part_that_fails_or_dies_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`sitecustomize` of the other process makes one part raise, and one end the process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys, types\n"
        "runs = types.ModuleType('scripts.acceptance.runs')\n"
        "def doctor(place): raise AssertionError('too small | a disk')\n"
        "def memory(place): return {'flat': 'yes'}\n"
        "def kill(place): os._exit(9)\n"
        "vars(runs).update(doctor=doctor, memory=memory, kill=kill)\n"
        "sys.modules['scripts.acceptance.runs'] = runs\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPO)]))
    monkeypatch.chdir(REPO)
    found = run_apart(["doctor", "memory", "kill"], Place(tmp_path, quick=True, gpus=0))
    assert [verdict for verdict, _, _ in found] == ["failed", "passed", "failed"]
    assert [told for *_, told in found] == [
        "AssertionError: too small | a disk",
        "flat: yes",
        "the process ended with 9",
    ]


def test_all_gpus_have_work() -> None:
    def at(gpus: int, placement: str) -> list[int]:
        options = dict(o.split("=") for o in layout(Place(Path(), quick=True, gpus=gpus), placement))
        assert options["cluster.placement"] == placement
        return [int(options[key]) for key in ("actor.num_ranks", "rollout.workers")]

    assert [at(gpus, "colocated") for gpus in (0, 1, 4, 16)] == [[1, 1], [1, 1], [4, 4], [8, 8]]
    assert [at(gpus, "apart") for gpus in (0, 2, 4, 8)] == [[1, 1], [1, 1], [3, 1], [6, 2]]
    with pytest.raises(NotPossible, match="one GPU"):
        at(1, "apart")
