"""What the user sees of an evaluation: a live line on a terminal, else little."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mssr.config.secrets import redact


class EvaluationProgress:
    """Responses so far, and the accuracy of those.

    Args:
        stream: where to write.
        mode: trainer.progress: auto, live, plain or off.
        total: responses of the whole evaluation.
    """

    def __init__(self, stream: TextIO, mode: str, total: int) -> None:
        if mode == "auto":
            mode = "live" if stream.isatty() else "off"
        self._mode, self._stream, self._total = mode, stream, total
        self._bar: Progress | None = None
        if mode == "live":
            self._bar = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f} responses"),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[line]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=RichConsole(file=stream, force_terminal=True),
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("", total=total, line="")
            self._bar.start()

    def note(self, text: str) -> None:
        """One line about what is going on; a secret in it is not shown."""
        self._line(redact(text), shown=self._mode != "off")

    def announce(self, text: str) -> None:
        """One line that is shown in every mode: something went wrong."""
        self._line(f"mssr: {redact(text)}", shown=True)

    def update(self, done: int, accuracies: dict[str, float], overall: float | None) -> None:
        """Show how far it is.

        Args:
            accuracies: of the responses so far, by benchmark.
            overall: of all responses so far; None before the first.
        """
        parts = [] if overall is None else [f"accuracy so far {overall:.3f}"]
        if len(accuracies) > 1:
            parts.append(" ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
        line = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, line=line)
        elif self._mode == "plain":
            print(f"{done}/{self._total} responses  {line}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, text: str, shown: bool) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif shown:
            print(text, file=self._stream, flush=True)
