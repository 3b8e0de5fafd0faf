"""Random ragged batches for the oracles, and their padding."""

from __future__ import annotations

import numpy as np
import torch

Arrays = dict[str, np.ndarray]

BATCHES = 24
EDGE_BATCHES = 2
"""Batches that only verl sees: log-ratios beyond 20 and an empty response."""
MAX_TOKENS = 12
CONSTANT_LENGTH = 16
"""Tokens by which the losses over a constant divide."""


def draw(rng: np.random.Generator, number: int, group_sizes: np.ndarray, shuffle: bool) -> Arrays:
    """One batch, flat: (S,) groups, rewards and lengths, (N,) log-probs and advantages."""
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    if shuffle:
        groups = rng.permutation(groups)
    count = len(groups)
    kinds = (
        lambda: rng.integers(0, 2, count).astype(float),
        lambda: rng.integers(0, 65, count) / 64,
        lambda: rng.choice([0.0, 0.1, 0.9, 1.0], count),
        lambda: rng.integers(-128, 129, count) / 32,
    )
    rewards = kinds[number % 4]()
    rewards[groups == 0] = rewards[groups == 0][0]  # a group without signal
    lengths = rng.integers(1, MAX_TOKENS + 1, count)
    lengths[rng.integers(count)] = 1
    lengths[rng.integers(count)] = MAX_TOKENS
    edge = number >= BATCHES
    if edge:
        # verl keeps the reward at the last token: an empty response has none, whatever it was given.
        empty = rng.integers(count)
        lengths[empty], rewards[empty] = 0, 0.0
    n = int(lengths.sum())

    def near(log_probs: np.ndarray, spread: float) -> np.ndarray:
        return np.minimum(log_probs + spread * rng.standard_normal(n), -1e-3)

    old = -rng.exponential(1.0, n) - 1e-3
    log_probs, reference, engine = near(old, 0.25), near(old, 0.5), near(old, 0.3)
    if edge:
        far = rng.choice(n, 6, replace=False)
        old[far] -= np.array([0, 3, 0, 25, 0, 2])
        log_probs[far] -= np.array([1, 1, 25, 3, 22, 40])
        reference[far] -= np.array([12, 19, 21, 30, 3, 5])
        engine[far] -= np.array([2, 30, 1, 21, 3, 19])
    advantages = np.repeat(rng.standard_normal(count), lengths)
    if number % 2:  # as after entropy shaping: another advantage at every token
        advantages = advantages * (1 + 0.3 * rng.random(n))
    numbers = {
        "rewards": rewards,
        "log_probs": log_probs,
        "old_log_probs": old,
        "reference_log_probs": reference,
        "engine_log_probs": engine,
        "advantages": advantages,
    }
    floats = {name: array.astype(np.float32) for name, array in numbers.items()}
    return {"lengths": lengths, "groups": groups} | floats


class Padded:
    """A flat batch as (S, T) tensors with a mask, right-padded as both libraries have it."""

    def __init__(self, batch: Arrays) -> None:
        self.lengths = torch.from_numpy(batch["lengths"])
        self.mask = (torch.arange(int(self.lengths.max())) < self.lengths[:, None]).float()
        self.rewards = torch.from_numpy(batch["rewards"])
        self.uids = np.array([f"prompt-{group}" for group in batch["groups"]], dtype=object)
        self._batch = batch

    def __getitem__(self, name: str) -> torch.Tensor:
        grid = torch.zeros(self.mask.shape)
        grid[self.mask.bool()] = torch.from_numpy(self._batch[name])
        return grid

    def flat(self, grid: torch.Tensor) -> np.ndarray:
        """(S, T) or (S, 1) to (N,) float32."""
        return grid.detach().expand(self.mask.shape)[self.mask.bool()].numpy().astype(np.float32)

    def outcome_rewards(self) -> torch.Tensor:
        """(S, T), the reward at the last token of each response that has one."""
        grid = torch.zeros(self.mask.shape)
        rows = torch.nonzero(self.lengths > 0)[:, 0]
        grid[rows, self.lengths[rows] - 1] = self.rewards[rows]
        return grid


def one(value: torch.Tensor | float) -> np.ndarray:
    return np.array([float(value)], np.float32)


def with_prefixes(inputs: Arrays, outputs: Arrays) -> Arrays:
    named = {f"in/{key}": array for key, array in inputs.items()}
    named["in/sequences"] = np.array([len(inputs["lengths"])])
    return named | {f"out/{key}": array for key, array in outputs.items()}
