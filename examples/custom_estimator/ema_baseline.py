"""A method of your own: REINFORCE against a moving average of the run's rewards."""

from typing import Any

import numpy as np

from mssr.algorithms import Estimator


class EMABaseline(Estimator):
    """A = r - m, where m <- decay * m + (1 - decay) * mean(r) after every step."""

    state = ("mean",)  # what a resumed run needs

    def __init__(self, *, decay: float = 0.9, start: float = 0.5) -> None:  # algorithm.options
        self.decay, self.mean = decay, start

    def difference(self, step: Any) -> Any:
        return step.rewards - self.mean

    def observe(self, prompt_ids: Any, rewards: Any, kl: Any) -> None:
        self.mean = self.decay * self.mean + (1 - self.decay) * float(np.mean(rewards))

    def metrics(self) -> dict[str, float]:
        return {"baseline/mean": self.mean}
