"""A training from the first look at its data to its report; it outlives its workers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TextIO

from mssr.cluster import machine
from mssr.cluster.base import Cluster
from mssr.cluster.launch import launch
from mssr.config import Config
from mssr.config.secrets import redact
from mssr.errors import EXIT_OK, StopRequestedError, WorkersLostError
from mssr.models.files import replace_text
from mssr.models.loading import resolve_device
from mssr.rewards import Scorer
from mssr.runs.checkpoint import CheckpointStore, read_state
from mssr.runs.config import advice
from mssr.runs.console import Console
from mssr.runs.events import EventLog
from mssr.runs.loggers import MetricsLog, discard_after
from mssr.runs.plot import plot, write_report
from mssr.runs.run_directory import MACHINE, check_checkpoint
from mssr.runs.signals import StopRequest
from mssr.trainer.data import RunData, load_data
from mssr.trainer.fit import shortages
from mssr.trainer.loop import Run, Trainer
from mssr.trainer.validation import describe


def run_session(config: Config, terminal: TextIO) -> int:
    """Checks that need no worker, then the workers, then the loop; returns the exit code.

    Args:
        terminal: where the user reads; what else is printed goes to a log.

    Raises:
        UserError: the input is wrong; before any worker starts wherever that can be known.
    """
    data = load_data(config)
    config = data.config
    with contextlib.ExitStack() as stack:
        console = Console(terminal, config.trainer.progress, config.trainer.steps)
        stack.callback(console.close)
        events = EventLog(config.run_dir, console.announce, config.trainer.max_restarts)
        _introduce(data, console)
        store = CheckpointStore(config.run_dir, config.trainer.keep_checkpoints)
        checkpoint = store.find(config.trainer.resume, partial(events.record, "damaged_checkpoint"))
        if checkpoint and not _goes_on(config, checkpoint, console):
            return EXIT_OK
        # Its processes load the reward while the cluster starts.
        scorer = stack.enter_context(
            Scorer(
                config.reward,
                config.rollout.max_response_length,
                clip=config.method.bounded_rewards,
                rows=data.access,
                on_restart=lambda how: events.restart("reward_pool_died", how),
                on_failure=lambda what: events.record("reward_failed", what),
                directory=config.run_dir,
            )
        )
        log = MetricsLog(config, step_of(checkpoint))
        stack.callback(log.close)
        stop = stack.enter_context(StopRequest(console.note))
        here = machine.describe()
        replace_text(config.run_dir / MACHINE, json.dumps(redact(asdict(here))))
        for line in shortages(config, resolve_device(config.cluster.device), here):
            console.announce(f"note: likely not to fit: {line} (mssr plan has the arithmetic)")
        run = Run(config, store, log, events, console, stop)
        console.note(f"starting {config.actor.num_ranks} actor ranks, {config.rollout.workers} engines")
        run_with_recovery(
            run,
            checkpoint,
            lambda: launch(config, events, lambda: stop.requested, console.note),
            lambda cluster: Trainer(run, data.train.dataset, data.val, scorer, cluster),
        )
    if log.written and console.quiet:
        write_report(config.run_dir)
    elif log.written:
        plot(config.run_dir, terminal)
    return stop.exit_code or EXIT_OK


def _introduce(data: RunData, console: Console) -> None:
    family = data.encoder.processor.family
    if family.experimental:
        console.announce(f"note: {family.model_type} models are experimental: {family.experimental}")
    for line in data.notes:
        console.announce(f"note: {line}")
    for line in [*advice(data.config), *data.item_notes]:
        console.note(f"note: {line}")
    console.note(f"train: {data.train.summary()}; val: {describe(data.val)}")


def _goes_on(config: Config, checkpoint: Path, console: Console) -> bool:
    """Whether there is something to do after a checkpoint.

    Raises:
        UserError: its state would mean something else under this config.
    """
    for line in check_checkpoint(config, checkpoint):
        console.note(line)
    step, steps = step_of(checkpoint) or 0, config.trainer.steps
    if step >= steps:
        console.announce(f"nothing to do: {checkpoint} is of step {step}, and trainer.steps={steps}")
        return False
    console.note(f"resuming from {checkpoint}")
    return True


def run_with_recovery(
    run: Run,
    checkpoint: Path | None,
    launch: Callable[[], Cluster],
    make_trainer: Callable[[Cluster], Trainer],
) -> None:
    """Run to the end, or until a stop is requested.

    When actor ranks are lost, and the policy with them, they are started anew, and everything goes back
    to the last checkpoint (or to the base model): metrics of the steps after it are set aside, and the
    same steps are computed again. How often, `EventLog.restart` decides.

    Args:
        checkpoint: where to begin; None at the base model.
    """
    cluster: Cluster | None = None
    try:
        while True:
            try:
                if cluster is None:
                    cluster = launch()
                    run.stop.install()  # Ray has signal handlers of its own
                else:
                    cluster.restart()
                trainer = make_trainer(cluster)
                if checkpoint is not None:
                    trainer.resume(checkpoint)
                trainer.run()
                return
            except WorkersLostError:
                run.store.clean()
                if run.store.saved:
                    checkpoint = run.store.find("auto", partial(run.events.record, "damaged_checkpoint"))
                last = step_of(checkpoint)
                discard_after(run.log.path, last)
                run.events.step = last or 0
            except StopRequestedError:
                return  # while workers started: nothing has changed since the last checkpoint
    finally:
        if cluster is not None:
            cluster.shutdown()


def step_of(checkpoint: Path | None) -> int | None:
    """The last step that stands; None for the base model."""
    if checkpoint is None:
        return None
    state = read_state(checkpoint)
    # A step that was stopped in its validation has no record yet.
    step: int = state["step"] - (state["unlogged"] is not None)
    return step
