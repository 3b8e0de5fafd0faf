"""The responses of one step, checked once: what every baseline and every normalisation reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mssr.algorithms.checks import per_prompt

FloatVector = NDArray[np.float32]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Step:
    """B responses, over all ranks; see `of`."""

    prompt_ids: Sequence[str]
    rewards: Floats
    """(B,) r."""
    lengths: Ints
    """(B,) of the responses in tokens, >= 0."""

    @classmethod
    def of(cls, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Step:
        """The step of B prompt ids, (B,) rewards and (B,) lengths.

        Raises:
            ValueError: Shapes differ, there is no response, a reward is not finite, or a length is no
                whole number >= 0.
        """
        if isinstance(prompt_ids, str):
            raise ValueError(
                f"prompt ids must be a sequence of strings, not the single string {prompt_ids!r}"
            )
        r = per_prompt("rewards", rewards, len(prompt_ids))
        tokens = per_prompt("lengths", lengths, len(prompt_ids))
        parts = ~np.isfinite(tokens) | (tokens != np.floor(tokens))
        if parts.any():
            raise ValueError(f"lengths must be whole numbers of tokens, not {tokens[parts][0]}")
        if (tokens < 0).any():
            raise ValueError(f"lengths must be >= 0, not {tokens.min():g}")
        if not len(r):
            raise ValueError("rewards must be a non-empty vector: a step has responses")
        check_finite("rewards", r)
        return cls(prompt_ids, r, tokens.astype(np.int64))

    @cached_property
    def groups(self) -> Ints:
        """(B,) see `group_indices`."""
        return group_indices(self.prompt_ids)

    @cached_property
    def size(self) -> Ints:
        """(G,) responses of each prompt."""
        return np.bincount(self.groups)

    @cached_property
    def constant(self) -> NDArray[np.bool_]:
        """(B,) True where all rewards of the prompt are equal: nothing to compare there."""
        first = np.unique(self.groups, return_index=True)[1]
        return (np.bincount(self.groups, self.rewards != self.rewards[first][self.groups]) == 0)[self.groups]

    @cached_property
    def centred(self) -> Floats:
        """(B,) r - mean_g, exactly 0 where all of a prompt are equal, and not the rounding of a mean."""
        mean = np.bincount(self.groups, self.rewards) / self.size
        return np.where(self.constant, 0.0, self.rewards - mean[self.groups])

    def check_groups(self, method: str) -> None:
        """Raise ValueError unless each prompt has more than one response, which ``method`` compares."""
        if self.size.min() < 2:
            alone = self.prompt_ids[int(np.flatnonzero(self.size[self.groups] < 2)[0])]
            raise ValueError(
                f"{method} compares the responses of a prompt, but group {alone} has only one:"
                " sample n >= 2 responses for each prompt"
            )


def group_indices(prompt_ids: Sequence[str]) -> Ints:
    """(B,) 0 .. G-1, equal for equal ids, numbered by first occurrence."""
    index = {key: i for i, key in enumerate(dict.fromkeys(prompt_ids))}
    return np.fromiter(map(index.__getitem__, prompt_ids), np.int64, len(prompt_ids))


def check_finite(name: str, values: Floats) -> None:
    """Raise ValueError, naming the first, if one of (B,) ``values`` is not finite."""
    finite = np.isfinite(values)
    if not finite.all():
        wrong = int(finite.argmin())
        raise ValueError(f"{name} must be finite, but number {wrong} is {values[wrong]}")


def per_token(name: str, values: ArrayLike, lengths: Ints) -> Floats:
    """(N,) float64 ``values``; ValueError unless they are finite and one for each token."""
    array, tokens = np.asarray(values, np.float64), int(lengths.sum())
    if array.shape != (tokens,):
        raise ValueError(f"{tokens} response tokens need as many {name}, not shape {array.shape}")
    check_finite(name, array)
    return array
