"""What a run writes to, is shown on and is stopped by: handed to whoever does its work."""

from __future__ import annotations

from dataclasses import dataclass

from mssr.config import Config
from mssr.runs.checkpoint import CheckpointStore
from mssr.runs.console import Console
from mssr.runs.events import EventLog
from mssr.runs.loggers import MetricsLog
from mssr.runs.signals import StopRequest


@dataclass(frozen=True)
class Run:
    """One start of a training; its owner closes what is in it."""

    config: Config
    store: CheckpointStore
    log: MetricsLog
    events: EventLog
    console: Console
    stop: StopRequest
