"""The harness that injures runs is not to fail where a run would not."""

from __future__ import annotations

import errno
import random
from types import SimpleNamespace
from typing import Any

import pytest

from tests.chaos.injuries import disk_full

pytestmark = pytest.mark.unit


class FullDisk:
    """A path on a disk on which no file can even be opened."""

    def __truediv__(self, name: str) -> FullDisk:
        return self

    def open(self, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def unlink(self, missing_ok: bool) -> None:
        assert missing_ok


def test_a_disk_that_is_full_already_needs_no_ballast() -> None:
    """What the run itself has filled is full enough; a checkpoint has to fail all the same."""
    died, failed = {"event": "engine_died"}, {"event": "checkpoint_failed"}
    told = iter([[died], [died], [died, failed]])
    run: Any = SimpleNamespace(
        small_disk=True,
        run_dir=FullDisk(),
        events=lambda: next(told),
        process=SimpleNamespace(poll=lambda: None),
        expected_events=set(),
    )
    assert "until a checkpoint has failed" in disk_full(run, random.Random(0))
    assert next(told, None) is None and run.expected_events == {"checkpoint_failed"}
