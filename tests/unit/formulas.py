"""Advantages of bare arrays by the methods' names; ``groups`` are any labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mssr import algorithms
from mssr.algorithms import normalisations
from mssr.algorithms.step import Step


def _of(name: str, rewards: Any, groups: Any, lengths: Any = None, **options: Any) -> npt.NDArray[np.float32]:
    lengths = np.ones(len(rewards)) if lengths is None else lengths
    return algorithms.create(name, **options).advantages(groups, rewards, lengths)[0]


def grpo(rewards: Any, groups: Any, eps: float = 1e-6) -> npt.NDArray[np.float32]:
    return _of("grpo", rewards, groups, eps=eps)


def dr_grpo(rewards: Any, groups: Any) -> npt.NDArray[np.float32]:
    return _of("dr_grpo", rewards, groups)


def rloo(rewards: Any, groups: Any) -> npt.NDArray[np.float32]:
    return _of("rloo", rewards, groups)


def lite_ppo(rewards: Any, groups: Any, eps: float = 1e-6, weights: Any = None) -> npt.NDArray[np.float32]:
    weighting = "sequence" if weights is None else "token"
    return _of("lite_ppo", rewards, groups, weights, eps=eps, weighting=weighting)


def reinforce_pp(rewards: Any, lengths: Any, eps: float = 1e-8) -> npt.NDArray[np.float32]:
    return _of("reinforce_pp", rewards, [str(i) for i in range(len(rewards))], lengths, eps=eps)


def reinforce_pp_baseline(
    rewards: Any, groups: Any, lengths: Any, eps: float = 1e-8
) -> npt.NDArray[np.float32]:
    return _of("reinforce_pp_baseline", rewards, groups, lengths, eps=eps)


def single_rollout(
    rewards: Any, values: Any, eps: float = 1e-6, weights: Any = None
) -> npt.NDArray[np.float32]:
    count = np.size(rewards)
    step = Step.of([str(i) for i in range(count)], rewards, np.ones(count) if weights is None else weights)
    weighting = "sequence" if weights is None else "token"
    d = step.rewards - np.asarray(values, np.float64)
    return normalisations.batch_std(d, step, eps=eps, weighting=weighting).astype(np.float32)


def constant_groups(rewards: Any, groups: Any) -> npt.NDArray[np.bool_]:
    return Step.of(groups, rewards, np.ones(len(rewards))).constant


def returns_to_go(rewards: Any, lengths: Any, penalties: Any) -> npt.NDArray[np.float64]:
    r = np.asarray(rewards, np.float64)
    return normalisations.returns_to_go(r, np.asarray(lengths, np.int64), penalties)


def whiten(values: Any, lengths: Any, eps: float, weighting: str) -> npt.NDArray[np.float32]:
    return normalisations.whiten_tokens(values, np.asarray(lengths, np.int64), eps, weighting)
