"""`mssr compare`: when runs reach an accuracy, what they needed for it, and whether evaluations differ."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mssr.evaluation import results
from mssr.tools import compare_page
from mssr.tools.cli import main
from mssr.tools.run_curves import read_run
from tests.unit.evaluation_records import a_record

pytestmark = pytest.mark.unit


def write_run(
    path: Path,
    validation: dict[int, float],
    *,
    steps: int = 4,
    seconds: float = 36.0,
    kept: float | None = None,
    name: str = "mssr",
    per_step: Any = 100,
) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        yaml.safe_dump({"algorithm": {"name": name}, "rollout": {"rollouts_per_step": per_step}})
    )
    lines = []
    for step in range(steps + 1):
        record: dict[str, Any] = {"step": step, "epoch": 0.1 * step}
        if step:
            record |= {"timing/step_s": seconds, "reward/accuracy": 0.1 * step, "policy/entropy": 1 / step}
            if kept:
                record["sampler/kept_fraction"] = kept
        if step in validation:
            record["val/accuracy"] = validation[step]
        if len(record) > 2:
            lines.append(json.dumps(record) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def write_evaluation(path: Path, right: dict[str, list[bool]], **changes: Any) -> Path:
    rows = [
        a_record(str(i), "right" if correct else "wrong", benchmark=benchmark, **changes)
        for benchmark, flags in right.items()
        for i, correct in enumerate(flags)
    ]
    results.write(path, rows, {"model": "m"})
    return path


def run(*arguments: object) -> dict[str, Any]:
    """The command; the report that it writes."""
    out = Path(str(arguments[0])).parent / "out"
    assert main(["compare", *map(str, arguments), "--out", str(out)]) == 0
    return json.loads((out / "compare.json").read_text())


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that the user got wrong."""
    assert main(["compare", *map(str, arguments), "--out", "/nowhere/to/be/written"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_curves_of_a_run(tmp_path: Path) -> None:
    curves = read_run(write_run(tmp_path / "a", {0: 0.2, 2: 0.5, 4: 0.5}))
    # 36 s are a hundredth of an hour.
    assert [(p.step, p.rollouts, round(p.hours, 9), p.value) for p in curves.validation] == [
        (0, 0, 0.0, 0.2),
        (2, 200, 0.02, 0.5),
        (4, 400, 0.04, 0.5),
    ]
    assert curves.best.step == 2 and curves.last.rollouts == 400 and curves.method == "mssr"
    assert [p.value for p in curves.entropy] == [1, 1 / 2, 1 / 3, 1 / 4] and len(curves.training) == 4


def test_rollouts_count_all_that_were_generated(tmp_path: Path) -> None:
    # Dynamic sampling keeps 100 of 250; first values took 3 prompts of 2 responses.
    path = write_run(tmp_path / "a", {2: 0.5}, kept=0.4)
    lines = [
        {"fingerprint": "x"},
        *({"id": str(i), "scores": [0, 1], "responses": ["", ""]} for i in range(3)),
    ]
    (path / "init_rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = read_run(path)
    assert curves.validation[0].rollouts == 6 + 2 * 250 and curves.last.rollouts == 6 + 4 * 250


def test_half_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grpo = write_run(tmp_path / "grpo", {0: 0.2, 2: 0.5, 4: 0.6}, name="grpo")
    mssr = write_run(tmp_path / "mssr", {0: 0.2, 2: 0.61, 4: 0.7}, seconds=54.0)
    slow = write_run(tmp_path / "slow", {0: 0.2, 2: 0.3, 4: 0.59})
    report = run(grpo, mssr, slow)
    # By default: the best of the first, which it reaches at step 4; half the steps in 3/4 of the hours.
    (reached,) = report["reached"]
    assert reached["accuracy"] == 0.6
    assert reached["runs"]["grpo"]["step"] == 4 and reached["runs"]["grpo"]["ratio"]["step"] == 1
    found = reached["runs"]["mssr"]
    assert (found["step"], found["rollouts"]) == (2, 200) and found["hours"] == pytest.approx(0.03)
    assert found["ratio"] == pytest.approx({"step": 0.5, "rollouts": 0.5, "hours": 0.75})
    assert reached["runs"]["slow"] is None
    assert [r["name"] for r in report["runs"]] == ["grpo", "mssr", "slow"]
    assert report["runs"][1]["best"]["value"] == 0.7 and report["runs"][1]["method"] == "mssr"
    text = (tmp_path / "out/compare.md").read_text()
    assert "### Reaching 60.00%" in text
    assert "| mssr | 2 | 0.50 | 200 | 0.50 | 0.030 | 0.75 |" in text and "| slow | not reached |" in text
    assert "| grpo | grpo | 4 | 400 | 0.04 | 20.0 | 60.0 | 4 | 60.0 | 40.0 | 1.000 -> 0.250 |" in text
    assert text in capsys.readouterr().out
    page = (tmp_path / "out/compare.html").read_text()
    assert "validation accuracy over rollouts" in page and "<td>stalled</td>" not in page
    assert '<th scope="row">slow</th><td colspan="6">not reached</td>' in page


def test_runs_that_differ_in_the_seed_are_one_curve(tmp_path: Path) -> None:
    values = {"a": 0.4, "b": 0.6, "other": 0.5}
    for k, (name, value) in enumerate(values.items()):
        path = write_run(
            tmp_path / name, {0: 0.2, 2: value, **({4: 0.9} if name == "a" else {})}, seconds=36.0 * (k + 1)
        )
        config = yaml.safe_load((path / "config.yaml").read_text())
        config |= {
            "seed": k,
            "trainer": {"run_dir": str(path)},
            "actor": {"lr": 2.0 if name == "other" else 1.0},
        }
        (path / "config.yaml").write_text(yaml.safe_dump(config))
    runs = {name: read_run(tmp_path / name) for name in values}
    assert compare_page.groups(runs) == {"a": ["a", "b"], "other": ["other"]}
    assert compare_page.config_differences(runs) == [("actor.lr", [1.0, 2.0])]
    charts = compare_page.curves(runs, [0.7])
    data = [json.loads(re.findall(r"<script[^>]*>(.*)</script>", chart)[0]) for chart in charts]
    assert [d["x"] for d in data] == ["steps", "rollouts", "hours"] * 3
    both, alone, target = data[2]["series"]
    assert (both["name"], alone["name"], target["y"]) == ("a (2 seeds)", "other", [0.7, 0.7])
    # At the steps that both have, where they are on average: after 2 steps of 36 and of 72 seconds.
    assert both["x"] == [0, 0.03] and both["y"] == [0.2, 0.5]
    assert (both["low"], both["high"], alone["low"]) == ([0.2, 0.4], [0.2, 0.6], [])


def test_samples_side_by_side(tmp_path: Path) -> None:
    for name, scores in {"a": [1, 0, 1], "b": [1, 1, None]}.items():
        write_run(tmp_path / name, {0: 0.1})
        (tmp_path / name / "samples").mkdir()
        lines = [
            {"split": "val", "id": f"p{k}", "question": "?", "response": f"<{name}{k}>", "answer": "8",
             "score": score, "finish_reason": "stop", "response_tokens": 3, "chosen": "best", "images": []}
            for k, score in enumerate(scores)
        ]  # fmt: skip
        lines += [lines[0] | {"id": f"only {name}"}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "samples/step-000004.jsonl").write_text(text)
    found = compare_page.samples({name: tmp_path / name for name in "ab"})
    assert [prompt["id"] for prompt, _ in found] == ["p1", "p2", "p0"]  # different verdicts first
    assert [(name, v["verdict"], v["response"]) for name, v in found[0][1]] == [
        ("a", "wrong", "<a1>"), ("b", "right", "<b1>"),
    ]  # fmt: skip
    run(tmp_path / "a", tmp_path / "b")
    page = (tmp_path / "out/compare.html").read_text()
    assert "&lt;b1&gt;" in page and "<b1>" not in page and "They do not differ" in page


def test_given_accuracies(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {0: 0.4, 2: 0.5, 4: 0.6})
    second = write_run(tmp_path / "b", {0: 0.2, 2: 0.5, 4: 0.9})
    report = run(first, second, "--at", "0.4", "--at", "0.5", "--at", "0.9")
    steps = [[r and r["step"] for r in at["runs"].values()] for at in report["reached"]]
    assert steps == [[0, 2], [2, 2], [None, 4]]
    # The first needs no step, or never gets there: there is nothing to divide by.
    ratios = [at["runs"]["b"]["ratio"]["step"] for at in report["reached"]]
    assert ratios == [None, 1.0, None]


def test_another_validation_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "a", {2: 0.5})
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text.replace('"val/accuracy"', '"val/mmk12/accuracy"'))
    report = run(path, "--metric", "val/mmk12/accuracy")
    assert report["runs"][0]["best"]["value"] == 0.5
    assert "a has no val/accuracy in its metrics.jsonl: not validated" in complaint(capsys, path)


def test_a_step_without_entropy_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", {2: 0.5})
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text.replace('"policy/entropy": 0.5', '"policy/entropy": NaN'))
    assert [p.step for p in read_run(path).entropy] == [1, 3, 4]


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_run(tmp_path / part / "digits", {0: 0.1, 4: 0.5}) for part in ("x", "y")]
    other = write_run(tmp_path / "z" / "other", {0: 0.1})
    assert [r["name"] for r in run(*paths, other)["runs"]] == ["x/digits", "y/digits", "other"]
    assert "x/digits is given twice" in complaint(capsys, paths[0], paths[1], paths[0])


def test_two_evaluations(tmp_path: Path) -> None:
    old = [i % 2 == 0 for i in range(100)]
    new = [True if i in (1, 3, 5, 7, 9, 11) else i % 2 == 0 for i in range(100)]
    first = write_evaluation(tmp_path / "base", {"mmk12": old, "mathvista": old})
    second = write_evaluation(tmp_path / "mssr", {"mmk12": new, "mathvista": old, "mathverse": old})
    report = run(first, second)
    assert report["evaluations"]["mssr"]["benchmarks"]["mmk12"]["accuracy"] == 0.56
    found = report["differences"]["mssr"]
    assert set(found) == {"mmk12", "mathvista", "average"}
    # 6 of 100 items got better and none worse: B(100, 0.06) / 100.
    assert found["mmk12"]["difference"] == 0.06
    assert found["mmk12"]["interval"] == pytest.approx([0.02, 0.11], abs=0.011)
    assert found["mmk12"]["p_value"] < 0.03
    assert found["mathvista"] == {"difference": 0, "interval": [0, 0], "p_value": 1}
    assert found["average"]["difference"] == 0.03
    text = (tmp_path / "out/compare.md").read_text()
    assert "| mssr | mmk12 | +6.0 | +2.0 to +11.0 |" in text and "| mssr | average | +3.0 |" in text
    assert "| base | – | 50.0 (40.0 to 60.0) | 50.0 (" in text and "## Runs" not in text
    assert "runs" not in report and "50.0 (40.0 to 60.0)" in (tmp_path / "out/compare.html").read_text()


def test_runs_and_evaluations_together(tmp_path: Path) -> None:
    report = run(
        write_evaluation(tmp_path / "base", {"mmk12": [True, False]}),
        write_run(tmp_path / "a", {0: 0.1, 4: 0.5}),
        write_evaluation(tmp_path / "after", {"mmk12": [True, True]}),
    )
    assert (
        report["reached"][0]["accuracy"] == 0.5
        and report["differences"]["after"]["mmk12"]["difference"] == 0.5
    )


def test_the_report_has_the_same_bytes_again(tmp_path: Path) -> None:
    paths = [write_evaluation(tmp_path / n, {"mmk12": [True, n == "a"] * 9}) for n in "ab"]
    paths.append(write_run(tmp_path / "run", {0: 0.1, 4: 0.5}))
    run(*paths)
    before = [(tmp_path / "out" / f"compare.{end}").read_bytes() for end in ("json", "md", "html")]
    run(*paths)
    assert before == [(tmp_path / "out" / f"compare.{end}").read_bytes() for end in ("json", "md", "html")]


# What the user can get wrong


def test_evaluations_of_other_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_evaluation(tmp_path / "a", {"mmk12": [True] * 5})
    fewer = write_evaluation(tmp_path / "b", {"mmk12": [True] * 3})
    assert "2 of 5 items of mmk12 in a, 3 the first, are not in mmk12 in b" in complaint(capsys, first, fewer)
    other = write_evaluation(tmp_path / "c", {"mmk12": [True] * 5}, answer="9")
    error = complaint(capsys, first, other)
    assert "item 0 has the answer '8' for mmk12 in a and '9' for mmk12 in c" in error
    none = write_evaluation(tmp_path / "d", {"mathvista": [True]})
    assert "a and d have no benchmark in common" in complaint(capsys, first, none)


def test_directories_that_are_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_run(tmp_path / "a", {0: 0.1})
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing"):
        error = complaint(capsys, good, path)
        assert f"{path} is neither a run directory" in error and "results.json" in error


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"step": 2', '"step": 2', "metrics.jsonl line 3 is damaged"),
        ('{"step": 2', '{"stop": 2', "metrics.jsonl line 3 has no step"),
        ('{"step": 2', '{"step": 4', "metrics.jsonl line 3: step 4 follows step 1"),
        ('{"step": 0', '{"step": 7', "metrics.jsonl line 1: step 7 follows nothing"),
        ('"timing/step_s": 36.0', '"timing/step_s": "x"', "line 2: timing/step_s is 'x', not a number"),
        ('"val/accuracy": 0.1', '"val/accuracy": true', "line 1: val/accuracy is True, not a number"),
        (
            '"sampler/kept_fraction": 0.5',
            '"sampler/kept_fraction": 0',
            "kept_fraction is 0, not between 0 and 1",
        ),
    ],
)
def test_damaged_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    path = write_run(tmp_path / "a", {0: 0.1}, kept=0.5)
    text = (path / "metrics.jsonl").read_text()
    assert old in text
    (path / "metrics.jsonl").write_text(text.replace(old, new, 1))
    assert message in complaint(capsys, path)


def test_damaged_configs_and_first_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "a", {0: 0.1})
    (path / "init_rollouts.jsonl").write_text('{"fingerprint": "x"}\n{"id": "1"}\n')
    assert "init_rollouts.jsonl line 2 is damaged" in complaint(capsys, path)
    for text, message in (
        ("rollout: {rollouts_per_step: many}", "rollout.rollouts_per_step is 'many', not a number above 0"),
        ("algorithm: {name: grpo}", "rollout.rollouts_per_step is None"),
        ("rollout: [", "config.yaml is damaged"),
    ):
        (path / "config.yaml").write_text(text)
        assert message in complaint(capsys, path)
    (path / "config.yaml").unlink()
    assert "config.yaml is missing" in complaint(capsys, path)
    (path / "metrics.jsonl").write_bytes(b"\xff\xfe")
    assert "metrics.jsonl is damaged" in complaint(capsys, path)


def test_accuracies_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "a", {0: 0.1})
    for value in ("65", "0", "nan"):
        assert f"--at: {value} is no accuracy" in complaint(capsys, path, "--at", value)
    evaluation = write_evaluation(tmp_path / "e", {"mmk12": [True]})
    assert "no run is given" in complaint(capsys, evaluation, "--at", "0.5")


def test_an_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "a", {0: 0.1})
    (tmp_path / "file").write_text("")
    assert main(["compare", str(path), "--out", str(tmp_path / "file")]) == 2
    assert "file cannot be written" in capsys.readouterr().err
