"""The per-prompt baseline: a discounted Beta posterior over the chance of a correct response.

Source: MSSR, arXiv 2512.18215; the same tracker without images is in SPO, arXiv 2509.13232.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mssr.algorithms.checks import check_number, per_prompt
from mssr.algorithms.id_table import IdTable, Keys, Rows, grown
from mssr.algorithms.step import Floats
from mssr.errors import check_version

_STATE_VERSION = 2
_CHUNK = 1 << 16  # prompts worked on at once
_UNIT = 1 << 36  # values are summed as whole multiples of 1/_UNIT


class BetaBaseline:
    """Beta(a, b) of every prompt, keyed by string id; the value is its mean a / (a + b).

    A visit with reward r in [0, 1] and discount eta in [0, 1] does ``a <- eta*a + r`` and
    ``b <- eta*b + (1 - r)``, so that with a constant eta the evidence a + b tends to 1/(1 - eta).

    An unseen prompt has the prior ``a = strength*m, b = strength*(1 - m)``. m is ``prior_mean``,
    or, if that is None, the mean of all rewards observed so far (0.5 before the first one): a new
    prompt is then expected to be as hard as the average one. The prior is fixed when `update` is
    called, and is the same for all new prompts of that call, so `values` just before and `update`
    agree on where a prompt started.

    Made for many millions of prompts: each takes 16 bytes here and 24 to 32 in the `IdTable`.

    Args:
        prior_strength: Pseudo-counts of the prior, >= 0. 1 weighs as much as one response; with 0
            the first reward alone is the value.
        prior_mean: Value of an unseen prompt in [0, 1], or None for the running mean.
    """

    def __init__(self, prior_strength: float = 1.0, prior_mean: float | None = None) -> None:
        check_number("prior_strength", prior_strength, ">= 0")
        check_number("prior_mean", prior_mean, "in [0, 1]", optional=True)
        self.prior_strength = float(prior_strength)
        self.prior_mean = None if prior_mean is None else float(prior_mean)
        self._table = IdTable()
        self._counts: Floats = np.empty((0, 2), np.float64)  # columns a and b; spare rows at the end
        # Sum of the values of the prompts seen, in units of 1/_UNIT. A sum of integers depends on
        # neither the order of visits nor a resume, and a pass over all prompts each step is saved.
        self._value_units = 0
        self._reward_sum = 0.0
        self._reward_count = 0

    def __len__(self) -> int:
        """Number of prompts seen."""
        return len(self._table)

    @property
    def unseen_value(self) -> float:
        """Value of a prompt that was never visited, in [0, 1]."""
        if self.prior_mean is not None:
            return self.prior_mean
        return self._reward_sum / self._reward_count if self._reward_count else 0.5

    def keys(self, ids: Sequence[str]) -> Keys:
        """(B, 2) uint64 keys of B ids, for asking about the same ids often: see `IdTable.keys`."""
        return self._table.keys(ids)

    def values(self, ids: Sequence[str] | Keys) -> NDArray[np.float32]:
        """(B,) float32 values in [0, 1] of B prompts, given as ids or `keys`; changes nothing."""
        keys = self._table.keys(ids)
        if len(keys) > _CHUNK:
            parts = [self.values(keys[i : i + _CHUNK]) for i in range(0, len(keys), _CHUNK)]
            return np.concatenate(parts)
        rows = self._table.find(keys)
        seen = np.flatnonzero(rows >= 0)
        values = np.full(len(keys), self.unseen_value)
        values[seen] = self._values_of(rows[seen])
        return values.astype(np.float32)

    def counts(self, ids: Sequence[str] | Keys) -> Floats:
        """(B, 2) float64 a and b of B prompts, the prior for those unseen; changes nothing."""
        rows = self._table.find(self._table.keys(ids))
        m = self.unseen_value
        counts = np.tile(np.array([m, 1 - m]) * self.prior_strength, (len(rows), 1))
        counts[rows >= 0] = self._counts[rows[rows >= 0]]
        return counts

    def unseen_fraction(self, ids: Sequence[str] | Keys) -> float:
        """Fraction of ``ids`` (or `keys`) that were never visited; 0 for none."""
        rows = self._table.find(self._table.keys(ids))
        return float(np.mean(rows < 0)) if len(rows) else 0.0

    def mean(self) -> float:
        """Mean value over the prompts seen, within 1e-11; the value of an unseen prompt if there are none."""
        return self._value_units / (_UNIT * len(self)) if len(self) else self.unseen_value

    @staticmethod
    def check_rewards(ids: Sequence[str], rewards: ArrayLike) -> Floats:
        """(B,) float64 rewards of B prompts; ValueError, naming the prompt, if one is not in [0, 1].

        To be asked before a step is spent: `update` takes no others.
        """
        r = per_prompt("rewards", rewards, len(ids))
        wrong = np.flatnonzero(~((r >= 0) & (r <= 1)))  # the negation also catches NaN
        if len(wrong):
            i = int(wrong[0])
            raise ValueError(f"the reward of prompt {str(ids[i])!r} must be in [0, 1], not {r[i]}")
        return r

    def update(self, ids: Sequence[str], rewards: ArrayLike, eta: ArrayLike) -> None:
        """Discount and add one observation for each of B visits, in order; nothing if an argument is wrong.

        Args:
            ids: B prompt ids. A prompt named twice is visited twice, the discount included.
            rewards: (B,) in [0, 1].
            eta: Discount in [0, 1]; one for all visits, or (B,), one for each.
        """
        keys = self._table.keys(ids)
        r = self.check_rewards(ids, rewards)
        keep = np.asarray(eta, np.float64)
        if keep.shape not in ((), r.shape):
            raise ValueError(f"eta must be one number or of shape {r.shape}, not {keep.shape}")
        wrong = keep[~((keep >= 0) & (keep <= 1))]
        if wrong.size:
            raise ValueError(f"eta must be in [0, 1], not {wrong.flat[0]}")
        keep = np.broadcast_to(keep, r.shape)[:, None]

        first_new = len(self)
        rows = self._insert(keys)
        visit = _occurrence(rows)
        once = rows[visit == 0]
        self._value_units -= _units(self._values_of(once[once < first_new]))
        observed = np.stack([r, 1 - r], axis=1)
        for k in range(visit.max(initial=-1) + 1):
            # The k-th visits of all prompts at once: no row occurs twice among them.
            now = np.flatnonzero(visit == k)
            row = rows[now]
            counts = keep[now] * self._counts.take(row, axis=0) + observed[now]
            for column in (0, 1):  # four times as fast as both at once
                self._counts[row, column] = counts[:, column]
        self._value_units += _units(self._values_of(once))
        self._reward_sum += math.fsum(r)  # exact, so that the order of a batch changes nothing
        self._reward_count += len(r)

    def initialize(
        self,
        ids: Sequence[str],
        successes: ArrayLike,
        trials: ArrayLike,
        strength: float,
        smoothing: float = 0.5,
    ) -> None:
        """First values of P prompts from responses that were given before training.

        ``a = strength*(s + smoothing)/(n + 2*smoothing)``, and b likewise with n - s. A smoothing of 1/2
        is SPO, arXiv 2509.13232; 0 is the code of MSSR, which with one response gives a value of 0 or 1.
        All rewards count for the running mean.

        Args:
            ids: P distinct prompt ids, none of them visited yet.
            successes: (P,) s, the sum of a prompt's rewards, in [0, n].
            trials: (P,) n, the number of its responses, >= 1.
            strength: Pseudo-counts a + b of each, > 0.
            smoothing: >= 0.

        Raises:
            ValueError: A prompt occurs twice or was visited before (it is named). Nothing is changed then.
        """
        keys = self._table.keys(ids)
        check_number("strength", strength)
        check_number("smoothing", smoothing, ">= 0")
        s, n = per_prompt("successes", successes, len(keys)), per_prompt("trials", trials, len(keys))
        _refuse(ids, ~((n >= 1) & (n == np.floor(n)) & np.isfinite(n)), "needs a whole number of trials >= 1")
        _refuse(ids, ~((s >= 0) & (s <= n)), "needs a sum of rewards in [0, its number of trials]")
        _refuse(ids, IdTable().insert(keys) != np.arange(len(keys)), "occurs twice")
        _refuse(ids, self._table.find(keys) >= 0, "was visited before")

        rows = self._insert(keys)
        share = (np.stack([s, n - s], axis=1) + smoothing) / (n + 2 * smoothing)[:, None]
        self._counts[rows] = strength * share
        self._value_units += _units(self._values_of(rows))
        self._reward_sum += float(s.sum())
        self._reward_count += int(n.sum())

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, without the settings: (n, 2) uint64 keys, (n, 2) float64 a and b, JSON scalars."""
        return {
            "version": _STATE_VERSION,
            "keys": self._table.all_keys,
            "counts": self._counts[: len(self)].copy(),
            "reward_sum": self._reward_sum,
            "reward_count": self._reward_count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was learnt; `values` and `update` then go on bit for bit.

        A state of version 1, which has a list ``ids`` in place of ``keys``, is read too. ValueError if
        keys and counts do not fit together.
        """
        if state.get("version") == 1:
            keys = IdTable().keys(state["ids"])
        else:
            check_version(state, _STATE_VERSION, "baseline")
            keys = state["keys"]
        try:
            table = IdTable.from_keys(keys)
        except ValueError as error:
            raise ValueError(f"baseline state: {error}") from error
        counts = np.array(state["counts"], np.float64)
        if counts.shape != (len(table), 2):
            raise ValueError(f"baseline state has {len(table)} distinct ids but counts {counts.shape}")
        reward_sum, reward_count = float(state["reward_sum"]), int(state["reward_count"])
        units = 0
        for start in range(0, len(counts), _CHUNK):
            part = counts[start : start + _CHUNK]
            if not (np.isfinite(part).all() and part.min() >= 0 and part.sum(axis=1).min() > 0):
                raise ValueError("baseline state has counts a, b that are no Beta distribution")
            units += _units(part[:, 0] / (part[:, 0] + part[:, 1]))
        self._table, self._counts, self._value_units = table, counts, units
        self._reward_sum, self._reward_count = reward_sum, reward_count

    def _values_of(self, rows: Rows) -> Floats:
        """(B,) values of prompts that were seen."""
        counts = self._counts.take(rows, axis=0)
        # a + b >= 1 after any visit, because a visit adds r + (1 - r) = 1, and is `strength` > 0 after
        # `initialize`: no division by zero.
        return counts[:, 0] / (counts[:, 0] + counts[:, 1])

    def _insert(self, keys: Keys) -> Rows:
        """Give unseen prompts a row that holds the prior; (B,) rows without -1."""
        first_new = len(self)
        rows = self._table.insert(keys)
        self._counts = grown(self._counts, first_new, len(self))
        mean = self.unseen_value
        self._counts[first_new : len(self)] = self.prior_strength * mean, self.prior_strength * (1 - mean)
        return rows


def _units(values: Floats) -> int:
    """Sum of values in [0, 1], each rounded to a multiple of 1/_UNIT."""
    return int(np.rint(values * _UNIT).astype(np.int64).sum())


def _refuse(ids: Sequence[str], wrong: NDArray[np.bool_], why: str) -> None:
    if wrong.any():
        raise ValueError(f"prompt {str(ids[int(wrong.argmax())])!r} {why}")


def _occurrence(rows: Rows) -> Rows:
    """How many times each entry occurred before: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    in_order = np.sort(rows)
    if (in_order[1:] != in_order[:-1]).all():  # mostly so, and this is fast
        return np.zeros(len(rows), np.int64)
    order = np.argsort(rows, kind="stable")
    is_first = np.diff(rows[order], prepend=-1) != 0
    position = np.arange(len(rows))
    rank = np.empty(len(rows), np.int64)
    rank[order] = position - np.maximum.accumulate(np.where(is_first, position, 0))
    return rank
