"""How long each prompt's responses were at its last visit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mssr.algorithms.id_table import IdTable
from mssr.types import Rollout


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
