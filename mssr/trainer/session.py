"""A training from the first look at its data to its report."""

from __future__ import annotations

import contextlib
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
from mssr.runs.run_directory import check_checkpoint
from mssr.runs.signals import StopRequest
from mssr.trainer.data import load_data, resolve_steps
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
    run_dir = config.run_dir
    data = load_data(config)
    config = resolve_steps(config, data.train)
    with contextlib.ExitStack() as stack:
        console = Console(terminal, config.trainer.progress, config.trainer.steps)
        stack.callback(console.close)
        events = EventLog(run_dir, console.announce, config.trainer.max_restarts)
        for line in data.notes:
            console.announce(f"note: {line}")
        for line in [*advice(config), *data.item_notes]:
            console.note(f"note: {line}")
        console.note(f"train: {data.train.summary()}; val: {describe(data.val)}")
        store = CheckpointStore(run_dir, config.trainer.keep_checkpoints)
        checkpoint = store.find(config.trainer.resume, lambda line: events.record("damaged_checkpoint", line))
        if checkpoint:
            for line in check_checkpoint(config, checkpoint):
                console.note(line)
            step, steps = step_of(checkpoint) or 0, config.trainer.steps
            if step >= steps:
                console.announce(f"nothing to do: {checkpoint} is of step {step}, and trainer.steps={steps}")
                return EXIT_OK
            console.note(f"resuming from {checkpoint}")
        # Its processes load the reward while the cluster starts.
        max_length, clip = config.rollout.max_response_length, config.method.bounded_rewards
        scorer = Scorer(
            config.reward,
            max_length,
            clip=clip,
            rows=data.rows(config.model),
            on_restart=lambda how: events.restart("reward_pool_died", how),
            on_failure=lambda what: events.record("reward_failed", what),
        )
        stack.enter_context(scorer)
        log = MetricsLog(config, step_of(checkpoint))
        stack.callback(log.close)
        stop = stack.enter_context(StopRequest(console.note))
        console.note(f"starting {config.actor.num_ranks} actor ranks, {config.rollout.workers} engines")
        run_with_recovery(
            lambda: launch(config, events.restart, lambda: stop.requested),
            lambda cluster: Trainer(
                config,
                data.train.dataset,
                data.val,
                scorer,
                cluster,
                store,
                log,
                events,
                console,
            ),
            checkpoint,
            store,
            log,
            events,
            stop,
        )
    if log.written:
        if console.quiet:
            write_report(run_dir)
        else:
            plot(run_dir, terminal)
    return stop.exit_code or EXIT_OK
