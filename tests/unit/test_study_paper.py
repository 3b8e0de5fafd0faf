"""The paper's tables: what is run in which order, what is not run again, and the numbers side by side."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mssr.config import Config, to_dict
from mssr.evaluation import results
from mssr.evaluation.tables import PAPER_BENCHMARKS, WHOLE
from mssr.runs import manifest as manifests
from mssr.runs.config import load_config
from mssr.tools.cli import main
from scripts.study import paper
from scripts.study.paper_table import BENCHMARKS, write_table
from tests.unit.evaluation_records import a_record

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]

FAKE = """#!/bin/bash
echo "$@" >> log
if [[ -e stops ]]; then
    trap 'echo stopped >> log; exit 143' TERM
    kill -TERM $PPID
    while kill -0 $PPID; do sleep 0.01; done
fi
[[ "$@" == *"$(cat fails 2>/dev/null || echo nothing)"* ]] && exit 3
run=$(grep -o 'trainer.run_dir=[^ ]*' <<< "$@" | cut -d= -f2)
out=$(grep -o -- '--out [^ ]*' <<< "$@" | cut -d' ' -f2)
case $1 in
    train) mkdir -p "$(dirname $run)"; cp -r "made/$(basename "$(dirname $run)")" $run ;;
    export) mkdir -p $out; touch $out/config.json ;;
    eval) mkdir -p $out; cp made/evaluation/* $out ;;
esac
"""
"""A mssr that says what it is asked, and copies what the tests have made."""


@cache
def read_once(path: str, overrides: tuple[str, ...]) -> Config:
    return load_config(path, overrides)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the fake command, finished runs and an evaluation for it to copy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "load_config", lambda path, overrides: read_once(path, tuple(overrides)))
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/mssr"
    command.write_text(FAKE)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("grpo", "mssr"):
        checkpoint = Path("made", name, "checkpoints/step-000120")
        checkpoint.mkdir(parents=True)
        config = to_dict(read_once(f"paper/qwen2_5_vl_3b/{name}", (f"trainer.run_dir=out/3b/{name}/run",)))
        manifests.write_manifest(checkpoint, manifests.Manifest(120, config, 0.5), {})
        (checkpoint.parent / "latest").write_text("step-000120\n")
        (checkpoint.parents[1] / "metrics.jsonl").touch()
    an_evaluation(Path("made/evaluation"), "mmk12", 2, 4)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def an_evaluation(directory: Path, benchmark: str, right: int, items: int, **config: Any) -> None:
    rows = [
        a_record(str(i), "right" if i < right else "wrong", benchmark=benchmark, response="**a** **b**")
        for i in range(items)
    ]
    results.write(directory, rows, {"model": "m", "config": {"seed": 0} | config})


def called(*options: str) -> tuple[int, list[str]]:
    """Exit code, and the commands that were given."""
    Path("log").unlink(missing_ok=True)
    code = paper.main(["--out", "out", "--benchmarks", "mmk12", *options])
    return code, Path("log").read_text().splitlines() if Path("log").exists() else []


def evaluation(name: str, model: str, directory: str, *overrides: str) -> str:
    words = ["eval", "--model", model, "--config", f"paper/qwen2_5_vl_3b/{name}", "--benchmarks", "mmk12"]
    return " ".join([*words, "--out", f"{directory}/mmk12", *overrides, "data.max_prompt_length=8192"])


def of_row(name: str, run_dir: str) -> list[str]:
    """What is called for a trained row."""
    step = f"out/3b/{name}/step-000120"
    return [
        f"train paper/qwen2_5_vl_3b/{name} trainer.run_dir={run_dir}",
        f"export {run_dir} --out {step}/model",
        evaluation(name, f"{step}/model", step),
    ]


MSSR, GRPO = of_row("mssr", "out/3b/mssr/run"), of_row("grpo", "out/3b/grpo/run")
COMPARE = "compare out/3b/grpo/run out/3b/mssr/run --out out/3b/compare"


def test_a_dry_run_lists_every_command_in_order_and_does_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--", "seed=3", "actor.lr=1e-6", "data.max_prompt_length=4096"]
    assert called("--dry-run", "--rows", "mssr,grpo_as_published", "base", "--prune", *settings) == (0, [])
    lines = capsys.readouterr().out.splitlines()
    assert not Path("out").exists()

    def trained(name: str, recipe: str, *own: str) -> list[str]:
        run, step = f"out/3b/{name}/run", f"out/3b/{name}/step-000120"
        given = " ".join([f"trainer.run_dir={run}", *own, *settings[1:]])
        return [
            f"# {name}",
            f"mssr train paper/qwen2_5_vl_3b/{recipe} {given}",
            f"rm -rf {step}/model",
            f"mssr export {run} --out {step}/model",
            f"cp {run}/checkpoints/step-000120/manifest.json {step}/",
            f"rm -rf {run}/checkpoints",
            f"mssr {evaluation(recipe, f'{step}/model', step, 'seed=3')}",
        ]

    base = f"mssr {evaluation('mssr', 'Qwen/Qwen2.5-VL-3B-Instruct', 'out/3b/base', 'seed=3')}"
    as_published = ("actor.updates_per_step=2", "actor.max_grad_norm=1.0")
    assert lines[lines.index("# base") :] == [
        "# base",
        base,
        *trained("mssr", "mssr"),
        *trained("grpo_as_published", "grpo", *as_published),
        "# curves of the runs",
        "mssr compare out/3b/mssr/run out/3b/grpo_as_published/run --out out/3b/compare",
    ]
    costs = {line.split()[1]: line.split()[2:] for line in lines[1:4]}
    assert main(["plan", "paper/qwen2_5_vl_3b/mssr", *settings[1:], "--gpus", "8xH100-80GB"]) == 0
    [(hours, gpu_hours)] = re.findall("120 steps: (.*) h, (.*) GPU hours", capsys.readouterr().out)
    assert costs["mssr"] == [hours, gpu_hours, "7"]  # 3.75e9 parameters of two bytes, exported
    assert costs["base"] == ["0.0", "0", "0"]
    assert "# and 210 GiB for the checkpoints of the row that is trained" in lines


def test_what_is_finished_is_not_done_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["--rows", "grpo", "mssr"]
    (here / "fails").write_text("train paper/qwen2_5_vl_3b/grpo")
    assert called(*rows) == (1, [GRPO[0], *MSSR])
    assert "grpo: exit code 3 of mssr train" in capsys.readouterr().err
    (here / "fails").write_text(GRPO[1])
    assert called(*rows) == (1, [*GRPO[:2], COMPARE])
    (here / "fails").write_text(GRPO[2])
    assert called(*rows) == (1, [*GRPO[1:], COMPARE])
    (here / "fails").unlink()
    assert called(*rows) == (0, [GRPO[2], COMPARE])
    assert called(*rows) == (0, [COMPARE])
    newest = Path("out/3b/mssr/run/checkpoints/latest")
    further = newest.with_name("step-000130")
    shutil.copytree(newest.with_name("step-000120"), further)
    newest.write_text("step-000130")
    assert called(*rows, "--prune") == (0, [COMPARE])
    assert further.exists()  # somebody trains on
    newest.write_text("step-000120")
    # Without its checkpoints a row is as finished as before.
    assert called(*rows, "--prune") == (0, [COMPARE])
    assert not Path("out/3b/mssr/run/checkpoints").exists()
    assert called(*rows) == (0, [COMPARE])
    assert called(*rows, "--dry-run") == (0, [])
    assert capsys.readouterr().out.count("# done: mssr eval") == 2
    # What does not change the result may be given anew; an evaluation decides itself what it makes of it.
    assert called(*rows, "--", "actor.micro_batch_tokens=8192") == (0, [COMPARE])
    assert called(*rows, "--eval", "rollout.workers=1")[1] == [
        f"{GRPO[2]} rollout.workers=1",
        f"{MSSR[2]} rollout.workers=1",
        COMPARE,
    ]


def test_half_an_export_is_thrown_away(here: Path) -> None:
    half = Path("out/3b/mssr/step-000120/model/half")
    half.parent.mkdir(parents=True)
    half.touch()
    assert called("--rows", "mssr") == (0, MSSR)
    assert not half.exists()


def test_results_of_other_settings_are_neither_kept_nor_shown_as_these(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("--rows", "mssr")[0] == 0
    assert called("--rows", "mssr", "--", "actor.lr=2e-6") == (1, [])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "mssr: out/3b/mssr is trained with other settings (actor.lr: 1e-06 -> 2e-06)" in error
    assert "mssr is trained with other settings than this call" in Path("out/3b/table.md").read_text()
    checkpoint = Path("out/3b/mssr/run/checkpoints/step-000120")
    manifests.write_manifest(checkpoint, manifests.Manifest(120, {"seed": 8}, 0.5), {})
    assert called("--rows", "mssr") == (1, [])
    assert "was trained anew after its export; remove out/3b/mssr/step-000120" in capsys.readouterr().err


def test_a_training_that_did_not_reach_its_last_step_is_not_evaluated(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("--rows", "mssr", "--", "trainer.steps=130")[1] == [f"{MSSR[0]} trainer.steps=130"]
    assert "the latest checkpoint is not of step 130" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rows", "base", "grop"], "--rows: grop is no row, did you mean 'grpo'?; rows: base, grpo, rloo"),
        (["--", "trainer.run_dir=x"], "trainer.run_dir: each row has its own; use --out"),
        (["--", "trainer.epochs=2"], "trainer.steps: a row is evaluated"),
        (["--", "trainer.save_every=0"], "trainer.save_every=0: without a checkpoint"),
    ],
)
def test_wrong_input_is_one_line(
    options: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*options) == (2, [])
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_stop_is_handed_on_once_and_ends_all(here: Path) -> None:
    """By the shell script, whose process is the one that is told."""
    (here / "stops").touch()
    environment = Path("bin/python")
    environment.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    environment.chmod(0o755)
    options = ["--out", "out", "--rows", "base", "mssr", "--benchmarks", "mmk12"]
    command = [ROOT / "scripts/study/paper.sh", *options]
    ended = subprocess.run(command, env=os.environ | {"MSSR_VENV": str(here)}, capture_output=True)
    assert ended.returncode == 143
    base = evaluation("mssr", "Qwen/Qwen2.5-VL-3B-Instruct", "out/3b/base")
    assert Path("log").read_text().splitlines() == [base, "stopped"]


def test_the_table_by_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of five items right in all benchmarks of MSSR, published 39.6, 63, 49.2, 29 and 66.6 (mean 49.48);
    GRPO has one benchmark, of which a part was evaluated, and with another seed."""
    for key in PAPER_BENCHMARKS:
        monkeypatch.setitem(WHOLE, key, 5)
    for benchmark in BENCHMARKS:
        an_evaluation(tmp_path / "mssr" / benchmark, benchmark, 4, 5)
        an_evaluation(tmp_path / "rloo" / benchmark, benchmark, 1, 4 if benchmark == "mmk12" else 5)
    an_evaluation(tmp_path / "grpo/mmk12", "mmk12", 3, 4, seed=7)
    published = {"mssr": "MSSR", "grpo": "GRPO", "mvsr": None}
    places = {name: (method, tmp_path / name) for name, method in published.items()}
    table = write_table(tmp_path, "3b", places, ["A note."])
    assert table == json.loads((tmp_path / "table.json").read_text())
    mssr, grpo, mvsr = table["rows"].values()
    assert mssr["difference"] == {
        "mathverse": 40.4,
        "mathvista": 17.0,
        "mmk12": 30.8,
        "r1_onevision": 51.0,
        "hallusionbench": 13.4,
        "average": 30.52,
    }
    assert mssr["published"]["average"] == 49.48 and mssr["average"]["accuracy"] == 80.0
    assert grpo["measured"]["mmk12"]["accuracy"] == 75.0
    assert (grpo["difference"], grpo["average"]) == ({}, None)
    assert mvsr == {"measured": {}, "average": None, "published": None, "difference": None}
    low, high = mssr["average"]["interval"]
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == (
        "| accuracy, % | MathVerse | MathVista | MMK12 | R1-OneVision | HallusionBench | average | "
        "bold steps, MMK12 |"
    )
    cells = lines[4].split(" | ")
    assert cells[0] == "| mssr" and cells[1].startswith("80.0 (40.0 to 100.0)")
    assert cells[6:] == [f"80.0 ({low:.1f} to {high:.1f})", "2.00 |"]
    assert lines[5:7] == [
        "| *published* | 39.6 | 63.0 | 49.2 | 29.0 | 66.6 | 49.5 | |",
        "| difference | +40.4 | +17.0 | +30.8 | +51.0 | +13.4 | +30.5 | |",
    ]
    nothing = "not run | not run"
    low, high = results.read(tmp_path / "grpo/mmk12").summary["benchmarks"]["mmk12"]["interval"]
    cell = f"75.0 ({100 * low:.1f} to {100 * high:.1f}) †"
    assert lines[7] == f"| grpo | {nothing} | {cell} | {nothing} | not run | 2.00 |"
    assert lines[8] == "| *published* | 36.8 | 61.7 | 46.1 | 30.2 | 62.3 | 47.4 | |"
    assert lines[9] == f"| mvsr | {nothing} | {nothing} | {nothing} | not run |"
    notes = [line for line in lines if line.startswith("**")]
    assert notes == [
        "**† MMK12: 4 items, the whole benchmark has 5; not comparable with the published number.**",
        "**A note.**",
        "**grpo/mmk12 was evaluated with other settings than mssr/mathverse: seed 0 -> 7.**",
    ]
    part = write_table(tmp_path, "7b", {"rloo": ("RLOO", tmp_path / "rloo")})["rows"]["rloo"]
    assert part["average"]["accuracy"] == 21.0
    assert part["difference"] == {
        "mathverse": -27.8,
        "mathvista": -49.2,
        "r1_onevision": -18.5,
        "hallusionbench": -48.5,
    }
    assert (tmp_path / "table.md").read_text().splitlines()[4].count(" †") == 2


def test_the_rows_are_the_recipes() -> None:
    recipes = {file.stem for file in (ROOT / "configs/paper/qwen2_5_vl_7b").glob("*.yaml")}
    assert {row.recipe or row.name for row in paper.ROWS.values()} == recipes
