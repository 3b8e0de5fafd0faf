"""SPO: single-rollout training whose memory fades with each prompt's own drift.

Source: arXiv 2509.13232.
"""

from __future__ import annotations

from mssr.algorithms.registry import register
from mssr.algorithms.single_rollout import SingleRollout


@register("spo")
class SPO(SingleRollout):
    """`SingleRollout` with the defaults of SPO, and prompts drawn by the uncertainty of their value.

    rho = 2^(-D/half_life) clamped to [eta_min, eta_max], where D is the mean change of a log-prob in the
    prompt's previous response since it was given. Eight responses for each prompt start its baseline:
    a = 8(s + 1/2)/9 and b = 8(8 - s + 1/2)/9 for s successes.

    Args: as of `SingleRollout`.
    """

    default_sampler = "uncertainty"

    def __init__(
        self,
        *,
        prior_strength: float = 1.0,
        prior_mean: float | None = None,
        init_rollouts: int = 8,
        init_strength: float | None = None,
        init_smoothing: float = 0.5,
        eta: float | None = None,
        eta_min: float = 0.875,
        eta_max: float = 0.96,
        kl_target: float = 0.01,
        window: int = 20,
        eta_rule: str = "half_life",
        kl_source: str = "last_visit",
        half_life: float = 0.06,
        weighting: str = "sequence",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(
            prior_strength=prior_strength,
            prior_mean=prior_mean,
            init_rollouts=init_rollouts,
            init_strength=init_strength,
            init_smoothing=init_smoothing,
            eta=eta,
            eta_min=eta_min,
            eta_max=eta_max,
            kl_target=kl_target,
            window=window,
            eta_rule=eta_rule,
            kl_source=kl_source,
            half_life=half_life,
            weighting=weighting,
            eps=eps,
        )
