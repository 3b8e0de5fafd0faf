"""The reward of digits.py; in a config of `mssr train` it is ``reward.name=examples/trl/reward.py:right``."""

from __future__ import annotations

import re

_ANSWER = re.compile(r"<think>.*?</think>.*?\\boxed\{([^{}]*)\}", re.DOTALL)


def right(response: str, answer: str) -> float:
    """1 for the right answer in the first box behind the thinking."""
    found = _ANSWER.search(response)
    return float(found is not None and found.group(1).strip() == answer)
