"""The errors that a user can cause, and the exit codes of the commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class UserError(ValueError):
    """The user's input is wrong: one sentence that names the key, file or row and says what to do.

    The commands print it as a single line on stderr and exit with ``EXIT_USER_ERROR``.
    """


class TrainingError(RuntimeError):
    """A run cannot go on although its input was right (a reward that always fails, NaN in a row)."""


class EngineError(TrainingError):
    """An engine failed and may be replaced; its requests can be generated again."""


class TransferInterruptedError(EngineError):
    """Weights did not arrive in full because somebody else failed: who waited for them is sound, and may be
    sent them again."""


class WorkersLostError(TrainingError):
    """Actor ranks are gone, and the policy with them: the run goes on from its last checkpoint."""


class StopRequestedError(Exception):
    """Work was abandoned because the user, or the cluster, wants the run to end."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``", did you mean 'entropy'?"`` for the nearest of the known words; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_version(state: Mapping[str, Any], expected: int, what: str) -> None:
    """Refuse a saved state of another form.

    Raises:
        ValueError: ``state["version"]`` is not the one expected.
    """
    if state.get("version") != expected:
        raise ValueError(f"{what} state has version {state.get('version')}, not {expected}")
