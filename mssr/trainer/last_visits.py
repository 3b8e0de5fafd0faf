"""What is remembered of each prompt's last visit: how long its responses were, and one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mssr.algorithms.id_table import IdTable
from mssr.errors import check_version
from mssr.types import Rollout

_STATE_VERSION = 1


class ResponseLengths:
    """The mean response length of every prompt; 24 bytes or so a prompt.

    A step ends with its last response, so those that are expected to take long are begun first (longest
    processing time first, R. L. Graham, 1969).
    """

    def __init__(self) -> None:
        self._table = IdTable()
        self._lengths = np.empty(0, np.float32)

    def expected(self, prompt_ids: Sequence[str]) -> np.ndarray:
        """(B,) float32 tokens; of a prompt that is new the mean of all others, 0 if there is none."""
        rows = self._table.find(self._table.keys(prompt_ids))
        known = rows >= 0
        result = np.zeros(len(rows), np.float32)
        result[known] = self._lengths[rows[known]]
        if len(self._lengths):
            result[~known] = self._lengths.mean()
        return result

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Remember the mean length of each prompt's responses, in place of what was known."""
        rows = self._table.insert(self._table.keys([r.prompt_id for r in rollouts]))
        new = len(self._table) - len(self._lengths)
        self._lengths = np.concatenate([self._lengths, np.zeros(new, np.float32)])
        lengths = np.array([len(r.response_token_ids) for r in rollouts], np.float64)
        seen, places = np.unique(rows, return_inverse=True)
        self._lengths[seen] = np.bincount(places, lengths) / np.bincount(places)

    def state_dict(self) -> dict[str, Any]:
        return {"keys": self._table.all_keys, "lengths": self._lengths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything."""
        self._table = IdTable.from_keys(state["keys"])
        self._lengths = state["lengths"].copy()


class LastVisits:
    """How far the policy has moved on a prompt since it last trained on it (SPO, arXiv 2509.13232).

    Every prompt's most recent response is kept, 8 bytes a token, with its log-probs as the ranks have them
    at the beginning of the step that trains on it, and at the next visit once more. Without a lag that is
    the policy that answered. With ``rollout.lag=1`` it is one step newer, at both visits, so that the time
    between the two is the same; the engine's own log-probs, of the policy that answered, would add the
    rounding of another implementation to every drift.
    """

    def __init__(self) -> None:
        self._visits: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def previous(self, rollouts: Sequence[Rollout]) -> dict[int, Rollout]:
        """Index of each rollout whose prompt was visited before -> the same prompt with the response then.

        Of several rollouts to one prompt only the first is listed: the others follow it at once.
        """
        found = {}
        for prompt_id, i in _firsts(rollouts).items():
            if prompt_id in self._visits:
                tokens, log_probs = self._visits[prompt_id]
                found[i] = replace(rollouts[i], response_token_ids=tokens, log_probs=log_probs)
        return found

    def drift(
        self,
        rollouts: Sequence[Rollout],
        now: Mapping[int, np.ndarray],
        measure: Literal["k3", "abs"],
    ) -> np.ndarray:
        """Token mean, for each rollout, of the change of its prompt's previous response.

        Args:
            now: for each index of `previous`, (T,) log-probs of that response under the policy of now.
            measure: k3, an estimate of KL(policy then || policy now), or abs, the change of a log-prob.

        Returns:
            (B,) float64: NaN at a prompt's first visit, 0 at its second rollout within a step.
        """
        result = np.zeros(len(rollouts))
        for prompt_id, i in _firsts(rollouts).items():
            if i not in now:
                result[i] = np.nan
            elif len(now[i]):
                then = self._visits[prompt_id][1]
                change = np.clip(now[i].astype(np.float64) - then, -20.0, 20.0)
                per_token = np.expm1(change) - change if measure == "k3" else np.abs(change)
                result[i] = per_token.mean()
        return result

    def remember(self, rollouts: Sequence[Rollout], log_probs: Sequence[np.ndarray]) -> None:
        """Replace what is kept of these prompts; ``log_probs`` are of the policy before the update."""
        for rollout, values in zip(rollouts, log_probs, strict=True):
            # Copies: what is there is part of larger arrays, which would stay as long.
            self._visits[rollout.prompt_id] = (rollout.response_token_ids.copy(), values.copy())

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


def _firsts(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Prompt -> index of the first rollout to it, in their order."""
    firsts: dict[str, int] = {}
    for i, rollout in enumerate(rollouts):
        firsts.setdefault(rollout.prompt_id, i)
    return firsts
