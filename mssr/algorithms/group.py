"""The group methods: each response against the others of its prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from numpy.typing import ArrayLike

from mssr.algorithms import advantages as estimators
from mssr.algorithms.advantages import Floats, FloatVector, Ints, check_weighting
from mssr.algorithms.base import Algorithm, Signal, check_batch, group_indices, register, signal_metrics
from mssr.algorithms.checks import check_number


class GroupMethod(Algorithm):
    """A formula over the rewards of each prompt's responses; zero where they are all equal."""

    default_n = 8
    min_n = 2

    @abstractmethod
    def estimate(self, rewards: Floats, groups: Ints, lengths: Ints) -> FloatVector:
        """(B,) advantages from (B,) rewards, groups as of `group_indices`, and lengths in tokens."""

    def advantages(self, prompt_ids: Sequence[str], rewards: ArrayLike, lengths: ArrayLike) -> Signal:
        r, tokens = check_batch(prompt_ids, rewards, lengths)
        groups = group_indices(prompt_ids)
        advantages = self.estimate(r, groups, tokens)
        return advantages, signal_metrics(advantages, estimators.constant_groups(r, groups), tokens)


@register("grpo")
@dataclass(kw_only=True, eq=False)
class GRPO(GroupMethod):
    """A = (r - mean_g)/(std_g + eps) with the unbiased std. arXiv 2402.03300."""

    choices = ("group_mean", "group_std")

    eps: float = 1e-6
    """Added to the standard deviation. verl has 1e-6, TRL 1e-4."""

    def __post_init__(self) -> None:
        check_number("eps", self.eps)

    def estimate(self, rewards: Floats, groups: Ints, lengths: Ints) -> FloatVector:
        return estimators.grpo(rewards, groups, self.eps)


@register("dr_grpo")
class DrGRPO(GroupMethod):
    """A = r - mean_g: GRPO without the divisions that favour easy prompts and long failures.

    The loss is the sum over tokens divided by a constant length, so that a token counts the same
    whatever the length of its response. arXiv 2503.20783.
    """

    choices = ("group_mean", "none")
    aggregation = "constant_length"

    def estimate(self, rewards: Floats, groups: Ints, lengths: Ints) -> FloatVector:
        return estimators.dr_grpo(rewards, groups)


@register("rloo")
class RLOO(GroupMethod):
    """A_i = r_i - mean of the others of its prompt. arXiv 2402.14740."""

    choices = ("leave_one_out", "none")

    def estimate(self, rewards: Floats, groups: Ints, lengths: Ints) -> FloatVector:
        return estimators.rloo(rewards, groups)


@register("lite_ppo")
@dataclass(kw_only=True, eq=False)
class LitePPO(GroupMethod):
    """A = (r - mean_g)/(std r + eps), std unbiased over the batch; the loss is a token mean.

    A prompt whose responses hardly differ is not scaled up, as it is in GRPO. arXiv 2508.08221.
    """

    choices = ("group_mean", "reward_std")
    aggregation = "token_mean"

    weighting: str = "sequence"
    """The standard deviation is over each "sequence" alike, or over each "token"."""
    eps: float = 1e-6
    """Added to the standard deviation. TRL's ``scale_rewards="batch"`` has 1e-4."""

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        check_number("eps", self.eps)

    def estimate(self, rewards: Floats, groups: Ints, lengths: Ints) -> FloatVector:
        return estimators.lite_ppo(rewards, groups, self.eps, lengths if self.weighting == "token" else None)
