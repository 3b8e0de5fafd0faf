"""What the user sees: a live line on a terminal, else little; library noise goes to a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from mssr.config.secrets import redact


@contextmanager
def captured_output(log_file: Path) -> Iterator[TextIO]:
    """Send all output of this process and its libraries to a file; yields the real standard output.

    File descriptors are swapped, not Python objects, so that C++ code and child processes are caught.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with log_file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    real = os.fdopen(os.dup(saved[0]), "w", buffering=1)
    try:
        yield real
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        real.close()
        for fd, original in zip((1, 2), saved, strict=True):
            os.dup2(original, fd)
            os.close(original)


class ProgressLine:
    """How far a command is, and what it has to say on the way.

    Args:
        mode: trainer.progress: auto, live, plain or off.
        count: how many of the total are done, ``"step {}/{}"``.
        columns: of the live line, behind the rest.
    """

    def __init__(self, stream: TextIO, mode: str, total: int, count: str, *columns: ProgressColumn) -> None:
        if mode == "auto":
            mode = "live" if stream.isatty() else "off"
        self._mode, self._stream, self._total, self._count = mode, stream, total, count
        self._live: Progress | None = None
        if mode == "live":
            self._live = Progress(
                TextColumn(count.format("{task.completed:.0f}", "{task.total:.0f}")),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                *columns,
                console=RichConsole(file=stream, force_terminal=True),
                refresh_per_second=2,
            )
            self._task = self._live.add_task("", total=total, line="")
            self._live.start()

    @property
    def quiet(self) -> bool:
        return self._mode == "off"

    def note(self, text: str) -> None:
        """One line about what is going on; a secret in it is not shown."""
        if self._live is not None:
            self._live.console.print(redact(text), highlight=False, markup=False)
        elif not self.quiet:
            print(redact(text), file=self._stream, flush=True)

    def announce(self, text: str) -> None:
        """One line that is shown in every mode: something went wrong."""
        if self._live is not None:
            self.note(text)
        else:
            print(f"mssr: {redact(text)}", file=self._stream, flush=True)

    def show(self, done: int, line: str) -> None:
        """So much is done, and how it stands."""
        if self._live is not None:
            self._live.update(self._task, completed=done, line=line)
        elif self._mode == "plain":
            print(f"{self._count.format(done, self._total)}  {line}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


class Console(ProgressLine):
    """Progress of a training."""

    def __init__(self, stream: TextIO, mode: str, steps: int) -> None:
        super().__init__(stream, mode, steps, "step {}/{}")
        self._first = 0
        self._start: float | None = None
        self._val: float | None = None

    def begin(self, first_step: int) -> None:
        """The step after ``first_step`` starts: time left is counted from here."""
        self._first = first_step
        self._start = time.monotonic()
        if self._live is not None:
            self._live.reset(self._task, total=self._total, completed=self._first)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a finished step; the last validation accuracy stays in the line."""
        self._val = metrics.get("val/accuracy", self._val)
        assert self._start is not None
        left = (time.monotonic() - self._start) / (step - self._first) * (self._total - step)
        line = (
            f"acc {metrics['reward/accuracy']:.3f}"
            + ("" if self._val is None else f"  val {self._val:.3f}")
            + f"  entropy {metrics['policy/entropy']:.3f}  kl {metrics['policy/kl_update']:.4f}"
            + f"  {metrics['perf/rollouts_per_s']:.0f} rollouts/s"
            + _if_known(metrics, "perf/tokens_per_s_per_gpu", "{:.0f} tokens/s/GPU")
            + _if_known(metrics, "perf/mfu", "MFU {:.0%}")
            + f"  {_duration(left)} left"
        )
        self.show(step, line)


def _if_known(metrics: dict[str, Any], key: str, form: str) -> str:
    return "  " + form.format(metrics[key]) if key in metrics else ""


def _duration(seconds: float) -> str:
    """90 -> "1:30", 3723 -> "1:02:03"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
