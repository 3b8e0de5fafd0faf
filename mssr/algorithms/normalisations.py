"""D = r - b to advantages, all (B,) float64; b is r - D. The keywords of each are its options.

A response without a token has advantage 0 where tokens are weighed, and so has the whole batch where
nothing that has a weight differs. eps, > 0, keeps a division finite.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mssr.algorithms.checks import check_number
from mssr.algorithms.step import Floats, FloatVector, Ints, Step, per_token


def none(d: Floats, step: Step) -> Floats:
    """A = D."""
    return d


def batch_std(d: Floats, step: Step, *, eps: float = 1e-6, weighting: str = "sequence") -> Floats:
    """A = (D - mean D)/(std D + eps), std of the population. MSSR, arXiv 2512.18215.

    With ``weighting`` "token" mean D = sum L*D / sum L, and the std likewise (SPO++); with "sequence" a
    long response counts as much as a short one.
    """
    live, mean, variance = _moments(d, _weights(step, weighting), unbiased=False)
    return np.where(live, (d - mean) / (np.sqrt(variance) + eps), 0.0)


def reward_std(d: Floats, step: Step, *, eps: float = 1e-6, weighting: str = "sequence") -> Floats:
    """A = D/(std r + eps), std unbiased and over the batch. Lite PPO, arXiv 2508.08221."""
    live, _, variance = _moments(step.rewards, _weights(step, weighting), unbiased=True)
    return np.where(live, d / (np.sqrt(variance) + eps), 0.0)


def group_std(d: Floats, step: Step, *, eps: float = 1e-6) -> Floats:
    """A = D/(std_g + eps), std unbiased and of the prompt's rewards. GRPO, arXiv 2402.03300."""
    std = np.sqrt(np.bincount(step.groups, step.centred * step.centred) / (step.size - 1))
    return d / (std[step.groups] + eps)


def whiten(d: Floats, step: Step, *, eps: float = 1e-8, weighting: str = "token") -> Floats:
    """A = (D - mu)/sqrt(var + eps), mu and var over tokens. REINFORCE++, arXiv 2501.03262.

    The return is D_i at each of the L_i tokens of a response, so lengths are enough::

        N = sum L_i,  mu = sum L_i*D_i / N,  var = sum L_i*(D_i - mu)^2 / (N - 1)

    The variance is unbiased and eps is inside the root, as in verl's masked whitening. "sequence" has a 1
    in place of each L_i > 0. Where returns differ between tokens, see `whiten_tokens`.
    """
    return _whiten(d, step.lengths if weighting == "token" else np.sign(step.lengths), eps)


def mean(d: Floats, step: Step, *, floor: float = 0.01) -> Floats:
    """A = D/max(b, floor). MaxRL, arXiv 2602.02710."""
    return d / np.maximum(step.rewards - d, floor)


def bernoulli_std(d: Floats, step: Step, *, floor: float = 0.01) -> Floats:
    """A = D/sqrt(p(1 - p)), p = b within [floor, 1 - floor]. DBB, arXiv 2603.18444v1, eq. 13; floor ours."""
    p = np.clip(step.rewards - d, floor, 1 - floor)
    return d / np.sqrt(p * (1 - p))


NORMALISATIONS: dict[str, Callable[..., Floats]] = {
    f.__name__: f for f in (none, batch_std, reward_std, group_std, whiten, mean, bernoulli_std)
}


def check_options(*, eps: float = 1.0, weighting: str = "token", floor: float = 0.01) -> None:
    """Raise ValueError for an option of the functions above that is out of its range."""
    check_number("eps", eps)
    if weighting not in ("sequence", "token"):
        raise ValueError(f"weighting must be 'sequence' or 'token', not {weighting!r}")
    check_number("floor", floor)
    if floor >= 0.5:
        raise ValueError(f"floor must be below 0.5, not {floor}")


def returns_to_go(d: Floats, lengths: Ints, penalties: ArrayLike) -> Floats:
    """G_t = D - sum of the penalties from token t on, of the response that t belongs to; (N,) float64.

    The return without discount of D at the last token and -penalty_t at each: how KL enters the reward in
    REINFORCE++, arXiv 2501.03262. The (N,) penalties are those of the tokens, responses end to end,
    multiplied by their coefficient.
    """
    penalty = per_token("penalties", penalties, lengths)
    ends = np.cumsum(lengths)
    before = np.concatenate([[0.0], np.cumsum(penalty)])  # before[t]: all penalties ahead of token t
    return np.repeat(d - before[ends], lengths) + before[:-1]


def whiten_tokens(values: ArrayLike, lengths: Ints, eps: float, weighting: str) -> FloatVector:
    """(x - mu)/sqrt(var + eps) of (N,) values of the tokens, responses end to end; (N,) float32.

    mu and var are over tokens, or with "sequence" over responses: each that has a token counts the same,
    its tokens sharing its weight.
    """
    check_options(eps=eps, weighting=weighting)
    x = per_token("values", values, lengths)
    if weighting == "token":
        return _whiten(x, np.ones(len(x)), eps).astype(np.float32)
    live = lengths[lengths > 0]
    return _whiten(x, np.repeat(1 / live, live), eps, total=len(live)).astype(np.float32)


def _weights(step: Step, weighting: str) -> Floats | Ints:
    return step.lengths if weighting == "token" else np.ones(len(step.rewards))


def _moments(
    x: Floats, counts: Floats | Ints, unbiased: bool, total: float | None = None
) -> tuple[NDArray[np.bool_], float, float]:
    """Which of x are to be scaled, none where those that count do not differ; mean and variance of x.

    x[i] occurs ``counts[i]`` times, and all occur ``total`` times, None for the sum of the counts.
    """
    total = counts.sum() if total is None else total
    live = counts > 0
    if not live.any() or np.ptp(x[live]) == 0 or (unbiased and total < 2):
        return np.zeros(len(x), bool), 0.0, 1.0
    average = (counts * x).sum() / total
    return live, average, (counts * (x - average) ** 2).sum() / (total - unbiased)


def _whiten(x: Floats, counts: Floats | Ints, eps: float, total: float | None = None) -> Floats:
    live, average, variance = _moments(x, counts, unbiased=True, total=total)
    return np.where(live, (x - average) / np.sqrt(variance + eps), 0.0)
