"""The driver against a cluster that fails on request: what was lost is computed again, alike."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mssr.cluster.base import OnFinished
from mssr.config import Config
from mssr.data.encoder import PromptEncoder
from mssr.data.loading import load_prompts
from mssr.errors import StopRequestedError, TrainingError, UserError, WorkersLostError
from mssr.models.files import sha256
from mssr.models.loading import load_processor
from mssr.rewards import Scorer
from mssr.runs.checkpoint import CheckpointStore
from mssr.runs.config import load_config
from mssr.runs.console import Console
from mssr.runs.events import EventLog
from mssr.runs.loggers import MetricsLog
from mssr.runs.run_directory import check_checkpoint
from mssr.runs.signals import StopRequest
from mssr.trainer.loop import Run, Trainer
from mssr.trainer.session import run_with_recovery, step_of
from mssr.trainer.validation import load_validation
from mssr.types import Rollout, RolloutRequest, SamplingParams, TrainBatch
from tests.chaos.run import comparable
from tests.conftest import Workspace

pytestmark = pytest.mark.unit
STEPS = 6


class FakeCluster:
    """A policy that is one number. ``fail`` is asked before each verb and may raise."""

    entropy = 1.0
    skipped = 0.0
    ranks_idle_in_rollout = False

    def __init__(self, fail: Callable[[str, int], None]) -> None:
        self.fail = fail
        self.calls: dict[str, int] = {}
        self.version = 0
        self.versions: list[int] = []
        """Of the engine's weights, at every call of `generate`."""
        self.restart()
        self.engine_weight = 0.0

    def _called(self, verb: str) -> None:
        self.calls[verb] = self.calls.get(verb, 0) + 1
        self.fail(verb, self.calls[verb])

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        params: SamplingParams,
        on_finished: OnFinished | None = None,
        stoppable: bool = True,
    ) -> list[Rollout]:
        self.versions.append(self.version)
        try:
            self._called("generate")
        except StopRequestedError:
            if stoppable:
                raise
        rollouts = [self._rollout(r) for r in requests]
        for index, rollout in enumerate(rollouts):
            if on_finished is not None:
                on_finished(index, rollout)
        return rollouts

    def _rollout(self, request: RolloutRequest) -> Rollout:
        key = f"{request.prompt_id} {request.seed} {self.engine_weight!r}"
        tokens = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], np.uint8).astype(np.int32)
        text = " ".join(map(str, tokens))
        log_probs = -tokens.astype(np.float32) / 256
        prompt = np.arange(3, dtype=np.int32)
        return Rollout(
            request.prompt_id, request.sample_index, prompt, tokens, log_probs, "stop", self.version, text
        )

    def update(self, batch: TrainBatch, step: int) -> dict[str, float]:
        self._called("update")
        # The optimizer's moment is part of the state too.
        self.moment = 0.9 * self.moment + float(batch.advantages @ np.arange(len(batch.advantages)))
        self.weight += self.moment
        drift = 0.01 + abs(self.weight) % 0.01
        return {
            "policy/kl_update": drift,
            "policy/kl_ref": 0.0,
            "policy/entropy": self.entropy,
            "policy/skipped_updates": self.skipped,
        }

    def prepare(self, prompt_ids: Sequence[str]) -> None:
        pass

    def log_probs(self, batch: TrainBatch, reference: bool = False) -> Any:
        raise AssertionError("nobody asked for them")

    def sync_weights(self, version: int) -> None:
        self._called("sync_weights")
        self.engine_weight, self.version = self.weight, version

    def begin_save(self, directory: str) -> FakeSave:
        self._called("begin_save")
        Path(directory).mkdir()
        (Path(directory) / "weights").write_text(json.dumps([self.weight, self.moment]))
        return FakeSave(Path(directory), lambda: self._called("finish_save"))

    def load(self, directory: str) -> None:
        self._called("load")
        self.weight, self.moment = json.loads((Path(directory) / "weights").read_text())

    def restart(self) -> None:
        self.weight, self.moment = 0.0, 0.0

    def metrics(self) -> dict[str, float]:
        return {}

    def shutdown(self) -> None:
        pass


class FakeSave:
    def __init__(self, directory: Path, finish: Callable[[], None]) -> None:
        self.directory, self.finish = directory, finish

    def done(self) -> bool:
        return True

    def result(self) -> dict[str, str]:
        self.finish()
        return {p.name: sha256(p) for p in self.directory.iterdir()}


class Signal:
    """Stands for `StopRequest` where no signal is sent."""

    requested = False

    def install(self) -> None:
        pass


@pytest.fixture(scope="module")
def world(workspace: Workspace) -> Any:
    overrides = [f"trainer.steps={STEPS}", "trainer.save_every=2", "trainer.val_every=2"]
    config = load_config(workspace.config, [*overrides, "rollout.rollouts_per_step=6"])
    encoder = PromptEncoder(load_processor(config.model), config.data)
    train = load_prompts(config.data.train, config.data, encoder, workspace.path / "bad.jsonl").dataset
    val = load_validation(config, encoder, workspace.path / "bad.jsonl")
    with Scorer(config.reward, config.rollout.max_response_length, clip=True) as scorer:
        yield config, train, val, scorer


def drive(
    world: Any,
    run_dir: Path,
    fail: Callable[[str, int], None],
    stop: Any = None,
    cluster_type: type[FakeCluster] = FakeCluster,
    lag: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """A run from wherever the directory stands; returns its metrics."""
    config: Config = world[0]
    config = replace(config, rollout=replace(config.rollout, lag=lag))
    config = replace(config, trainer=replace(config.trainer, run_dir=str(run_dir), **options))
    for part in ("samples", "checkpoints"):
        (run_dir / part).mkdir(parents=True, exist_ok=True)
    console = Console(io.StringIO(), "plain", STEPS)
    events = EventLog(run_dir, console.announce, config.trainer.max_restarts)
    store = CheckpointStore(run_dir, keep=2)
    checkpoint = store.find("auto", print)
    log = MetricsLog(config, step_of(checkpoint))
    cluster = cluster_type(fail)

    run = Run(config, store, log, events, console, stop or Signal())  # type: ignore[arg-type]
    try:
        run_with_recovery(run, checkpoint, lambda: cluster, lambda c: Trainer(run, *world[1:], c))  # type: ignore[arg-type,return-value]
    finally:
        log.close()
    return comparable([json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()])


def never(verb: str, count: int) -> None:
    pass


@pytest.fixture(scope="module")
def straight(world: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    records = drive(world, tmp_path_factory.mktemp("straight") / "run", never)
    assert [r["step"] for r in records] == list(range(STEPS + 1))
    assert len({r["policy/kl_update"] for r in records[1:]}) == STEPS  # the steps differ
    return records


CALLS = {"generate": 10, "update": 6, "sync_weights": 7, "begin_save": 3, "finish_save": 3}


@pytest.mark.parametrize(("verb", "count"), [(v, k) for v, n in CALLS.items() for k in range(1, n + 1)])
def test_ranks_that_are_lost_at_any_moment_change_nothing(
    world: Any, straight: list[dict[str, Any]], tmp_path: Path, verb: str, count: int
) -> None:
    lost = []

    def fail(v: str, k: int) -> None:
        if (v, k) == (verb, count):
            lost.append(v)
            raise WorkersLostError("actor rank 1: died")

    assert drive(world, tmp_path / "run", fail) == straight
    assert lost


@pytest.mark.parametrize("count", range(1, CALLS["generate"] + 1))
def test_a_stop_during_generation_gives_it_up_and_resumes_alike(
    world: Any, straight: list[dict[str, Any]], tmp_path: Path, count: int
) -> None:
    """Also in a validation: the step's update is done, and its record is written after the resume."""
    stop = Signal()

    def fail(v: str, k: int) -> None:
        if (v, k) == ("generate", count):
            stop.requested = True
            raise StopRequestedError

    before = drive(world, tmp_path / "run", fail, stop)
    assert before == straight[: len(before)] and len(before) < len(straight)
    steps = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("step-*"))
    in_validation = count in (4, 7, 10)
    done = len(before) - 1 + in_validation
    assert (steps[-1] if steps else None) == (f"step-{done:06d}" if done > 0 else None)
    assert drive(world, tmp_path / "run", never) == straight


@pytest.mark.parametrize("count", range(1, CALLS["sync_weights"] + 1))
def test_a_stop_while_weights_are_sent_resumes_alike(
    world: Any, straight: list[dict[str, Any]], tmp_path: Path, count: int
) -> None:
    """As where an engine has to be replaced for it: the step's update is done, its record is not written."""
    stop = Signal()

    def fail(v: str, k: int) -> None:
        if (v, k) == ("sync_weights", count):
            stop.requested = True
            raise StopRequestedError

    before = drive(world, tmp_path / "run", fail, stop)
    assert before == straight[: len(before)] and len(before) < len(straight)
    assert drive(world, tmp_path / "run", never) == straight


@pytest.mark.parametrize("verb", ["begin_save", "finish_save"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    world: Any, straight: list[dict[str, Any]], tmp_path: Path, verb: str
) -> None:
    def fail(v: str, k: int) -> None:
        if (v, k) == (verb, 2):
            raise OSError(28, "No space left on device")

    assert drive(world, tmp_path / "run", fail) == straight
    [event] = [json.loads(x) for x in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert event["event"] == "checkpoint_failed" and "No space left" in event["detail"]
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("*"))
    assert [n for n in names if n.startswith("step")] == ["step-000002", "step-000006"]


def test_the_last_checkpoint_must_succeed(world: Any, tmp_path: Path) -> None:
    def fail(v: str, k: int) -> None:
        if (v, k) == ("finish_save", 3):
            raise OSError(28, "No space left on device")

    with pytest.raises(TrainingError, match="last checkpoint could not be written"):
        drive(world, tmp_path / "run", fail)


class Collapsing(FakeCluster):
    entropy = 1e-3
    skipped = 1.0


@pytest.mark.parametrize("lag", [0, 1])
def test_engines_prepare_what_they_get_next(world: Any, tmp_path: Path, lag: int) -> None:
    """While the ranks train; with a lag, where engines are not idle then, nothing."""
    asked: list[list[str]] = []
    prepared: list[list[str]] = []

    class Preparing(FakeCluster):
        def generate(self, requests: Sequence[RolloutRequest], params: Any, *args: Any, **kwargs: Any) -> Any:
            asked.append([r.prompt_id for r in requests])
            return super().generate(requests, params, *args, **kwargs)

        def prepare(self, prompt_ids: Sequence[str]) -> None:
            prepared.append(list(prompt_ids))

    drive(world, tmp_path / "run", never, cluster_type=Preparing, lag=lag, val_every=0)
    assert len(asked) == STEPS
    if lag:
        assert prepared == []
    else:  # requests go long first; nothing follows the last step
        assert [sorted(ids) for ids in prepared] == [sorted(ids) for ids in asked[1:]]


def test_a_collapse_is_told_and_stops_the_run_where_asked(world: Any, tmp_path: Path) -> None:
    records = drive(world, tmp_path / "warned", never, cluster_type=Collapsing)
    assert [r["watch/entropy_collapsed"] for r in records[1:]] == [0, 0, 0, 0, 1, 1]
    events = [json.loads(x) for x in (tmp_path / "warned/events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("collapse") == 1
    assert [e["step"] for e in events if e["event"] == "updates_skipped"] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(TrainingError, match="has collapsed"):
        drive(world, tmp_path / "stopped", never, cluster_type=Collapsing, stop_on_collapse=True)
    assert (tmp_path / "stopped/checkpoints/latest").read_text() == "step-000005"
    # What it knows outlives a resume: the warning does not come again.
    again = drive(world, tmp_path / "stopped", never, cluster_type=Collapsing)
    assert again == records
    events = [json.loads(x) for x in (tmp_path / "stopped/events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events].count("collapse") == 1


def test_a_checkpoint_of_another_run_is_refused_where_its_state_would_mean_something_else(
    world: Any, tmp_path: Path
) -> None:
    drive(world, tmp_path / "run", never)
    config: Config = world[0]
    checkpoint = tmp_path / "run/checkpoints/step-000006"
    assert check_checkpoint(config, checkpoint) == ()
    faster = replace(config, actor=replace(config.actor, lr=0.5))
    assert check_checkpoint(faster, checkpoint) == (
        "changed since the state was saved: actor.lr: 0.001 -> 0.5",
    )
    other = replace(config, seed=7)
    with pytest.raises(UserError, match=r"seed: 0 -> 7.*resume_force"):
        check_checkpoint(other, checkpoint)
    forced = replace(other, trainer=replace(other.trainer, resume_force=True))
    assert len(check_checkpoint(forced, checkpoint)) == 1


def test_a_wandb_run_goes_on_as_the_same_run(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    logged: list[int] = []

    def init(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(
            id=options["id"] or "abc123", log=lambda _, step: logged.append(step), finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))  # type: ignore[arg-type]
    stop = Signal()

    def stop_at_fifth(verb: str, count: int) -> None:
        if (verb, count) == ("generate", 5):
            stop.requested = True
            raise StopRequestedError

    drive(world, tmp_path / "run", stop_at_fifth, stop, loggers=["wandb"])
    drive(world, tmp_path / "run", never, loggers=["wandb"])
    assert [s["id"] for s in started] == [None, "abc123"]
    assert all(s["resume"] == "allow" for s in started)
    assert logged == list(range(STEPS + 1))


def test_a_stop_request_survives_a_library_that_takes_the_signal() -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(told.append) as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.exit_code == 143 and told
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not() -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), StopRequest(told.append) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code == 143
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(100)  # it is interrupted
    assert "Ctrl-C again stops at once" in told[0]
