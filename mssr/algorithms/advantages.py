"""Rewards to advantages: (B,) in, (B,) float32 out; and their token-level forms, (N,) over all tokens.

B is the number of rollouts of one step, over all ranks, and N the sum of their lengths. Everything is
computed in float64: a group of equal rewards must give zeros, not the rounding error of its mean divided
by a tiny standard deviation. The arguments mean the same everywhere:

- ``rewards``: (B,);
- ``groups``: (B,) whole numbers, equal for the responses of one prompt, in any order. A group whose
  rewards are all equal has advantage 0, unless its function says otherwise;
- ``lengths``: (B,) of the responses in tokens, >= 0;
- ``weights``: (B,) how much a response counts in statistics over the batch: its length, so that each
  token counts the same, or 1, so that each response does. One of weight 0 does not enter them and has
  advantage 0. Where nothing that has a weight differs, all advantages are 0;
- ``eps``: keeps a division finite, > 0.

Every function raises ValueError on an empty batch, on lengths that differ, on values that are not finite
or out of their range, and on a group of one response.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mssr.algorithms.checks import check_number

FloatVector = NDArray[np.float32]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def grpo(rewards: ArrayLike, groups: ArrayLike, eps: float = 1e-6) -> FloatVector:
    """A_i = (r_i - mean_g) / (std_g + eps), std unbiased. GRPO, arXiv 2402.03300."""
    return over_group_std(centred(rewards, groups, "GRPO"), rewards, groups, eps)


def over_group_std(d: ArrayLike, rewards: ArrayLike, groups: ArrayLike, eps: float) -> FloatVector:
    """A_i = d_i / (std_g + eps), std_g of the rewards of its group, unbiased."""
    check_number("eps", eps)
    difference, group, size, _ = _grouped(rewards, groups, "std of a group")
    std = np.sqrt(np.bincount(group, difference * difference) / (size - 1))
    return (_vector(d, "differences") / (std[group] + eps)).astype(np.float32)


def dr_grpo(rewards: ArrayLike, groups: ArrayLike) -> FloatVector:
    """A_i = r_i - mean_g: a prompt that is nearly solved, or nearly hopeless, is not scaled up.

    Dr. GRPO, arXiv 2503.20783; its other half is the loss over a constant length.
    """
    return centred(rewards, groups, "Dr. GRPO").astype(np.float32)


def rloo(rewards: ArrayLike, groups: ArrayLike) -> FloatVector:
    """A_i = r_i - mean of the others of its group = n/(n-1) * (r_i - mean_g). RLOO, arXiv 2402.14740."""
    difference, group, size, _ = _grouped(rewards, groups, "RLOO")
    return ((size / (size - 1))[group] * difference).astype(np.float32)


def lite_ppo(
    rewards: ArrayLike, groups: ArrayLike, eps: float = 1e-6, weights: ArrayLike | None = None
) -> FloatVector:
    """A_i = (r_i - mean_g) / (std r + eps), std unbiased and over the batch. Lite PPO, arXiv 2508.08221.

    ``weights`` are those of the standard deviation, None for 1; the means of the groups are over
    responses in any case.
    """
    return over_batch_std(centred(rewards, groups, "Lite PPO"), rewards, eps, weights)


def over_batch_std(
    d: ArrayLike, rewards: ArrayLike, eps: float, weights: ArrayLike | None = None
) -> FloatVector:
    """A_i = d_i / (std r + eps), std of the rewards of the batch, unbiased."""
    check_number("eps", eps)
    r, difference = _vector(rewards, "rewards"), _vector(d, "differences")
    live, _, variance = _moments(r, _lengths(weights, len(r)), unbiased=True)
    return np.where(live, difference / (np.sqrt(variance) + eps), 0.0).astype(np.float32)


def reinforce_pp(rewards: ArrayLike, lengths: ArrayLike, eps: float = 1e-8) -> FloatVector:
    """A_i = (r_i - mu) / sqrt(var + eps), mu and var over tokens. REINFORCE++, arXiv 2501.03262.

    Without KL in the reward and without discounting, the return is r_i at each of the L_i tokens of a
    response, so whitening over all valid tokens needs the rewards and lengths only::

        N = sum L_i,  mu = sum L_i*r_i / N,  var = sum L_i*(r_i - mu)^2 / (N - 1)

    The variance is unbiased and eps is inside the root, as in verl's masked whitening. The ``lengths``
    are weights: ones give statistics over responses. With KL in the reward, see `returns_to_go`, `whiten`.
    """
    check_number("eps", eps)
    r = _vector(rewards, "rewards")
    return _whiten(r, _lengths(lengths, len(r)), eps)


def reinforce_pp_baseline(
    rewards: ArrayLike, groups: ArrayLike, lengths: ArrayLike, eps: float = 1e-8
) -> FloatVector:
    """A_i = (d_i - mu) / sqrt(var + eps), d = r - mean_g, mu and var over tokens. arXiv 2501.03262.

    A group whose rewards are all equal has d = 0, which whitening moves to -mu/sd: not 0 unless
    lengths and d are uncorrelated.
    """
    return reinforce_pp(centred(rewards, groups, "REINFORCE++-baseline"), lengths, eps)


def single_rollout(
    rewards: ArrayLike, values: ArrayLike, eps: float = 1e-6, weights: ArrayLike | None = None
) -> FloatVector:
    """D = r - v;  A = (D - mean D) / (std D + eps), std of the population. MSSR, arXiv 2512.18215.

    Args:
        values: (B,) baseline of each prompt before this step's update.
        weights: Lengths for statistics over tokens, mean D = sum L*D / sum L (SPO++); None for
            statistics over responses, in which a long one counts as much as a short one.
    """
    check_number("eps", eps)
    r = _vector(rewards, "rewards")
    difference = r - _vector(values, "values", len(r))
    live, mean, variance = _moments(difference, _lengths(weights, len(r)), unbiased=False)
    return np.where(live, (difference - mean) / (np.sqrt(variance) + eps), 0.0).astype(np.float32)


def returns_to_go(rewards: ArrayLike, lengths: ArrayLike, penalties: ArrayLike) -> Floats:
    """G_t = r - sum of the penalties from token t on, of the response that t belongs to; (N,) float64.

    The return without discount of a reward r at the last token and -penalty_t at each: how KL enters
    the reward in REINFORCE++, arXiv 2501.03262. The (N,) penalties are those of the tokens, responses
    end to end, multiplied by their coefficient.
    """
    r = _vector(rewards, "rewards")
    counts = _lengths(lengths, len(r)).astype(np.int64)
    penalty = per_token("penalties", penalties, counts)
    ends = np.cumsum(counts)
    before = np.concatenate([[0.0], np.cumsum(penalty)])  # before[t]: all penalties ahead of token t
    return np.repeat(r - before[ends], counts) + before[:-1]


def whiten(values: ArrayLike, lengths: ArrayLike, eps: float, weighting: str) -> FloatVector:
    """(x - mu) / sqrt(var + eps) over the tokens of a batch: the token-level form of `reinforce_pp`.

    Args:
        values: (N,) of the tokens, responses end to end.
        weighting: "token" for mu and var over tokens; "sequence" for those in which each response that
            has a token counts the same, its tokens sharing its weight.
    """
    check_number("eps", eps)
    check_weighting(weighting)
    counts = _lengths(lengths, len(np.asarray(lengths)))
    x = per_token("values", values, counts)
    if weighting == "token":
        return _whiten(x, np.ones(len(x)), eps)
    live = counts[counts > 0]
    return _whiten(x, np.repeat(1 / live, live.astype(np.int64)), eps, total=len(live))


def centred(rewards: ArrayLike, groups: ArrayLike, method: str) -> Floats:
    """(B,) float64 r - mean_g; ``method`` is named as what needs more than one response."""
    return _grouped(rewards, groups, method)[0]


def constant_groups(rewards: ArrayLike, groups: ArrayLike) -> NDArray[np.bool_]:
    """(B,) True where all rewards of the rollout's group are equal: no learning signal there."""
    return _grouped(rewards, groups)[3]


def check_weighting(weighting: str) -> None:
    """Raise ValueError unless ``weighting`` is "sequence" or "token"."""
    if weighting not in ("sequence", "token"):
        raise ValueError(f"weighting must be 'sequence' or 'token', not {weighting!r}")


def per_token(name: str, values: ArrayLike, lengths: Floats | Ints) -> Floats:
    """(N,) float64 ``values``; ValueError unless they are finite and one for each token."""
    array, tokens = np.asarray(values, np.float64), int(lengths.sum())
    if array.shape != (tokens,):
        raise ValueError(f"{tokens} response tokens need as many {name}, not shape {array.shape}")
    return _vector(array, name) if tokens else array


def _vector(values: ArrayLike, name: str, size: int | None = None) -> Floats:
    """``values`` as a finite, non-empty (B,) float64 array, one for each of ``size`` rewards."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a non-empty vector, not an array of shape {array.shape}")
    if size is not None and len(array) != size:
        raise ValueError(f"{size} rewards need as many {name}, not {len(array)}")
    finite = np.isfinite(array)
    if not finite.all():
        wrong = int(finite.argmin())
        raise ValueError(f"{name} must be finite, but number {wrong} is {array[wrong]}")
    return array


def _lengths(lengths: ArrayLike | None, size: int) -> Floats:
    """``lengths`` as a non-negative (size,) float64 array (exact up to 2^53 tokens); ones for None."""
    if lengths is None:
        return np.ones(size)
    tokens = _vector(lengths, "lengths", size)
    if tokens.min() < 0:
        raise ValueError(f"lengths must be >= 0, not {tokens.min():g}")
    return tokens


def _grouped(
    rewards: ArrayLike, groups: ArrayLike, method: str = ""
) -> tuple[Floats, Ints, Ints, NDArray[np.bool_]]:
    """What each reward is within its group; a ``method`` needs groups of more than one.

    Returns:
        (B,) r - mean_g, exactly 0 in a group whose rewards are all equal, bit for bit; (B,) group of each
        as 0 .. G-1; (G,) group sizes; (B,) True where all rewards of the group are equal.
    """
    r = _vector(rewards, "rewards")
    labels = np.asarray(groups)
    if labels.shape != r.shape:
        raise ValueError(f"{len(r)} rewards need as many groups, not shape {labels.shape}")
    names, first, group, size = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    if method and size.min() < 2:
        raise ValueError(
            f"{method} compares the responses of a prompt, but group {names[size.argmin()]} has only one:"
            " sample n >= 2 responses for each prompt"
        )
    constant = (np.bincount(group, r != r[first][group]) == 0)[group]
    return np.where(constant, 0.0, r - (np.bincount(group, r) / size)[group]), group, size, constant


def _moments(
    x: Floats, counts: Floats, unbiased: bool, total: float | None = None
) -> tuple[NDArray[np.bool_], float, float]:
    """Which of x are to be scaled, none where those that count do not differ; mean and variance of x.

    x[i] occurs ``counts[i]`` times, and all occur ``total`` times, None for the sum of the counts.
    """
    total = counts.sum() if total is None else total
    live = counts > 0
    if not live.any() or np.ptp(x[live]) == 0 or (unbiased and total < 2):
        return np.zeros(len(x), bool), 0.0, 1.0
    mean = (counts * x).sum() / total
    return live, mean, (counts * (x - mean) ** 2).sum() / (total - unbiased)


def _whiten(x: Floats, counts: Floats, eps: float, total: float | None = None) -> FloatVector:
    """(x - mu) / sqrt(var + eps), var unbiased; zeros where nothing differs, or nothing counts."""
    live, mean, variance = _moments(x, counts, unbiased=True, total=total)
    return np.where(live, (x - mean) / np.sqrt(variance + eps), 0.0).astype(np.float32)
