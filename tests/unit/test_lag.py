"""rollout.lag=1: what is trained on is a step old, is corrected, and survives whatever stops a run."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mssr.config import Config
from mssr.config.checks import validate
from mssr.errors import StopRequestedError, UserError, WorkersLostError
from mssr.runs.config import load_config
from mssr.types import TrainBatch
from tests.conftest import Workspace
from tests.unit.test_recovery import STEPS, FakeCluster, Signal, drive, never, world  # noqa: F401

pytestmark = pytest.mark.unit


class Together(FakeCluster):
    """An update and the generation beside it each wait until the other has begun."""

    def __init__(self, fail: Any) -> None:
        super().__init__(fail)
        self.meeting = threading.Barrier(2)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._meet(threading.current_thread() is not threading.main_thread())
        return super().generate(*args, **kwargs)

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        self._meet(step < STEPS - 1)
        return super().update(batch, step)

    def _meet(self, expected: bool) -> None:
        if expected:
            self.meeting.wait(timeout=200)  # breaks, and the test with it, if the other does not come


@pytest.fixture(scope="module")
def straight(world: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:  # noqa: F811
    return drive(world, tmp_path_factory.mktemp("lag") / "run", never, lag=1)


def test_the_next_batch_is_generated_beside_the_update(world: Any, tmp_path: Path) -> None:  # noqa: F811
    made: list[Together] = []

    class Kept(Together):
        def __init__(self, fail: Any) -> None:
            super().__init__(fail)
            made.append(self)

    records = drive(world, tmp_path / "run", never, cluster_type=Kept, lag=1, val_every=0)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    # The first two batches are of the base model, then each of the weights before the update beside it.
    assert made[0].versions == [0, 0, 1, 2, 3, 4]
    assert [r["rollout/policy_lag"] for r in records] == [0, 1, 1, 1, 1, 1]


def test_another_course_than_without_lag(world: Any, straight: Any, tmp_path: Path) -> None:  # noqa: F811
    same = drive(world, tmp_path / "run", never)
    assert [r["step"] for r in straight] == [r["step"] for r in same]
    assert straight[1]["policy/kl_update"] == same[1]["policy/kl_update"]  # of the base model both
    assert straight[-1]["policy/kl_update"] != same[-1]["policy/kl_update"]


CALLS = {"generate": 10, "update": 6, "sync_weights": 7, "begin_save": 3, "finish_save": 3}


@pytest.mark.parametrize(("verb", "count"), [(v, k) for v, n in CALLS.items() for k in range(1, n + 1)])
def test_ranks_that_are_lost_at_any_moment_change_nothing(
    world: Any,  # noqa: F811
    straight: list[dict[str, Any]],
    tmp_path: Path,
    verb: str,
    count: int,
) -> None:
    """The batch that was under way is generated again, or comes from the checkpoint."""
    lost = []

    def fail(v: str, k: int) -> None:
        if (v, k) == (verb, count):
            lost.append(v)
            raise WorkersLostError("actor rank 1: died")

    assert drive(world, tmp_path / "run", fail, lag=1) == straight
    assert lost


@pytest.mark.parametrize("count", range(1, CALLS["generate"] + 1))
def test_a_stop_finishes_the_batch_that_is_under_way_and_resumes_alike(
    world: Any,  # noqa: F811
    straight: list[dict[str, Any]],
    tmp_path: Path,
    count: int,
) -> None:
    stop = Signal()

    def fail(v: str, k: int) -> None:
        if (v, k) == ("generate", count):
            stop.requested = True
            raise StopRequestedError

    before = drive(world, tmp_path / "run", fail, stop, lag=1)
    assert before == straight[: len(before)] and len(before) < len(straight)
    assert drive(world, tmp_path / "run", never, lag=1) == straight


@pytest.mark.parametrize("count", [2, 4])
def test_a_stop_that_takes_the_engines_with_it_leaves_a_checkpoint(
    world: Any,  # noqa: F811
    tmp_path: Path,
    count: int,
) -> None:
    """As where a machine is given back: the batch under way is lost, the step beside it is not."""
    stop = Signal()

    class Preempted(FakeCluster):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            if self.calls.get("generate", 0) == count:
                stop.requested = True
                raise StopRequestedError
            return super().generate(*args, **kwargs)

    options: dict[str, Any] = {"lag": 1, "val_every": 0}
    before = drive(world, tmp_path / "run", never, stop, cluster_type=Preempted, **options)
    assert [r["step"] for r in before] == list(range(1, count + 1))
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{count:06d}"
    records = drive(world, tmp_path / "run", never, **options)
    assert records[:count] == before and [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["rollout/policy_lag"] for r in records] == [0] + [float(k != count) for k in range(1, STEPS)]
    assert [r["epoch"] for r in records] == sorted({r["epoch"] for r in records})  # nothing drawn is left out


def test_the_batch_that_waits_is_in_the_checkpoint(world: Any, tmp_path: Path) -> None:  # noqa: F811
    from mssr.runs.checkpoint import read_state
    from mssr.trainer.collect import Collected

    drive(world, tmp_path / "run", never, lag=1)
    waiting = read_state(tmp_path / "run/checkpoints/step-000004")["pipeline"]["waiting"]
    collected = Collected.from_state(waiting)
    assert [r.policy_version for r in collected.rollouts] == [3] * 6
    assert collected.scores.shape == (6,) and collected.metrics["rollout/policy_lag"] == 1
    assert all(r.log_probs.dtype == np.float32 and len(r.response_token_ids) == 8 for r in collected.rollouts)
    # After the last step nothing is generated that nobody would train on.
    assert read_state(tmp_path / "run/checkpoints/step-000006")["pipeline"]["waiting"] is None


def test_older_weights_are_corrected_for_unless_told_otherwise(workspace: Workspace) -> None:
    config: Config = load_config(workspace.config, ["rollout.lag=1", "cluster.launcher=ray"])
    assert config.correction_options["weight"] == "token"
    none = replace(config.algorithm.correction, weight="none")
    with pytest.raises(UserError, match=r"rollout.lag=1 .* algorithm.correction.weight=none"):
        validate(replace(config, algorithm=replace(config.algorithm, correction=none)))
    masked = replace(none, mask="token")
    validate(replace(config, algorithm=replace(config.algorithm, correction=masked)))
    assert load_config(workspace.config).correction_options["weight"] == "none"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["rollout.lag=2", "cluster.launcher=ray"], "rollout.lag=2 must be 0 or 1"),
        (["rollout.lag=1", "cluster.launcher=local"], "rollout.lag=1 .* needs cluster.launcher=ray"),
        (
            ["actor.score_early=always", "cluster.launcher=local"],
            "score_early=always .* cluster.launcher=ray",
        ),
        (["actor.score_early=always", "rollout.lag=1", "cluster.launcher=ray"], "score_early=always with"),
        (
            ["actor.score_early=always", "algorithm.kl.coef=0", "actor.updates_per_step=1"],
            "score_early=always has nothing to score",
        ),
    ],
)
def test_what_cannot_overlap_is_refused(workspace: Workspace, overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(workspace.config, overrides)
