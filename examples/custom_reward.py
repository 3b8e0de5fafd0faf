"""A reward function of one's own: full credit for the right answer, a little for the right format.

    mssr train configs/digits/mssr.yaml reward.name=examples/custom_reward.py:with_format_credit \
        experiment_name=digits-format-credit

A reward function takes the response and the ground truth, both text. It returns a number, or a dict with
``score`` and any named parts, which appear in the metrics as ``reward/<part>``. The Beta baseline of the
single-rollout methods needs scores in [0, 1].
"""

from __future__ import annotations

from mssr.rewards.exact_match import exact_match

FORMAT_CREDIT = 0.1


def with_format_credit(response: str, answer: str) -> dict[str, float]:
    """1 for the right answer, 0.1 for `<think>..</think>\\boxed{..}` around a wrong one, else 0."""
    result = exact_match(response, answer)
    score = max(result.parts["accuracy"], FORMAT_CREDIT * result.parts["format"])
    return {"score": score, **result.parts}
