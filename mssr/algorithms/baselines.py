"""What is subtracted from a reward: D = r - b. The Beta baseline, which has a state, is in `baseline`.

- none: b = 0;  batch_mean: mean of the batch;  group_mean: mean of the responses to the prompt;
- leave_one_out: mean of the others of the prompt (RLOO, arXiv 2402.14740).

Shrinkage (arXiv 2511.03710, v2) moves the baseline of a prompt towards that of the others by the share
that noise has in how the prompts differ.
"""

from __future__ import annotations

import numpy as np

from mssr.algorithms.advantages import Floats, Ints, centred

STATELESS = ("none", "batch_mean", "group_mean", "leave_one_out")


def difference(name: str, rewards: Floats, groups: Ints, method: str) -> Floats:
    """(B,) float64 D of (B,) rewards; exactly 0 where the rewards of a group (or the batch) are equal."""
    if name == "none":
        return rewards
    if name == "batch_mean":
        return centred(rewards, np.zeros(len(rewards), np.int64), "")
    d = centred(rewards, groups, method)
    size = np.bincount(groups)[groups]
    return size / (size - 1) * d if name == "leave_one_out" else d


def shrink_groups(rewards: Floats, values: Floats, groups: Ints) -> Floats:
    """(B,) r - ((1 - lam_g)*b + lam_g*m_g), with m_g the mean of the other prompts' means.

    lam_g = min(noise / total, 1), over the other prompts: noise is the mean of s^2/n, with s^2 unbiased,
    and total the unbiased variance of their means, which is noise and true difference together (positive
    part of James and Stein). Own rewards enter neither, so leave_one_out stays unbiased. 0 with fewer
    than two others, or where nothing differs.
    """
    size, mean = np.bincount(groups), np.bincount(groups, rewards) / np.bincount(groups)
    noise = np.bincount(groups, (rewards - mean[groups]) ** 2) / (size - 1) / size
    others = len(size) - 1
    if others < 2:
        return rewards - values
    target = (mean.sum() - mean) / others
    squares = ((mean - mean.mean()) ** 2).sum() - (mean - mean.mean()) ** 2 * (others + 1) / others
    share = _share((noise.sum() - noise) / others, squares / (others - 1))[groups]
    return rewards - ((1 - share) * values + share * target[groups])


def shrink_values(rewards: Floats, values: Floats, evidence: Floats) -> Floats:
    """(B,) (1 - lam)*v + lam*m for one response a prompt: m is the mean of the other rewards.

    lam = noise/(noise + var v), noise = v(1 - v)/(a + b + 1), the variance of Beta(a, b), and var v the
    unbiased variance over the batch; ``evidence`` is (B,) a + b. Ours: the source has groups only.
    """
    if len(rewards) < 2:
        return values
    noise = values * (1 - values) / (evidence + 1)
    share = _share(noise, noise + values.var(ddof=1))
    return (1 - share) * values + share * (rewards.sum() - rewards) / (len(rewards) - 1)


def _share(part: Floats, total: Floats) -> Floats:
    """part/total in [0, 1]; 0 where there is no part, 1 where rounding leaves nothing but it."""
    return np.where(part > 0, np.minimum(part / np.maximum(total, np.finfo(float).tiny), 1.0), 0.0)
