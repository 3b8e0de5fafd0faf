"""What the user sees of an evaluation while it runs."""

from __future__ import annotations

from typing import TextIO

from rich.progress import TimeRemainingColumn

from mssr.runs.console import ProgressLine


class EvaluationProgress(ProgressLine):
    """Responses so far, of ``total`` in the whole evaluation, and the accuracy of those."""

    def __init__(self, stream: TextIO, mode: str, total: int) -> None:
        super().__init__(stream, mode, total, "{}/{} responses", TimeRemainingColumn())

    def update(self, done: int, accuracies: dict[str, float], overall: float | None) -> None:
        """Show how far it is.

        Args:
            accuracies: of the responses so far, by benchmark.
            overall: of all responses so far; None before the first.
        """
        parts = [] if overall is None else [f"accuracy so far {overall:.3f}"]
        if len(accuracies) > 1:
            parts.append(" ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
        self.show(done, "  ".join(parts))
