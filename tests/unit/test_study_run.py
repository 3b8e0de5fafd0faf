"""The study's queue, with a runner that trains nothing; and how a run is measured."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mssr.config.data import RewardConfig
from mssr.errors import UserError
from mssr.rewards import RewardInput
from mssr.runs.config import load_config
from scripts.study.records import SELECTION_SEED, read_all
from scripts.study.run import HERE, Job, Study, flat, held, jobs

pytestmark = pytest.mark.unit

SPEC = yaml.safe_load((HERE / "study.yaml").read_text())
SMALL = SPEC | {
    "methods": {name: SPEC["methods"][name] for name in ("mssr", "mvsr", "grpo", "rloo")},
    "controls": {name: SPEC["controls"][name] for name in ("mssr_decay", "grpo_shaping")},
    "seeds": [0, 1],
    "escape": SPEC["escape"] | {"first": ["mssr", "mvsr", "grpo"]},
    "published": SPEC["published"] | {"updates": {"mssr": 16, "mvsr": 16, "grpo": 2, "rloo": 2}},
}


class Runner:
    """In place of a training: a run's validation accuracy is its seed's favourite at one learning rate."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.stop_after = 10**9
        self.task = "c0ffee"
        self.errors: dict[str, Exception] = {}
        """By override."""

    def __call__(self, config_file: str, overrides: Sequence[str], directory: Path) -> dict[str, Any]:
        assert not directory.exists()
        directory.mkdir()
        for override, error in self.errors.items():
            if override in overrides:
                raise error
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        asked = dict(override.split("=", 1) for override in overrides)
        self.asked.append(asked)
        favourite = "0.0002" if int(asked["seed"]) == SELECTION_SEED else "0.0003"
        val = {"steps": [0, 60], "accuracy": [0.25, 0.5 + 0.25 * (asked["actor.lr"] == favourite)]}
        curves = {"accuracy": [0.5], "val": val}
        run = {"task": self.task, "steps": int(asked["trainer.steps"]), "rollouts": 128, "updates": 4}
        return run | {"curves": curves, "final": {"val": 0.5}, "seconds": {"step": [0.4]}}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))

    def study(only: str = "*") -> Study:
        return Study(tmp_path / "queue.jsonl", tmp_path / "records", tmp_path, tmp_path / "spec.yaml", only)

    return study


def names(found: Sequence[Job]) -> list[str]:
    return [job.name for job in found]


def test_a_stopped_queue_goes_on_where_it_was_and_does_every_run_once(make: Any, tmp_path: Path) -> None:
    runner = Runner()
    runner.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        make("grid/*").run(runner, tell=lambda line: None)
    assert names(make("grid/*").state()[0]) == names(list(jobs(SMALL)))[:5]
    runner.stop_after = 10**9
    make().run(runner, tell=lambda line: None)
    done, left, waiting = make().state()
    assert not left and not waiting
    runs = [tuple(sorted(asked.items())) for asked in runner.asked]
    assert len(set(runs)) == len(runs) == len(done) == len(read_all(tmp_path / "records"))
    assert not [path for path in tmp_path.iterdir() if "+" in path.name]  # no run's directory is left
    make().run(runner, tell=lambda line: None)
    assert len(runner.asked) == len(runs)


def test_the_own_best_rate_is_waited_for_and_chosen_by_the_selection_seed_alone(make: Any) -> None:
    runner = Runner()
    make("grid/*/0").run(runner, tell=lambda line: None)
    make(f"grid/mssr/[13]e-4/{SELECTION_SEED}").run(runner, tell=lambda line: None)
    assert not make("escape/*").state()[1]  # a rate is not tried yet
    make(f"grid/mssr/*/{SELECTION_SEED}").run(runner, tell=lambda line: None)
    _, left, waiting = make("escape/*").state()
    assert {(job.method, job.lr, job.base) for job in left} == {("mssr", "2e-4", "mid")}
    assert {job.method for job in waiting} == {"mvsr", "grpo", "rloo"}


def test_a_job_is_left_to_the_process_that_has_it_and_free_when_that_is_killed(
    make: Any, tmp_path: Path
) -> None:
    study, runner = make("grid/*/3e-4/0"), Runner()
    first = study.state()[1][0]
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        with held(tmp_path / "locks" / flat(first.name)):
            os.write(tell, b"1")
            signal.pause()
    try:
        os.read(ready, 1)
        study.run(runner, tell=lambda line: None)
        assert names(study.state()[1]) == [first.name]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    study.run(runner, tell=lambda line: None)
    assert not study.state()[1]


def test_a_failure_costs_its_run_only_and_is_tried_again_once_when_asked(make: Any, tmp_path: Path) -> None:
    study, runner, told = make("grid/*/3e-4/0"), Runner(), list[str]()
    runner.errors = {
        "algorithm.name=grpo": ZeroDivisionError("nothing to divide"),
        "algorithm.name=rloo": UserError("unknown algorithm"),
    }
    for retry, failed in (False, 1), (False, 1), (True, 2), (True, 2):
        told.clear()
        study.run(runner, retry, told.append)
        assert names(study.state()[1]) == ["grid/grpo/3e-4/0", "grid/rloo/3e-4/0"]
        assert study.failed() == {"grid/grpo/3e-4/0": failed}
        # Of a method that is not there a line each time: it may come with another version.
        assert "grid/rloo/3e-4/0: skipped: unknown algorithm" in told
    assert "nothing to divide" in (tmp_path / "failed.jsonl").read_text()
    assert len(runner.asked) == 2


def test_a_record_says_what_was_run_and_with_what(make: Any, tmp_path: Path) -> None:
    make("controls/grpo_shaping/3e-4/1").run(Runner(), tell=lambda line: None)
    make("timing/mssr/*/0").run(Runner(), tell=lambda line: None)
    control, timing = read_all(tmp_path / "records")
    assert control.keys() - timing.keys() == set()
    assert timing.keys() - control.keys() == {"seconds"}  # others may have worked beside the control
    assert all(control.pop(key) is not None for key in ("wall_s", "commit", "machine", "versions"))
    assert control == {
        "job": "controls/grpo_shaping/3e-4/1",
        "setting": "stress",
        "lr": 3e-4,
        "part": "controls",
        "base": "habit",
        "method": "grpo",
        "label": "grpo_shaping",
        "seed": 1,
        "task": "c0ffee",
        "overrides": {"algorithm.name": "grpo", "algorithm.shaping.enabled": "true"},
        "steps": 60,
        "rollouts": 128,
        "updates": 4,
        "curves": {"accuracy": [0.5], "val": {"steps": [0, 60], "accuracy": [0.25, 0.75]}},
        "final": {"val": 0.5},
    }
    assert timing["steps"] == 10


def test_runs_of_another_task_are_not_put_beside_those_that_are_there(make: Any, tmp_path: Path) -> None:
    runner = Runner()
    make("grid/mssr/3e-4/0").run(runner, tell=lambda line: None)
    runner.task = "decade"
    with pytest.raises(UserError, match="cannot be compared"):
        make("grid/mssr/3e-4/1").run(runner, tell=lambda line: None)
    assert [record["task"] for record in read_all(tmp_path / "records")] == ["c0ffee"]


def test_a_stop_at_any_time_leaves_as_many_seeds_of_everything() -> None:
    order = list(jobs(SPEC))
    assert len(set(names(order))) == len(order)
    grid = [job for job in order if job.part == "grid"]
    assert [job.seed for job in grid] == sorted(
        (job.seed for job in grid), key=[SELECTION_SEED, *SPEC["seeds"]].index
    )
    for part, seeds in (("controls", 5), ("published", 5), ("escape", 10)):
        late = set(SPEC["methods"]) - set(SPEC["escape"]["first"]) if part == "escape" else set()
        places = [(n, job.seed) for n, job in enumerate(order) if job.part == part and job.label not in late]
        assert [seed for _, seed in places] == sorted(seed for _, seed in places)
        assert {seed for _, seed in places} == set(range(seeds))
        last_of_first_round = max(place for place, seed in places if seed == 0)
        assert last_of_first_round < min(place for place, job in enumerate(order) if job.seed == seeds - 1)


def test_every_method_and_control_is_a_config_of_its_own(make: Any, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text((HERE / "study.yaml").read_text())
    study = make()
    grid = {job.label: job for job in jobs(SPEC) if job.part in ("grid", "controls")}
    configs = {}
    for label, job in grid.items():
        file, overrides = study.config_of(replace(job, lr="1e-4"))
        configs[label] = load_config(HERE.parents[1] / file, overrides)
    assert grid.keys() == {*SPEC["methods"], *SPEC["controls"]}
    for label, config in configs.items():
        assert [other for other in configs if configs[other] == config] == [label]
        assert (config.actor.lr, config.rollout.rollouts_per_step, config.trainer.steps) == (1e-4, 128, 60)
        assert config.actor.updates_per_step == 4 and not config.needs_reference
        assert config.init_rollouts == (label == "mssr_rollout_prior")  # all others have equal rollouts


def test_what_counts_in_a_response_is_counted_and_the_score_is_the_rules(tmp_path: Path) -> None:
    from scripts.study.training import CountingScorer, measured

    config = load_config("digits", ["rollout.engine=hf"])
    assert config.reward == RewardConfig()
    scorer = CountingScorer(config, None)  # type: ignore[arg-type]
    texts = r"<think>**3=3** **5=8**</think>\boxed{8}", r"<think>guess</think>\boxed{8}", "8"
    scored = scorer.score([RewardInput(text, "8", 9) for text in texts])
    assert scored.scores.tolist() == [1, 1, 0]
    assert scored.parts["careful"].tolist() == [1, 0, 0]
    assert scored.parts["bold"].tolist() == [2, 0, 0]
    start = {"step": 0, "val/accuracy": 0.25}
    step = {"reward/accuracy": 1 / 3, "policy/entropy": None, "timing/step_s": 0.5}
    end = {"step": 2, "val/accuracy": 0.5, **step}
    sampled = {f"val/{name}": 0.75 for name in ("accuracy", "pass_at_8", "bold", "careful")}
    assert measured([start, {"step": 1, **step}, end], sampled) == {
        "curves": {
            "accuracy": [0.3333, 0.3333],
            "entropy": [None, None],
            "val": {"steps": [0, 2], "accuracy": [0.25, 0.5]},
        },
        "final": {"val": 0.5, "sampled": 0.75, "pass@8": 0.75, "bold": 0.75, "careful": 0.75},
        "seconds": {
            name: [0.5 if name == "step" else 0.0] * 2
            for name in ("step", "rollout", "reward", "score", "update", "sync")
        },
    }
