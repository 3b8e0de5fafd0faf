"""A run that outlives its workers: trainers one after the other, each from the last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mssr.cluster.base import Cluster
from mssr.errors import StopRequestedError, WorkersLostError
from mssr.runs.checkpoint import CheckpointStore, read_state
from mssr.runs.events import EventLog
from mssr.runs.loggers import MetricsLog
from mssr.runs.signals import StopRequest
from mssr.trainer.loop import Trainer


def run_with_recovery(
    launch: Callable[[], Cluster],
    make_trainer: Callable[[Cluster], Trainer],
    checkpoint: Path | None,
    store: CheckpointStore,
    log: MetricsLog,
    events: EventLog,
    stop: StopRequest,
) -> None:
    """Run to the end, or until a stop is requested.

    When actor ranks are lost, and the policy with them, they are started anew, and everything goes back
    to the last checkpoint (or to the base model): metrics of the steps after it are set aside, and the
    same steps are computed again. How often, `EventLog.restart` decides.

    Args:
        checkpoint: where to begin; None at the base model.
    """
    cluster: Cluster | None = None
    lost = False
    try:
        while True:
            try:
                if cluster is None:
                    cluster = launch()
                    stop.install()  # Ray has signal handlers of its own
                elif lost:
                    cluster.restart()
                lost = False
                trainer = make_trainer(cluster)
                if checkpoint is not None:
                    trainer.resume(checkpoint)
                trainer.run(stop)
                return
            except WorkersLostError:
                lost = True
                store.clean()
                if store.saved:
                    checkpoint = store.find("auto", lambda line: events.record("damaged_checkpoint", line))
                log.rewind(step_of(checkpoint))
                events.step = step_of(checkpoint) or 0
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
