"""Scores to sequence-level advantages: (B,) in, (B,) float32 out.

B is the number of rollouts of one step, over all ranks. Everything is computed in float64: a group of
equal scores must give zeros, not the rounding error of its mean divided by a tiny standard deviation.
Every function raises ValueError on an empty batch, on lengths that differ, and on values that are
not finite.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatVector = npt.NDArray[np.float32]


def grpo(rewards: npt.ArrayLike, groups: npt.ArrayLike, eps: float = 1e-6) -> FloatVector:
    """A_i = (r_i - mean_g) / (std_g + eps), std unbiased. GRPO, arXiv 2402.03300.

    Args:
        rewards: (B,) scores.
        groups: (B,) whole numbers, equal for the responses of one prompt, in any order.
        eps: Added to the standard deviation, > 0.

    Returns:
        (B,) float32; zeros for a group whose rewards are all equal.

    Raises:
        ValueError: A group has one response only.
    """
    _check_eps(eps)
    r, group, size = _grouped(rewards, groups, "GRPO")
    centred = r - (np.bincount(group, r) / size)[group]
    std = np.sqrt(np.bincount(group, centred**2) / (size - 1))
    advantages = centred / (std[group] + eps)
    return np.where(_constant(r, group), 0.0, advantages).astype(np.float32)


def rloo(rewards: npt.ArrayLike, groups: npt.ArrayLike) -> FloatVector:
    """A_i = r_i - mean of the others of its group = n/(n-1) * (r_i - mean_g). RLOO, arXiv 2402.14740.

    Args:
        rewards: (B,) scores.
        groups: (B,) whole numbers, equal for the responses of one prompt, in any order.

    Returns:
        (B,) float32; zeros for a group whose rewards are all equal.

    Raises:
        ValueError: A group has one response only.
    """
    r, group, size = _grouped(rewards, groups, "RLOO")
    centred = r - (np.bincount(group, r) / size)[group]
    advantages = (size / (size - 1))[group] * centred
    return np.where(_constant(r, group), 0.0, advantages).astype(np.float32)


def reinforce_pp(rewards: npt.ArrayLike, lengths: npt.ArrayLike, eps: float = 1e-8) -> FloatVector:
    """A_i = (r_i - mu) / sqrt(var + eps), mu and var over tokens. REINFORCE++, arXiv 2501.03262.

    Without KL in the reward and without discounting, the return is r_i at each of the L_i tokens of a
    response, so whitening over all valid tokens needs the scores and lengths only::

        N = sum L_i,  mu = sum L_i*r_i / N,  var = sum L_i*(r_i - mu)^2 / (N - 1)

    The variance is unbiased and eps is inside the root, as in verl's masked whitening.

    Args:
        rewards: (B,) scores.
        lengths: (B,) response lengths in tokens, >= 0.
        eps: Added to the variance, > 0.

    Returns:
        (B,) float32, the same for every token of the response. Zero for an empty response, which has
        no token to carry it; all zeros if the non-empty responses score the same, or if there is
        only one token.

    Raises:
        ValueError: A length is negative.
    """
    _check_eps(eps)
    r = _vector(rewards, "rewards")
    tokens = _lengths(lengths, len(r))
    live = tokens > 0
    if constant_over_tokens(r, tokens):
        return np.zeros(len(r), np.float32)
    n = tokens.sum()
    mean = (tokens * r).sum() / n
    variance = (tokens * (r - mean) ** 2).sum() / (n - 1)
    return np.where(live, (r - mean) / np.sqrt(variance + eps), 0.0).astype(np.float32)


def single_rollout(rewards: npt.ArrayLike, values: npt.ArrayLike, eps: float = 1e-6) -> FloatVector:
    """D = r - v;  A = (D - mean D) / (std D + eps), std of the population. MSSR, arXiv 2512.18215.

    The statistics are over sequences: a long response counts as much as a short one.

    Args:
        rewards: (B,) scores.
        values: (B,) baseline of each prompt before this step's update.
        eps: Added to the standard deviation, > 0.

    Returns:
        (B,) float32; all zeros if r - v is the same everywhere, so also for a batch of one.
    """
    _check_eps(eps)
    r = _vector(rewards, "rewards")
    v = _vector(values, "values")
    if r.shape != v.shape:
        raise ValueError(f"{len(r)} rewards need as many values, not {len(v)}")
    difference = r - v
    if np.ptp(difference) == 0:
        return np.zeros(len(r), np.float32)
    return ((difference - difference.mean()) / (difference.std() + eps)).astype(np.float32)


def constant_groups(rewards: npt.ArrayLike, groups: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """(B,) True where all rewards of the rollout's group are equal: no learning signal there."""
    r, group, _ = _grouped(rewards, groups, "")
    return _constant(r, group)


def constant_over_tokens(rewards: npt.ArrayLike, lengths: npt.ArrayLike) -> bool:
    """True if the non-empty responses score the same, or there are fewer than two tokens in all."""
    r = _vector(rewards, "rewards")
    tokens = _lengths(lengths, len(r))
    live = r[tokens > 0]
    return bool(tokens.sum() < 2 or np.ptp(live) == 0)


def _vector(values: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    """``values`` as a finite, non-empty (B,) float64 array."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a non-empty vector, not an array of shape {array.shape}")
    wrong = np.flatnonzero(~np.isfinite(array))
    if len(wrong):
        raise ValueError(f"{name} must be finite, but number {wrong[0]} is {array[wrong[0]]}")
    return array


def _lengths(lengths: npt.ArrayLike, size: int) -> npt.NDArray[np.float64]:
    """``lengths`` as a non-negative (size,) float64 array (exact up to 2^53 tokens)."""
    tokens = _vector(lengths, "lengths")
    if len(tokens) != size:
        raise ValueError(f"{size} rewards need as many lengths, not {len(tokens)}")
    if (tokens < 0).any():
        raise ValueError(f"lengths must be >= 0, not {tokens.min():g}")
    return tokens


def _grouped(
    rewards: npt.ArrayLike, groups: npt.ArrayLike, method: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(B,) rewards, (B,) group of each as 0 .. G-1, (G,) group sizes; with a method, sizes are > 1."""
    r = _vector(rewards, "rewards")
    labels = np.asarray(groups)
    if labels.shape != r.shape:
        raise ValueError(f"{len(r)} rewards need as many groups, not shape {labels.shape}")
    names, group, size = np.unique(labels, return_inverse=True, return_counts=True)
    if method and size.min() < 2:
        raise ValueError(
            f"{method} compares the responses of a prompt, but group {names[size.argmin()]} has only one:"
            " sample n >= 2 responses for each prompt"
        )
    return r, group.astype(np.int64), size.astype(np.int64)


def _constant(rewards: npt.NDArray[np.float64], group: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(B,) True where every reward of the group equals the group's first, bit for bit."""
    _, first = np.unique(group, return_index=True)
    differs = rewards != rewards[first][group]
    return (np.bincount(group, differs) == 0)[group]


def _check_eps(eps: float) -> None:
    if not (np.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a finite number > 0, not {eps}")
