"""D = r - b to advantages: (B,) float64 in, (B,) float32 out. v = r - D is the baseline.

- none: A = D
- batch_std: A = (D - mean D)/(std D + eps), std of the population (MSSR, arXiv 2512.18215)
- reward_std: A = D/(std r + eps), std unbiased over the batch (Lite PPO, arXiv 2508.08221)
- group_std: A = D/(std_g + eps), std unbiased of the prompt's rewards (GRPO, arXiv 2402.03300)
- whiten: A = (D - mu)/sqrt(var + eps), var unbiased (REINFORCE++, arXiv 2501.03262)
- mean: A = D/max(v, floor) (MaxRL, arXiv 2602.02710)
- bernoulli_std: A = D/sqrt(p(1 - p)), p = v within [floor, 1 - floor] (DBB, arXiv 2603.18444)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import Floats, FloatVector, Ints

NORMALISATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "batch_std": {"eps": 1e-6, "weighting": "sequence"},
    "reward_std": {"eps": 1e-6, "weighting": "sequence"},
    "group_std": {"eps": 1e-6},
    "whiten": {"eps": 1e-8, "weighting": "token"},
    "mean": {"floor": 0.01},
    "bernoulli_std": {"floor": 0.01},
}
"""The options that each reads."""


def normalise(
    name: str, d: Floats, r: Floats, groups: Ints, lengths: Ints, eps: float, weighting: str, floor: float
) -> FloatVector:
    """(B,) float32 advantages of (B,) differences ``d``, rewards ``r``, groups, and lengths in tokens."""
    weights = lengths if weighting == "token" else None
    if name == "batch_std":
        return estimators.single_rollout(d, np.zeros(len(d)), eps, weights)
    if name == "reward_std":
        return estimators.over_batch_std(d, r, eps, weights)
    if name == "group_std":
        return estimators.over_group_std(d, r, groups, eps)
    if name == "whiten":
        return estimators.reinforce_pp(d, np.sign(lengths) if weights is None else lengths, eps)
    if name == "mean":
        return (d / np.maximum(r - d, floor)).astype(np.float32)
    if name == "bernoulli_std":
        p = np.clip(r - d, floor, 1 - floor)
        return (d / np.sqrt(p * (1 - p))).astype(np.float32)
    return d.astype(np.float32)
