"""pytest examples/custom_estimator"""

from pathlib import Path

from mssr import algorithms
from mssr.runs.config import load_config

HERE = Path(__file__).parent


def test_the_baseline_follows_the_rewards() -> None:
    config = load_config(HERE / "digits.yaml")
    method = algorithms.create(config.algorithm.name, **config.estimator_options)
    assert method.advantages(["a", "b"], [1, 0], [5, 5])[0].tolist() == [0.5, -0.5]
    method.observe(["a", "b"], [1, 1], 0.0)
    assert abs(method.mean - 0.6) < 1e-12 and method.advantages(["a"], [1], [5])[0][0] < 0.5
    again = algorithms.create(config.algorithm.name)
    again.load_state_dict(method.state_dict())
    assert again.metrics() == {"baseline/mean": method.mean}
