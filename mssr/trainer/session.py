"""A training from the first look at its data to its report."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import TextIO

from mssr.cluster.launch import launch
from mssr.config import Config
from mssr.errors import EXIT_OK
from mssr.rewards import Scorer
from mssr.runs.checkpoint import CheckpointStore
from mssr.runs.config import advice
from mssr.runs.console import Console
from mssr.runs.events import EventLog
from mssr.runs.loggers import MetricsLog
from mssr.runs.plot import plot, write_report
from mssr.runs.run import Run
from mssr.runs.run_directory import check_checkpoint
from mssr.runs.signals import StopRequest
from mssr.trainer.data import RunData, load_data
from mssr.trainer.loop import Trainer
from mssr.trainer.recovery import run_with_recovery, step_of
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
            )
        )
        log = MetricsLog(config, step_of(checkpoint))
        stack.callback(log.close)
        stop = stack.enter_context(StopRequest(console.note))
        run = Run(config, store, log, events, console, stop)
        console.note(f"starting {config.actor.num_ranks} actor ranks, {config.rollout.workers} engines")
        run_with_recovery(
            run,
            checkpoint,
            lambda: launch(config, events.restart, lambda: stop.requested),
            lambda cluster: Trainer(run, data.train.dataset, data.val, scorer, cluster),
        )
    if log.written and console.quiet:
        write_report(config.run_dir)
    elif log.written:
        plot(config.run_dir, terminal)
    return stop.exit_code or EXIT_OK


def _introduce(data: RunData, console: Console) -> None:
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
