"""The per-prompt baseline: a discounted Beta posterior over the chance of a correct response.

Source: MSSR, arXiv 2512.18215; the same tracker without images is in SPO, arXiv 2509.13232.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_STATE_VERSION = 1


class BetaBaseline:
    """Beta(a, b) of every prompt, keyed by string id; the value is its mean a / (a + b).

    A visit with reward r in [0, 1] and discount eta in [0, 1] does ``a <- eta*a + r`` and
    ``b <- eta*b + (1 - r)``, so that with a constant eta the evidence a + b tends to 1/(1 - eta).

    An unseen prompt has the prior ``a = strength*m, b = strength*(1 - m)``. m is ``prior_mean``,
    or, if that is None, the mean of all rewards observed so far (0.5 before the first one): a new
    prompt is then expected to be as hard as the average one. The prior is fixed when `update` is
    called, and is the same for all new prompts of that call, so `values` just before and `update`
    agree on where a prompt started.

    Args:
        prior_strength: Pseudo-counts of the prior, >= 0. 1 weighs as much as one response; with 0
            the first reward alone is the value.
        prior_mean: Value of an unseen prompt in [0, 1], or None for the running mean.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, prior_strength: float = 1.0, prior_mean: float | None = None) -> None:
        if not (np.isfinite(prior_strength) and prior_strength >= 0):
            raise ValueError(f"prior_strength must be a finite number >= 0, not {prior_strength}")
        if prior_mean is not None and not 0 <= prior_mean <= 1:
            raise ValueError(f"prior_mean must be in [0, 1] or None, not {prior_mean}")
        self.prior_strength = float(prior_strength)
        self.prior_mean = None if prior_mean is None else float(prior_mean)
        self._index: dict[str, int] = {}
        # Columns a and b, with spare rows at the end: growing by doubling keeps a million
        # insertions linear.
        self._counts = np.zeros((0, 2), np.float64)
        self._reward_sum = 0.0
        self._reward_count = 0

    def __len__(self) -> int:
        """Number of prompts seen."""
        return len(self._index)

    @property
    def unseen_value(self) -> float:
        """Value of a prompt that was never visited, in [0, 1]."""
        if self.prior_mean is not None:
            return self.prior_mean
        return self._reward_sum / self._reward_count if self._reward_count else 0.5

    def values(self, ids: Sequence[str]) -> npt.NDArray[np.float32]:
        """(B,) float32 values in [0, 1] of B prompts; changes nothing."""
        rows = self._rows(ids)
        seen = rows >= 0
        values = np.full(len(rows), self.unseen_value)
        counts = self._counts[rows[seen]]
        # a + b >= 1 after any visit, because a visit adds r + (1 - r) = 1: no division by zero.
        values[seen] = counts[:, 0] / counts.sum(axis=1)
        return values.astype(np.float32)

    def unseen_fraction(self, ids: Sequence[str]) -> float:
        """Fraction of ``ids`` that were never visited; 0 for no ids."""
        rows = self._rows(ids)
        return float(np.mean(rows < 0)) if len(rows) else 0.0

    def mean(self) -> float:
        """Mean value over the prompts seen; the value of an unseen prompt if there are none."""
        counts = self._counts[: len(self)]
        return float(np.mean(counts[:, 0] / counts.sum(axis=1))) if len(counts) else self.unseen_value

    def update(self, ids: Sequence[str], rewards: npt.ArrayLike, eta: float) -> None:
        """Discount and add one observation for each of B visits, in order.

        Args:
            ids: B prompt ids. A prompt named twice is visited twice, the discount included.
            rewards: (B,) in [0, 1].
            eta: Discount in [0, 1], the share of the old evidence that is kept.

        Raises:
            ValueError: A reward is not finite or not in [0, 1] (its prompt is named), eta is out
                of range, or the lengths differ. Nothing is changed then.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], not {eta}")
        rows = self._rows(ids)
        r = np.asarray(rewards, np.float64)
        if r.shape != rows.shape:
            raise ValueError(f"{len(rows)} prompt ids need rewards of shape ({len(rows)},), not {r.shape}")
        wrong = np.flatnonzero(~((r >= 0) & (r <= 1)))  # the negation also catches NaN
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(f"the reward of prompt {ids[i]!r} must be in [0, 1], not {r[i]}")

        rows = self._insert(ids, rows)
        visit = _occurrence(rows)
        for k in range(int(visit.max(initial=-1)) + 1):
            # The k-th visits of all prompts at once: no row occurs twice among them.
            now = visit == k
            observed = np.stack([r[now], 1 - r[now]], axis=1)
            self._counts[rows[now]] = eta * self._counts[rows[now]] + observed
        self._reward_sum += float(r.sum())
        self._reward_count += len(r)

    def state_dict(self) -> dict[str, Any]:
        """Everything learnt, as arrays, JSON scalars and the list of ids; the settings are not in it."""
        return {
            "version": _STATE_VERSION,
            "ids": list(self._index),
            "counts": self._counts[: len(self)].copy(),
            "reward_sum": self._reward_sum,
            "reward_count": self._reward_count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was learnt; `values` and `update` then go on bit for bit.

        Raises:
            ValueError: The state has another version, or its ids and counts do not fit together.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"baseline state has version {state.get('version')}, expected {_STATE_VERSION}")
        index = {str(key): row for row, key in enumerate(state["ids"])}
        counts = np.array(state["counts"], np.float64)
        if counts.shape != (len(index), 2):
            raise ValueError(f"baseline state has {len(index)} distinct ids but counts {counts.shape}")
        self._index = index
        self._counts = counts
        self._reward_sum = float(state["reward_sum"])
        self._reward_count = int(state["reward_count"])

    def _rows(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """(B,) row of each id, -1 if unseen."""
        if isinstance(ids, str):
            raise ValueError(f"ids must be a sequence of prompt ids, not the single string {ids!r}")
        for key in ids:
            # 7 and "7" would silently be two prompts.
            if not isinstance(key, str):
                raise ValueError(f"prompt ids must be strings, not {key!r}")
        return np.fromiter((self._index.get(key, -1) for key in ids), np.int64, len(ids))

    def _insert(self, ids: Sequence[str], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Give the unseen ids a row that holds the prior; (B,) rows without -1."""
        first_new = len(self._index)
        rows = rows.copy()
        for i in np.flatnonzero(rows < 0):
            rows[i] = self._index.setdefault(str(ids[i]), len(self._index))
        if len(self._index) > len(self._counts):
            grown = np.zeros((max(len(self._index), 2 * len(self._counts)), 2), np.float64)
            grown[:first_new] = self._counts[:first_new]
            self._counts = grown
        mean = self.unseen_value
        prior = (self.prior_strength * mean, self.prior_strength * (1 - mean))
        self._counts[first_new : len(self._index)] = prior
        return rows


def _occurrence(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many times each entry occurred before: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order = np.argsort(rows, kind="stable")
    is_first = np.diff(rows[order], prepend=-1) != 0
    position = np.arange(len(rows))
    rank = np.empty(len(rows), np.int64)
    rank[order] = position - np.maximum.accumulate(np.where(is_first, position, 0))
    return rank
