"""How far the policy has moved on each prompt: its previous response scored again.

Source: SPO, arXiv 2509.13232.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mssr.errors import check_version

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
_STATE_VERSION = 1


class LastVisits:
    """How far the policy has moved on a prompt since it last trained on it (SPO, arXiv 2509.13232).

    Every prompt's most recent response is kept, 8 bytes a token, with its log-probs as the trainer has them
    before the update that trains on it, and at the next visit once more. Without a lag that is
    the policy that answered. With ``rollout.lag=1`` it is one step newer, at both visits, so that the time
    between the two is the same; the engine's own log-probs, of the policy that answered, would add the
    rounding of another implementation to every drift.
    """

    def __init__(self) -> None:
        self._visits: dict[str, tuple[Ints, Floats]] = {}

    def previous(self, prompt_ids: Sequence[str]) -> dict[int, tuple[Ints, Floats]]:
        """Index of each response whose prompt was visited before -> (T,) tokens and (T,) log-probs of then.

        Of several responses to one prompt only the first is listed: the others follow it at once.
        """
        firsts = _firsts(prompt_ids)
        return {i: self._visits[prompt_id] for prompt_id, i in firsts.items() if prompt_id in self._visits}

    def drift(
        self, prompt_ids: Sequence[str], now: Mapping[int, Floats], measure: Literal["k3", "abs"]
    ) -> npt.NDArray[np.float64]:
        """Token mean, for each response, of the change of its prompt's previous response.

        Args:
            now: for each index of `previous`, (T,) log-probs of that response under the policy of now.
            measure: k3, an estimate of KL(policy then || policy now), or abs, the change of a log-prob.

        Returns:
            (B,) float64: NaN at a prompt's first visit, 0 at its second response within a step.
        """
        result = np.zeros(len(prompt_ids))
        for prompt_id, i in _firsts(prompt_ids).items():
            if i not in now:
                result[i] = np.nan
            elif len(now[i]):
                then = self._visits[prompt_id][1]
                change = np.clip(now[i].astype(np.float64) - then, -20.0, 20.0)
                per_token = np.expm1(change) - change if measure == "k3" else np.abs(change)
                result[i] = per_token.mean()
        return result

    def remember(
        self, prompt_ids: Sequence[str], tokens: Sequence[Ints], log_probs: Sequence[Floats]
    ) -> None:
        """Replace what is kept of these prompts; ``log_probs`` are of the policy before the update."""
        for prompt_id, response, values in zip(prompt_ids, tokens, log_probs, strict=True):
            # Copies: what is there is part of larger arrays, which would stay as long.
            self._visits[prompt_id] = (response.copy(), values.copy())

    def state_dict(self) -> dict[str, Any]:
        tokens, log_probs = zip(*self._visits.values(), strict=True) if self._visits else ((), ())
        return {
            "version": _STATE_VERSION,
            "ids": list(self._visits),
            "lengths": np.array([len(t) for t in tokens], np.int64),
            "tokens": np.concatenate([np.empty(0, np.int32), *tokens]),
            "log_probs": np.concatenate([np.empty(0, np.float32), *log_probs]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything.

        Raises:
            ValueError: the state has another version.
        """
        check_version(state, _STATE_VERSION, "last-visit")
        ends = np.cumsum(state["lengths"])[:-1]
        tokens, log_probs = np.split(state["tokens"], ends), np.split(state["log_probs"], ends)
        self._visits = {i: (t, v) for i, t, v in zip(state["ids"], tokens, log_probs, strict=False)}


def _firsts(prompt_ids: Sequence[str]) -> dict[str, int]:
    """Prompt -> index of the first response to it, in their order."""
    firsts: dict[str, int] = {}
    for i, prompt_id in enumerate(prompt_ids):
        firsts.setdefault(prompt_id, i)
    return firsts
