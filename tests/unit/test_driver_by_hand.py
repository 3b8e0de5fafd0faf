"""Three steps of the driver with scripted rewards: advantages, values and eta against a calculation by hand.

Three prompts and four rollouts a step, in the order of the data: A B C A, B C A B, C A B C. The method is
MVSR with a prior of one pseudo-count at the mean reward so far, eta from 0.96 (no change of the policy) down
to 0.875 (a mean KL of 0.01 and more). A value is a/(a + b) as it was BEFORE the step.

    step 1  nobody was seen: v = 1/2 for all. D = r - v = .5 -.5 -.5 -.5, mean -.25, std .433013
            KL .004, so tau = .4, eta = .96 - .4 * .085 = .926
            A  (.5, .5) -> (1.463, .463) -> (1.354738, 1.428738)     v .486707
            B and C  (.5, .5) -> (.463, 1.463)                       v .240395
    step 2  v = .240395 .240395 .486707 .240395, r = 1 0 1 0
            D = .759605 -.240395 .513293 -.240395, mean .198027, std .446987
            KL .016, the window's mean .010, so tau = 1, eta = .875
            A  -> (2.185396, 1.250146)                               v .636114
            B  -> (1.405125, 1.280125) -> (1.229484, 2.120109)       v .367055
            C  -> (.405125, 2.280125)                                v .150870
    step 3  v = .150870 .636114 .367055 .150870, r = 1 1 1 0
            D = .849130 .363886 .632945 -.150870, mean .423773, std .373659
            KL .001, the window's mean .007, so tau = .7, eta = .9005
            A  -> (2.967949, 1.125756)                               v .725003
            B  -> (2.107150, 1.909158)                               v .524649
            C  -> (1.364815, 2.053253) -> (1.229016, 2.848954)       v .301379
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from mssr.cluster.base import OnFinished
from mssr.data.dataset import PromptDataset
from mssr.errors import TrainingError
from mssr.rewards import Scorer
from mssr.runs.config import load_config
from mssr.runs.jsonl import read_records
from mssr.trainer.loop import Trainer
from mssr.types import Rollout, RolloutRequest, SamplingParams, TrainBatch
from tests.conftest import Workspace, make_rows, write_rows

pytestmark = pytest.mark.unit

# Rewards of each prompt's responses in a step, two where it comes twice; and the KL of the step.
REWARDS: list[dict[str, list[int]]] = [
    {"A": [1, 0], "B": [0], "C": [0]},
    {"A": [1], "B": [1, 0], "C": [0]},
    {"A": [1], "B": [1], "C": [1, 0]},
]
KLS = [0.004, 0.016, 0.001]
ORDER = ["ABCA", "BCAB", "CABC"]
ADVANTAGES = [
    [1.732051, -0.577350, -0.577350, -0.577350],
    [1.256356, -0.980840, 0.705312, -0.980840],
    [1.138362, -0.160272, 0.559796, -1.537886],
]
ETAS = [0.926, 0.875, 0.9005]
MEAN_VALUES = [0.322499, 0.384680, 0.517010]


class ScriptedCluster:
    """Engines whose responses are their rewards, and an actor that only reports a KL."""

    ranks_idle_in_rollout = False

    def __init__(self, rewards: Sequence[dict[str, list[Any]]]) -> None:
        self.rewards = rewards
        self.batches: list[TrainBatch] = []

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        on_finished: OnFinished,
        stoppable: bool = True,
    ) -> list[Rollout]:
        rewards = self.rewards[len(self.batches)]
        one, log_probs = np.ones(1, np.int32), np.zeros(1, np.float32)
        rollouts = [
            Rollout(
                r.prompt_id,
                r.sample_index,
                prompt_token_ids=one,
                response_token_ids=one,
                log_probs=log_probs,
                finish_reason="stop",
                policy_version=len(self.batches),
                text=str(rewards[r.prompt_id][r.sample_index]),
            )
            for r in requests
        ]
        for index, rollout in enumerate(rollouts):
            on_finished(index, rollout)
        return rollouts

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        assert step == len(self.batches)
        self.batches.append(batch)
        kl = {"policy/kl_update": KLS[step], "policy/kl_ref": 0.5}
        return kl | {"policy/entropy": 1.0, "policy/skipped_updates": 0.0}

    def prepare(self, prompt_ids: Sequence[str]) -> None: ...

    def sync_weights(self, version: int) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


def drive(
    workspace: Workspace,
    directory: Path,
    rewards: Sequence[dict[str, list[Any]]] = REWARDS,
    **options: Any,
) -> tuple[list[TrainBatch], list[dict]]:
    """The batches that the actor was given, and the records of the steps. A reward of None is no score."""
    rows = [row | {"id": letter} for row, letter in zip(make_rows(3, "", seed=3), "ABC", strict=True)]
    write_rows(directory / "abc.parquet", rows)
    (directory / "reward.py").write_text(
        "def scripted(completions):\n    return [None if c == 'None' else float(c) for c in completions]\n"
    )
    settings = {
        "data.train": directory / "abc.parquet",
        "data.shuffle": False,
        "reward.name": f"{directory / 'reward.py'}:scripted",
        "algorithm.name": "mvsr",
        "rollout.engine": "hf",
        "rollout.rollouts_per_step": 4,
        "cluster.launcher": "local",
        "actor.num_ranks": 1,
        "trainer.run_dir": directory / "run",
        **{f"trainer.{name}_every": 0 for name in ("val", "save", "samples")},
        **options,
    }
    config = load_config(workspace.config, [f"{k}={v}" for k, v in settings.items()])
    cluster, log = ScriptedCluster(rewards), MagicMock()
    train = PromptDataset(config.data.train, config.data)
    with Scorer(config.reward, config.rollout.max_response_length, clip=True) as scorer:
        run = MagicMock(config=config, log=log, stop=MagicMock(requested=False))
        Trainer(run, train, [], scorer, cluster).run()  # type: ignore[arg-type]
    return cluster.batches, [call.args[0] for call in log.write.call_args_list]


def test_advantages_take_the_values_from_before_the_step(workspace: Workspace, tmp_path: Path) -> None:
    batches, records = drive(workspace, tmp_path)
    assert ["".join(b.prompt_ids) for b in batches] == ORDER
    for batch, expected in zip(batches, ADVANTAGES, strict=True):
        np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)
    assert [r["baseline/eta"] for r in records] == pytest.approx(ETAS, abs=1e-12)
    assert [r["baseline/mean"] for r in records] == pytest.approx(MEAN_VALUES, abs=1e-6)
    assert [r["baseline/unseen_fraction"] for r in records] == [1, 0, 0]
    assert [r["reward/accuracy"] for r in records] == [0.25, 0.5, 0.75]
    assert all(r["advantage/std"] == pytest.approx(1, abs=1e-5) for r in records)


def test_samples_tell_the_baseline_from_before_the_step_and_the_report_is_written(
    workspace: Workspace, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "samples").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')  # the driver's log is none here
    drive(workspace, tmp_path, **{"trainer.samples_every": 2})
    assert [path.name for path in (run_dir / "samples").iterdir()] == ["step-000002.jsonl"]
    lines = read_records(run_dir / "samples/step-000002.jsonl")
    assert [x["id"] for x in lines] == ["B", "C", "A", "B"]
    assert [x["baseline"] for x in lines] == pytest.approx([0.240395, 0.240395, 0.486707, 0.240395], abs=1e-6)
    assert [x["advantage"] for x in lines] == pytest.approx(ADVANTAGES[1], abs=1e-5)
    assert {x["chosen"] for x in lines} == {"best", "worst"}
    assert "baseline 0.487, advantage +0.705" in (run_dir / "report.html").read_text()


def test_a_fixed_eta_and_a_prior_of_its_own_give_other_values(workspace: Workspace, tmp_path: Path) -> None:
    """eta 1/2 and two pseudo-counts at 1/4; step 1 is centred, so the prior shows from step 2 on.

    step 1  A (.5, 1.5) -> (1.25, .75) -> (.625, 1.375) v .3125;  B and C -> (.25, 1.75) v .125
    step 2  D = .875 -.125 .6875 -.125
    """
    options = {f"algorithm.{k}": v for k, v in [("discount.eta", 0.5), ("baseline.prior_strength", 2)]}
    batches, records = drive(workspace, tmp_path, **options, **{"algorithm.baseline.prior_mean": 0.25})
    np.testing.assert_allclose(batches[0].advantages, ADVANTAGES[0], atol=1e-5)
    d = np.array([0.875, -0.125, 0.6875, -0.125])
    np.testing.assert_allclose(batches[1].advantages, (d - d.mean()) / d.std(), atol=1e-5)
    assert [r["baseline/eta"] for r in records] == [0.5] * 3
    assert records[0]["baseline/mean"] == pytest.approx((0.3125 + 0.125 + 0.125) / 3, abs=1e-9)


def test_without_a_baseline_the_advantages_are_others(workspace: Workspace, tmp_path: Path) -> None:
    """REINFORCE++, whitened rewards: the same numbers in the first step only, where no prompt was seen."""
    batches, records = drive(workspace, tmp_path, **{"algorithm.name": "reinforce_pp"})
    whitened = [[1.5, -0.5, -0.5, -0.5], [0.866025, -0.866025] * 2, [0.5, 0.5, 0.5, -1.5]]
    for batch, expected in zip(batches, whitened, strict=True):
        np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)
    assert all("baseline/eta" not in r for r in records)


def test_what_has_no_score_is_as_if_it_had_not_been_there(workspace: Workspace, tmp_path: Path) -> None:
    """Neither a 0 in batch and baseline, nor in a mean.

    step 1  of A B C A the second has none: D = .5 -.5 -.5; B stays unseen. eta .926, mean reward 1/3.
            A  (.5, .5) -> (1.354738, 1.428738)  C  (.5, .5) -> (.463, 1.463)
    step 2  of B C A B the first has none: v(B) is the mean so far, 1/3; r = 0 1 0
    """
    rewards = [{"A": [1, 0], "B": [None], "C": [0]}, {"A": [1], "B": [None, 0], "C": [0]}, REWARDS[2]]
    batches, records = drive(workspace, tmp_path, rewards)
    assert ["".join(b.prompt_ids) for b in batches] == ["ACA", "CAB", "CABC"]
    assert [r["reward/failed"] for r in records] == [1, 1, 0]
    assert [r["reward/errors"] for r in records] == [0, 0, 0]
    assert [r["reward/accuracy"] for r in records] == pytest.approx([1 / 3, 1 / 3, 0.75])
    d = np.array([0.5, -0.5, -0.5])
    np.testing.assert_allclose(batches[0].advantages, (d - d.mean()) / d.std(), atol=1e-5)
    d = np.array([-0.240395, 1 - 0.486707, -1 / 3])
    np.testing.assert_allclose(batches[1].advantages, (d - d.mean()) / d.std(), atol=1e-5)
    assert [r["baseline/unseen_fraction"] for r in records] == pytest.approx([1, 1 / 3, 0])


def test_a_group_keeps_those_with_a_score_if_there_are_two(workspace: Workspace, tmp_path: Path) -> None:
    rewards = [
        {"A": [1, None, 0], "B": [None, None, 1], "C": [0, 0, 0]},
        {"A": [1, 0, 0], "B": [0, None, 1], "C": [None] * 3},
        {"A": [None] * 3, "B": [None] * 3, "C": [1, None, None]},
    ]
    options = {"algorithm.name": "rloo", "rollout.n": 3, "rollout.rollouts_per_step": 9}
    options |= {"actor.updates_per_step": 1, "data.shuffle": False}
    with pytest.raises(TrainingError, match="8 of 9 responses have no score, and the others are not enough"):
        drive(workspace, tmp_path, rewards, **options)
    batches, _ = drive(workspace, tmp_path, rewards[:2], **options, **{"trainer.steps": 2})
    assert ["".join(sorted(b.prompt_ids)) for b in batches] == ["AACCC", "AAABB"]
    by_prompt = dict(zip(batches[0].prompt_ids, batches[0].advantages, strict=True))
    assert sorted(batches[0].advantages.tolist()) == [-1, 0, 0, 0, 1] and by_prompt["C"] == 0
