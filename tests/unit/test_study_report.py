"""The study's choice of learning rates, statistics and verdicts, by handmade records with known answers."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.study import figures, report
from scripts.study import records as study
from scripts.study.records import Estimate, Runs, own_best_lr, paired_shares, reach, t_interval, wilson
from scripts.study.report import Claim, Effect

pytestmark = pytest.mark.unit


def record(
    label: str = "mssr", lr: float = 3e-4, seed: int = 0, accuracy: Any = 0.5, **other: Any
) -> dict[str, Any]:
    """A run of 20 steps, whose accuracy is a number or a curve; part, val, careful and others as given."""
    accuracy = accuracy if isinstance(accuracy, list) else [accuracy] * 20
    part, steps = other.pop("part", "grid"), len(accuracy)
    curves = {"accuracy": accuracy, "entropy": [0.5] * steps, "careful": [other.pop("careful", 0.0)] * steps}
    curves["val"] = {"steps": [0, 10, 20], "accuracy": other.pop("val", [0.1, 0.2, 0.3])}
    final = {"val": 0.3, "sampled": 0.3, "pass@8": 0.6, "bold": other.pop("bold", 1.0), "careful": 0.0}
    found = {
        "job": f"{part}/{label}/{lr:.0e}/{seed}", "part": part, "setting": "stress", "base": "habit",
        "task": "t1", "method": label, "label": label, "lr": lr, "seed": seed, "overrides": {},
        "steps": steps, "rollouts": 128, "updates": 4, "commit": "c0ffee", "machine": "a box, 2 cores",
        "versions": {"torch": "1"}, "wall_s": 30.0, "curves": curves, "final": final,
    }  # fmt: skip
    return found | other


def test_the_rate_is_chosen_by_the_selection_seed_of_the_grid_and_nothing_else() -> None:
    records = [
        record(lr=1e-4, seed=100, val=[0.1, 0.9, 0.5]),
        record(lr=2e-4, seed=100, val=[0.1, 0.6, 0.9]),  # the highest mean, not the highest value or end
        record(lr=3e-4, seed=100, val=[0.1, 0.2, 0.95]),
        record(lr=3e-4, seed=0, val=[1.0, 1.0, 1.0]),
        record(lr=3e-4, seed=100, val=[1.0, 1.0, 1.0], part="escape"),
        record("mssr_decay", lr=3e-4, seed=100, val=[1.0, 1.0, 1.0], method="mssr"),
    ]
    assert own_best_lr(records, "mssr") == 2e-4
    assert own_best_lr(records, "grpo") is None
    equal = [record(lr=lr, seed=100) for lr in (3e-4, 1e-4, 2e-4)]
    assert own_best_lr(equal, "mssr") == 1e-4


def test_runs_are_found_by_label_rate_and_pool() -> None:
    records = [
        record(lr=1e-4, seed=100, val=[0.9] * 3),
        record(lr=3e-4, seed=100),
        *(record(lr=lr, seed=seed) for lr in (1e-4, 3e-4) for seed in (1, 0)),
        record("mssr_decay", lr=1e-4, method="mssr", part="controls"),
        record(lr=1e-4, part="published", updates=16),
        record("grpo", lr=1e-4, part="published", updates=2),
    ]
    runs = Runs(records)
    assert list(runs.of("mssr")) == [0, 1]  # not seed 100
    assert [run["lr"] for run in runs.of("mssr").values()] == [1e-4, 1e-4]
    assert list(runs.of("mssr_decay")) == [0]  # at its method's rate
    assert runs.of("mssr", 1e-4, "published")[0]["updates"] == 16
    assert runs.of("mssr", 2e-4) == runs.of("grpo") == runs.of("vppo") == {}


@pytest.mark.parametrize(
    "other", [{"task": "t2"}, {"rollouts": 64}, {"updates": 16}, {"base": "mid"}, {"steps": 40}]
)
def test_different_budgets_are_not_compared(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="grid/grpo/3e-04/0 has the budget"):
        Runs([record(), record("grpo", **other)])


def test_a_run_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record()) + "\n")
    with pytest.raises(ValueError, match=r"3e-04/0 is in (.*) twice"):
        study.read_all(tmp_path)
    with pytest.raises(ValueError, match="are the same run"):
        Runs([record(), record(part="controls")])


def test_what_is_measured_in_a_run() -> None:
    # Five steps at .4, ten at .9, five at .6: the means of 5 steps are .4, .5, .6, .7, .8, .9 ...
    run = record(accuracy=[0.4] * 5 + [0.9] * 10 + [0.6] * 5)
    curve = run["curves"]["accuracy"]
    assert reach(curve, 0.4) == 5
    assert reach(curve, 0.6 - 1e-9) == 7
    assert reach(curve, 0.91) is None
    assert (study.reach_or_after(run, 0.8 - 1e-9), study.reach_or_after(run, 0.95)) == (9, 21)
    assert study.best(run) == pytest.approx(0.9)
    assert study.end(run) == pytest.approx(0.75)
    assert study.fall(run) == pytest.approx(0.15)
    assert study.peak(run) == 10
    assert study.mean(run) == pytest.approx((5 * 0.4 + 10 * 0.9 + 5 * 0.6) / 20)


def test_seconds_are_those_of_runs_alone() -> None:
    timed = [record(part="timing", seed=s, seconds={"step": [9.0, 1.0, 1.0 + s]}) for s in (0, 1)]
    assert study.seconds_a_step([*timed, record("grpo")]) == {"mssr": 1.5}


def test_the_interval_of_pairs_is_students() -> None:
    found = t_interval([0.1, 0.2, 0.3, 0.4, 0.5])
    half = 2.7764451 * math.sqrt(0.025 / 5)  # t of 4 degrees of freedom at .975
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.3, 0.3 - half, 0.3 + half))
    assert t_interval([0.1]) is None


def test_the_interval_of_a_share_is_wilsons() -> None:
    p, n, z = 0.3, 10, 1.959963985
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = wilson(3, 10)
    assert (found.value, found.low, found.high) == pytest.approx((p, centre - half, centre + half))


def test_shares_of_the_same_seeds_differ_where_the_exact_test_says_so() -> None:
    # All m seeds that differ do so in the same way: the p-value is 2 / 2^m, below .05 from m = 6 on.
    for m, excludes in ((5, False), (6, True)):
        found = paired_shares([True] * 10, [False] * m + [True] * (10 - m))
        assert found is not None and found.value == pytest.approx(m / 10)
        assert found.high == pytest.approx(m / 10)
        assert found.low == pytest.approx((2 * 0.025 ** (1 / m) - 1) * m / 10)  # Clopper and Pearson
        assert (found.low > 0) is excludes
    assert paired_shares([True, False], [True, False]) == Estimate(0.0, 0.0, 0.0, 2)
    assert paired_shares([True], [False]) is None


@pytest.mark.parametrize(
    ("low", "high", "threshold", "verdict"),
    [
        (0.01, 0.2, 0.0, "holds"),
        (-0.01, 0.2, 0.0, "not decided"),
        (-0.2, -0.01, 0.0, "does not hold"),
        (0.0, 0.0, 0.0, "not decided"),
        (0.05, 0.2, 0.15, "not decided"),
        (0.05, 0.14, 0.15, "does not hold"),  # more than nothing, but less than is claimed
        (0.16, 0.2, 0.15, "holds"),
    ],
)
def test_the_verdict_of_an_interval(low: float, high: float, threshold: float, verdict: str) -> None:
    assert Estimate((low + high) / 2, low, high, 5).verdict(threshold) == verdict


# Claims, document and figures


def pair(first: Any, second: Any, lr: float = 3e-4, **other: Any) -> list[dict[str, Any]]:
    """Runs of MSSR and of MVSR, one a seed; what is given is a list of accuracies."""
    runs = [record("mssr", lr, seed, a, **other) for seed, a in enumerate(first)]
    return runs + [record("mvsr", lr, seed, a, **other) for seed, a in enumerate(second)]


def test_an_effect_is_of_the_same_seeds() -> None:
    effect = Effect("", "end", "mssr", "mvsr")
    runs = Runs(pair([0.5, 0.7, 0.9], [0.4, 0.5, 0.6, 0.0]))  # the last has no counterpart
    found = effect.estimate(runs, 3e-4)
    assert found is not None and (found.value, found.n) == (pytest.approx(0.2), 3)
    half = 4.3026527 * 0.1 / math.sqrt(3)  # t of 2 degrees of freedom at .975
    assert effect.shown(runs, 3e-4) == f"+0.200 ({0.2 - half:+.3f} to {0.2 + half:+.3f}), 3 seeds"
    assert effect.verdict(runs, 3e-4) == "not decided"
    assert (effect.verdict(runs, 1e-4), effect.shown(runs, 1e-4)) == ("not run", "")
    assert Effect("", "end", "mssr", above=0.2).verdict(runs, 3e-4) == "holds"
    assert Effect("", "end", "mssr", above=1.3).verdict(runs, 3e-4) == "does not hold"


def test_the_ratio_of_steps_to_the_best_of_the_other() -> None:
    slow = [0.1] * 8 + [0.5] * 12  # its best, a mean of .5, at step 13
    fast = [0.1] * 2 + [0.5] * 18  # there at step 7
    never = [0.1] * 20  # counts as 21
    runs = Runs(pair([fast, fast], [slow, slow]))
    assert Effect("", "speed", "mssr", "mvsr", above=1).shown(runs, 3e-4) == "1.86 (1.86 to 1.86)"
    assert Effect("", "speed", "mssr", "mvsr", above=1).verdict(runs, 3e-4) == "holds"
    assert Effect("", "speed", "mssr", "mvsr", above=2).verdict(runs, 3e-4) == "does not hold"
    assert report.speed(record(accuracy=never), record(accuracy=slow)) == pytest.approx(math.log2(13 / 21))
    assert report.speed(record(accuracy=fast), record(accuracy=never), level=0.4) == pytest.approx(
        math.log2(21 / 6)
    )


def test_escape_is_judged_by_the_exact_test() -> None:
    effect = Effect("", "escaped", "mssr", "mvsr", pool="escape")
    for differ, verdict in ((5, "not decided"), (6, "holds")):
        runs = [record(lr=lr, seed=100, label=label) for lr in (3e-4,) for label in ("mssr", "mvsr")]
        for seed in range(10):
            runs.append(record("mssr", seed=seed, part="escape", base="mid", careful=0.5))
            careful = 0.49 if seed < differ else 0.9
            runs.append(record("mvsr", seed=seed, part="escape", base="mid", careful=careful))
        assert effect.verdict(Runs(runs), None) == verdict


def test_a_claim_holds_where_all_its_effects_do() -> None:
    runs = Runs(pair([0.8, 0.8, 0.9], [0.4, 0.4, 0.5]))
    holds, fails = Effect("", "end", "mssr", "mvsr"), Effect("", "end", "mvsr", "mssr")
    open_, missing = Effect("", "fall", "mssr", "mvsr"), Effect("", "end", "mssr", "grpo")
    for effects, verdict in (
        ([holds], "holds"),
        ([holds, open_], "not decided"),
        ([holds, open_, missing], "not run"),
        ([holds, open_, missing, fails], "does not hold"),
    ):
        assert Claim("", effects).verdict(runs, 3e-4) == verdict


@pytest.mark.parametrize(
    ("second", "follows"),
    [
        # MVSR's accuracy at its own best rate, 1e-4, and at 3e-4; MSSR's is .5 .6 .7 at both.
        ([[0.4, 0.5, 0.6], [0.4, 0.5, 0.6]], "it stays"),
        ([[0.4, 0.5, 0.6], [0.1, 0.6, 0.9]], "it stays"),
        ([[0.1, 0.6, 0.9], [0.1, 0.6, 0.9]], "it stays, as nothing speaks against it"),
        ([[0.6, 0.7, 0.8], [0.1, 0.6, 0.9]], "the alternative is better"),
        ([[0.6, 0.7, 0.8], [0.4, 0.5, 0.6]], "it depends on the learning rate"),
        ([[], []], "not run"),
    ],
)
def test_what_follows_for_a_default(second: list[list[float]], follows: str) -> None:
    runs = [record(label, 1e-4, seed=100) for label in ("mssr", "mvsr")]
    for lr, accuracies in zip((1e-4, 3e-4), second, strict=True):
        runs += pair([0.5, 0.6, 0.7], accuracies, lr)
    assert Claim("", [Effect("", "mean", "mssr", "mvsr")]).follows(Runs(runs)) == follows


def test_a_median_counts_runs_that_never_get_there() -> None:
    assert report.typical([3, 9, 5]) == "5"
    assert report.typical([3, None, 9, 5, None], seconds=2.0) == "18 (3 of 5)"
    assert report.typical([3, None, None]) == "– (1 of 3)"


def test_every_claim_is_about_something_that_the_study_runs() -> None:
    spec = yaml.safe_load((report.HERE / "study.yaml").read_text())
    labels = spec["methods"].keys() | spec["controls"].keys()
    claims = report.claims()
    assert set(claims["paper"]) >= {"collapse", "delay", "essential", "optional", "half", "finer"}
    assert set(claims["ours"]) >= {"exact", "eta", "prior", "probe", "share"}
    for claim in [*claims["paper"].values(), *claims["ours"].values()]:
        for effect in [*claim.decides, *claim.beside]:
            assert {effect.of, effect.than or "mssr"} <= labels
            assert effect.measure in report.MEASURES.keys() | report.RATIOS.keys()
            assert effect.pool in report.POOLS
            # The size that is called a collapse is the same in every claim.
            assert effect.measure in report.RATIOS or abs(effect.above) in (0, study.COLLAPSE)
    assert set(map(float, spec["learning_rates"])) == set(report.RATES)
    assert report.POOLS["published"] == (float(spec["published"]["lr"]),)
    assert set(chain(*figures.FAMILIES.values())) == spec["methods"].keys()


def test_the_document_says_what_the_records_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "draw", lambda *drawn: {"rates": "<svg/>\n"})
    fallen = [0.5] * 10 + [0.2] * 10
    runs = [*pair([0.8, 0.8, 0.9], [fallen] * 3), record(seed=100)]
    records = tmp_path / "records"
    records.mkdir()
    (records / "grid.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    (tmp_path / "docs/study").mkdir(parents=True)
    (tmp_path / "docs/study/old.svg").touch()
    assert report.main([], tmp_path, records) == 0
    text = (tmp_path / report.DOCUMENT).read_text()
    assert "| A single rollout without shaping collapses | **not run** | **holds** |" in text
    assert "+0.300 (+0.300 to +0.300) **holds** |" in text
    half = "MSSR reaches GRPO's best accuracy in half the steps or fewer"
    assert f"| {half} | **not run** | **not run** |" in text
    assert "**Not run**: grpo, rloo" in text
    assert "7 runs" in text and "c0ffee" in text and "a box, 2 cores" in text
    assert [path.name for path in (tmp_path / "docs/study").iterdir()] == ["rates.svg"]

    assert report.main(["--check"], tmp_path, records) == 0
    (tmp_path / report.DOCUMENT).write_text(text.replace("+0.300", "+0.301"))
    (tmp_path / "docs/study/rates.svg").unlink()
    (tmp_path / "docs/study/old.svg").touch()
    assert report.main(["--check"], tmp_path, records) == 1
    named = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert named == ["docs/study.md", "docs/study/old.svg", "docs/study/rates.svg"]


def test_the_committed_document_is_that_of_the_committed_records(capsys: pytest.CaptureFixture[str]) -> None:
    if not any(study.RECORDS.glob("*.jsonl")):
        pytest.skip("the study was not run yet")
    assert report.main(["--check"]) == 0, capsys.readouterr().err
