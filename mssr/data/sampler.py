"""Which prompts a step uses: every prompt once an epoch, in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class EpochSampler:
    """Walks through the ids, a new permutation every epoch; an epoch's tail joins the next one's head.

    The order of an epoch is a function of (seed, epoch) alone, so the state is two integers.
    """

    def __init__(self, ids: Sequence[str], seed: int, shuffle: bool = True) -> None:
        if not ids:
            raise ValueError("there are no prompts to sample")
        self._ids = list(ids)
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the running one."""
        return self._epoch + self._position / len(self._ids)

    def next(self, count: int) -> list[str]:
        """The next ``count`` ids."""
        taken: list[str] = []
        while len(taken) < count:
            if self._position == len(self._ids):
                self._epoch += 1
                self._position = 0
                self._order = self._permutation(self._epoch)
            chunk = self._order[self._position : self._position + count - len(taken)]
            taken.extend(self._ids[i] for i in chunk)
            self._position += len(chunk)
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position, "prompts": len(self._ids)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["prompts"] != len(self._ids):
            raise ValueError(
                f"the checkpoint's data has {state['prompts']} prompts, this has {len(self._ids)}"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._permutation(self._epoch)

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._ids))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._ids))
