"""Scores to advantages: (B,) in, (B,) float32 out; and their token-level forms, (N,) over all tokens.

B is the number of rollouts of one step, over all ranks, and N the sum of their lengths. Everything is
computed in float64: a group of equal scores must give zeros, not the rounding error of its mean divided
by a tiny standard deviation. Every function raises ValueError on an empty batch, on lengths that
differ, and on values that are not finite.

Statistics over the batch take a weight for each response: its length in tokens, so that each token
counts the same, or the same for all, so that each response does. A response of weight 0 does not
enter them and has advantage 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatVector = npt.NDArray[np.float32]
_Float64s = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]


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
    check_eps(eps)
    r, group, size = _grouped(rewards, groups, "GRPO")
    difference = _centred(r, group, size)
    std = np.sqrt(np.bincount(group, difference * difference) / (size - 1))
    return (difference / (std[group] + eps)).astype(np.float32)


def dr_grpo(rewards: npt.ArrayLike, groups: npt.ArrayLike) -> FloatVector:
    """A_i = r_i - mean_g: a prompt that is nearly solved, or nearly hopeless, is not scaled up.

    Dr. GRPO, arXiv 2503.20783; its other half is the loss over a constant length.

    Args:
        rewards: (B,) scores.
        groups: (B,) whole numbers, equal for the responses of one prompt, in any order.

    Returns:
        (B,) float32; zeros for a group whose rewards are all equal.

    Raises:
        ValueError: A group has one response only.
    """
    return centred(rewards, groups, "Dr. GRPO").astype(np.float32)


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
    return ((size / (size - 1))[group] * _centred(r, group, size)).astype(np.float32)


def lite_ppo(
    rewards: npt.ArrayLike,
    groups: npt.ArrayLike,
    eps: float = 1e-6,
    weights: npt.ArrayLike | None = None,
) -> FloatVector:
    """A_i = (r_i - mean_g) / (std r + eps), std unbiased and over the batch. Lite PPO, arXiv 2508.08221.

    Args:
        rewards: (B,) scores.
        groups: (B,) whole numbers, equal for the responses of one prompt, in any order.
        eps: Added to the standard deviation, > 0.
        weights: (B,) response lengths for a standard deviation over tokens; None for one over
            responses. The means of the groups are over responses in any case.

    Returns:
        (B,) float32; zeros for a group whose rewards are all equal, and everywhere if the batch has no
        standard deviation: its responses with a weight score the same, or the weights add up to 1.

    Raises:
        ValueError: A group has one response only, or a weight is negative.
    """
    check_eps(eps)
    r, group, size = _grouped(rewards, groups, "Lite PPO")
    counts = _weights(weights, len(r))
    if _constant_over(r, counts):
        return np.zeros(len(r), np.float32)
    _, variance = _moments(r, counts, counts.sum(), unbiased=True)
    scaled = _centred(r, group, size) / (np.sqrt(variance) + eps)
    return np.where(counts > 0, scaled, 0.0).astype(np.float32)


def reinforce_pp(rewards: npt.ArrayLike, lengths: npt.ArrayLike, eps: float = 1e-8) -> FloatVector:
    """A_i = (r_i - mu) / sqrt(var + eps), mu and var over tokens. REINFORCE++, arXiv 2501.03262.

    Without KL in the reward and without discounting, the return is r_i at each of the L_i tokens of a
    response, so whitening over all valid tokens needs the scores and lengths only::

        N = sum L_i,  mu = sum L_i*r_i / N,  var = sum L_i*(r_i - mu)^2 / (N - 1)

    The variance is unbiased and eps is inside the root, as in verl's masked whitening. With KL in the
    reward, see `returns_to_go` and `whiten`.

    Args:
        rewards: (B,) scores.
        lengths: (B,) response lengths in tokens, >= 0; or ones for statistics over responses.
        eps: Added to the variance, > 0.

    Returns:
        (B,) float32, the same for every token of the response. Zero for an empty response, which has
        no token to carry it; all zeros if the non-empty responses score the same, or if there is
        only one token.

    Raises:
        ValueError: A length is negative.
    """
    check_eps(eps)
    r = _vector(rewards, "rewards")
    return _whiten(r, _lengths(lengths, len(r)), eps)


def reinforce_pp_baseline(
    rewards: npt.ArrayLike, groups: npt.ArrayLike, lengths: npt.ArrayLike, eps: float = 1e-8
) -> FloatVector:
    """A_i = (d_i - mu) / sqrt(var + eps), d = r - mean_g, mu and var over tokens. arXiv 2501.03262.

    A group whose rewards are all equal has d = 0, which whitening moves to -mu/sd: not 0 unless
    lengths and d are uncorrelated.

    Args:
        rewards: (B,) scores.
        groups: (B,) whole numbers, equal for the responses of one prompt, in any order.
        lengths: (B,) response lengths in tokens, >= 0; or ones for statistics over responses.
        eps: Added to the variance, > 0.

    Returns:
        (B,) float32, the same for every token of the response. Zero for an empty response; all zeros
        if d is the same for all non-empty responses, or if there is only one token.

    Raises:
        ValueError: A group has one response only, or a length is negative.
    """
    check_eps(eps)
    r, group, size = _grouped(rewards, groups, "REINFORCE++-baseline")
    return _whiten(_centred(r, group, size), _lengths(lengths, len(r)), eps)


def single_rollout(
    rewards: npt.ArrayLike,
    values: npt.ArrayLike,
    eps: float = 1e-6,
    weights: npt.ArrayLike | None = None,
) -> FloatVector:
    """D = r - v;  A = (D - mean D) / (std D + eps), std of the population. MSSR, arXiv 2512.18215.

    Args:
        rewards: (B,) scores.
        values: (B,) baseline of each prompt before this step's update.
        eps: Added to the standard deviation, > 0.
        weights: (B,) response lengths for statistics over tokens, mean D = sum L*D / sum L (SPO++);
            None for statistics over responses, in which a long one counts as much as a short one.

    Returns:
        (B,) float32; all zeros if r - v is the same wherever there is a weight, so also for a batch of
        one.

    Raises:
        ValueError: A weight is negative.
    """
    check_eps(eps)
    r = _vector(rewards, "rewards")
    v = _vector(values, "values")
    if r.shape != v.shape:
        raise ValueError(f"{len(r)} rewards need as many values, not {len(v)}")
    counts = _weights(weights, len(r))
    difference = r - v
    if not _varies(difference, counts):
        return np.zeros(len(r), np.float32)
    mean, variance = _moments(difference, counts, counts.sum(), unbiased=False)
    return np.where(counts > 0, (difference - mean) / (np.sqrt(variance) + eps), 0.0).astype(np.float32)


def returns_to_go(rewards: npt.ArrayLike, lengths: npt.ArrayLike, penalties: npt.ArrayLike) -> _Float64s:
    """G_t = r - sum of the penalties from token t on, of the response that t belongs to.

    The return without discount of a reward r at the last token and -penalty_t at each: how KL enters
    the reward in REINFORCE++, arXiv 2501.03262.

    Args:
        rewards: (B,) scores.
        lengths: (B,) response lengths in tokens, >= 0.
        penalties: (N,) of the tokens, responses end to end, multiplied by their coefficient.

    Returns:
        (N,) float64.

    Raises:
        ValueError: A length is negative, or there are not as many penalties as tokens.
    """
    r = _vector(rewards, "rewards")
    counts = _lengths(lengths, len(r)).astype(np.int64)
    penalty = check_penalties(penalties, counts)
    ends = np.cumsum(counts)
    before = np.concatenate([[0.0], np.cumsum(penalty)])  # before[t]: all penalties ahead of token t
    return np.repeat(r - before[ends], counts) + before[:-1]


def whiten(values: npt.ArrayLike, lengths: npt.ArrayLike, eps: float, weighting: str) -> FloatVector:
    """(x - mu) / sqrt(var + eps) over the tokens of a batch: the token-level form of `reinforce_pp`.

    Args:
        values: (N,) of the tokens, responses end to end.
        lengths: (B,) response lengths in tokens, >= 0, adding up to N.
        eps: Added to the variance, > 0.
        weighting: "token" for mu and var over tokens; "sequence" for those in which each response that
            has a token counts the same, its tokens sharing its weight.

    Returns:
        (N,) float32; zeros if the values are all equal, or if there is only one to count.

    Raises:
        ValueError: The values are not as many as tokens, or there is no such weighting.
    """
    check_eps(eps)
    check_weighting(weighting)
    counts = _lengths(lengths, len(np.asarray(lengths)))
    x = np.asarray(values, np.float64)
    if x.shape != (int(counts.sum()),):
        raise ValueError(f"lengths that add up to {counts.sum():g} need as many values, not {x.shape}")
    if weighting == "token":
        return _whiten(x, np.ones(len(x)), eps, total=len(x))
    live = counts[counts > 0]
    return _whiten(x, np.repeat(1 / live, live.astype(np.int64)), eps, total=len(live))


def centred(rewards: npt.ArrayLike, groups: npt.ArrayLike, method: str) -> _Float64s:
    """(B,) float64 r - mean_g, exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: A group has one response only; ``method`` is named as what needs more.
    """
    return _centred(*_grouped(rewards, groups, method))


def constant_groups(rewards: npt.ArrayLike, groups: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """(B,) True where all rewards of the rollout's group are equal: no learning signal there."""
    r, group, _ = _grouped(rewards, groups, "")
    return _constant(r, group)


def check_eps(eps: float) -> None:
    """Raise ValueError unless ``eps`` is a finite number > 0."""
    if not (np.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be a finite number > 0, not {eps}")


def check_weighting(weighting: str) -> None:
    """Raise ValueError unless ``weighting`` is "sequence" or "token"."""
    if weighting not in ("sequence", "token"):
        raise ValueError(f"weighting must be 'sequence' or 'token', not {weighting!r}")


def check_penalties(penalties: npt.ArrayLike, lengths: _Ints) -> _Float64s:
    """(N,) float64 token penalties; ValueError unless they are finite and one for each token."""
    array = np.asarray(penalties, np.float64)
    if array.shape != (int(lengths.sum()),):
        raise ValueError(f"{lengths.sum()} response tokens need as many penalties, not shape {array.shape}")
    return _vector(array, "token penalties") if len(array) else array


def _vector(values: npt.ArrayLike, name: str) -> _Float64s:
    """``values`` as a finite, non-empty (B,) float64 array."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name} must be a non-empty vector, not an array of shape {array.shape}")
    finite = np.isfinite(array)
    if not finite.all():
        wrong = int(finite.argmin())
        raise ValueError(f"{name} must be finite, but number {wrong} is {array[wrong]}")
    return array


def _lengths(lengths: npt.ArrayLike, size: int) -> _Float64s:
    """``lengths`` as a non-negative (size,) float64 array (exact up to 2^53 tokens)."""
    tokens = _vector(lengths, "lengths")
    if len(tokens) != size:
        raise ValueError(f"{size} rewards need as many lengths, not {len(tokens)}")
    if tokens.min() < 0:
        raise ValueError(f"lengths must be >= 0, not {tokens.min():g}")
    return tokens


def _weights(weights: npt.ArrayLike | None, size: int) -> _Float64s:
    return np.ones(size) if weights is None else _lengths(weights, size)


def _grouped(rewards: npt.ArrayLike, groups: npt.ArrayLike, method: str) -> tuple[_Float64s, _Ints, _Ints]:
    """(B,) rewards, (B,) group of each as 0 .. G-1, (G,) group sizes; with a method, sizes are > 1."""
    r = _vector(rewards, "rewards")
    labels = np.asarray(groups)
    if labels.shape != r.shape:
        raise ValueError(f"{len(r)} rewards need as many groups, not shape {labels.shape}")
    names: npt.NDArray | None = None
    if labels.dtype.kind in "iu" and labels.min() >= 0 and labels.max() < len(labels):
        size = np.bincount(labels)
    else:
        size = np.zeros(1, np.int64)
    if size.all():  # the labels are 0 .. G-1 already, as `group_indices` numbers them
        group = labels
    else:
        names, group, size = np.unique(labels, return_inverse=True, return_counts=True)
    if method and size.min() < 2:
        lone = int(size.argmin())
        raise ValueError(
            f"{method} compares the responses of a prompt, but group {lone if names is None else names[lone]}"
            " has only one: sample n >= 2 responses for each prompt"
        )
    return r, group.astype(np.int64, copy=False), size


def _centred(r: _Float64s, group: _Ints, size: _Ints) -> _Float64s:
    """(B,) r - mean_g, exactly 0 in a group whose rewards are all equal."""
    return np.where(_constant(r, group), 0.0, r - (np.bincount(group, r) / size)[group])


def _constant(rewards: _Float64s, group: _Ints) -> npt.NDArray[np.bool_]:
    """(B,) True where every reward of the group equals one of them, bit for bit."""
    member = np.empty(group.max() + 1)
    member[group] = rewards
    return (np.bincount(group, rewards != member[group]) == 0)[group]


def _varies(x: _Float64s, counts: _Float64s) -> bool:
    """Whether two values of x that have a weight differ."""
    live = x if counts.all() else x[counts > 0]
    return bool(len(live) and np.ptp(live) > 0)


def _constant_over(x: _Float64s, counts: _Float64s) -> bool:
    return bool(counts.sum() < 2 or not _varies(x, counts))


def _moments(x: _Float64s, counts: _Float64s, total: float, unbiased: bool) -> tuple[float, float]:
    """Mean and variance of x, of which the i-th occurs ``counts[i]`` times."""
    mean = (counts * x).sum() / total
    return mean, (counts * (x - mean) ** 2).sum() / (total - unbiased)


def _whiten(x: _Float64s, counts: _Float64s, eps: float, total: float | None = None) -> FloatVector:
    """(x - mu) / sqrt(var + eps), var unbiased; zeros where nothing differs, or nothing counts."""
    total = counts.sum() if total is None else total
    if total < 2 or not _varies(x, counts):
        return np.zeros(len(x), np.float32)
    mean, variance = _moments(x, counts, total, unbiased=True)
    return np.where(counts > 0, (x - mean) / np.sqrt(variance + eps), 0.0).astype(np.float32)
