"""A run that outlives its workers: trainers one after the other, each from the last checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mssr.cluster.base import Cluster
from mssr.errors import StopRequestedError, WorkersLostError
from mssr.runs.checkpoint import read_state
from mssr.runs.loggers import discard_after
from mssr.runs.run import Run
from mssr.trainer.loop import Trainer


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
    lost = False
    try:
        while True:
            try:
                if cluster is None:
                    cluster = launch()
                    run.stop.install()  # Ray has signal handlers of its own
                elif lost:
                    cluster.restart()
                lost = False
                trainer = make_trainer(cluster)
                if checkpoint is not None:
                    trainer.resume(checkpoint)
                trainer.run()
                return
            except WorkersLostError:
                lost = True
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
