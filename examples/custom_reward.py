"""A reward function of one's own: full credit for the right answer, a little for the right format.

    mssr train configs/digits/mssr.yaml reward.name=examples/custom_reward.py:with_format_credit \
        reward.options.credit=0.2 experiment_name=digits-format-credit

A reward function takes the response and the ground truth, both text, and options as keyword arguments. It
returns a number, or a dict with ``score`` and any named parts, which appear in the metrics as
``reward/<part>``. The Beta baseline of the single-rollout methods needs scores in [0, 1]. Functions of many
responses, async ones, those of EasyR1, verl and TRL, and those that see the row are taken, too; see
docs/rewards.md.
"""

from __future__ import annotations

from mssr.rewards import rules


def with_format_credit(response: str, answer: str, *, credit: float = 0.1) -> dict[str, float]:
    """1 for the right answer, ``credit`` for `<think>..</think>\\boxed{..}` around a wrong one, else 0."""
    parts = rules.score("exact_match", response, answer).parts
    return {"score": max(parts["accuracy"], credit * parts["format"]), **parts}
