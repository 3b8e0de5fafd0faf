"""The methods as the driver calls them, their registry, and the cost of importing them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from mssr import algorithms
from mssr.algorithms import Algorithm, advantages
from mssr.algorithms import registry as registry_module

pytestmark = pytest.mark.unit

ALL = "dr_grpo grpo lite_ppo mssr mvsr reinforce_pp reinforce_pp_baseline rloo spo".split()
GROUP_METHODS = "dr_grpo grpo lite_ppo reinforce_pp_baseline rloo".split()


def test_the_methods_are_there_with_their_defaults() -> None:
    assert algorithms.names() == ALL
    for name in ALL:
        algorithm = algorithms.create(name)
        assert algorithm.name == name
        assert algorithm.default_n == (8 if name in GROUP_METHODS else 1)
        assert algorithm.min_n == (2 if name in GROUP_METHODS else 1)
        assert algorithm.shapes_entropy == (name == "mssr")
    assert algorithms.options("rloo") == {}
    assert algorithms.options("grpo") == {"eps": 1e-6}
    assert algorithms.options("mssr") == algorithms.options("mvsr")
    assert algorithms.options("mssr")["kl_target"] == 0.01


@pytest.mark.parametrize("name", ["mvsr", "mssr"])
def test_single_rollout_reads_the_baseline_before_it_updates(name: str) -> None:
    algorithm = algorithms.create(name, prior_mean=0.5)
    ids, rewards, lengths = ["x", "y", "z"], [1.0, 0.0, 1.0], [3, 3, 3]
    first, metrics = algorithm.advantages(ids, rewards, lengths)
    expected = advantages.single_rollout(rewards, [0.5] * 3)
    np.testing.assert_array_equal(first, expected)
    assert metrics["baseline/unseen_fraction"] == 1.0
    assert metrics["advantage/std"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["advantage/degenerate_fraction"] == 0.0
    again, _ = algorithm.advantages(ids, rewards, lengths)
    np.testing.assert_array_equal(again, first)  # asking does not learn

    algorithm.observe(ids, rewards, kl=0.005)  # eta .9175: a, b = .45875 + r, .45875 + 1 - r
    high = 1.45875 / 1.9175
    assert algorithm.metrics() == pytest.approx({"baseline/eta": 0.9175, "baseline/mean": (1 + high) / 3})
    second, metrics = algorithm.advantages(["x", "y", "new"], rewards, lengths)
    np.testing.assert_allclose(second, advantages.single_rollout(rewards, [high, 1 - high, 0.5]), rtol=1e-5)
    assert metrics["baseline/unseen_fraction"] == pytest.approx(1 / 3)


def test_observe_uses_the_new_eta() -> None:
    means = []
    for kl in (0.0, 1.0):
        algorithm = algorithms.create("mvsr")
        for reward in (1.0, 1.0, 1.0, 0.0):
            algorithm.observe(["x"], [reward], kl=kl)
        means.append(algorithm.metrics()["baseline/mean"])
    assert means[1] < means[0]  # a changing policy forgets its old successes faster


@pytest.mark.parametrize("name", ["mvsr", "mssr"])
def test_every_option_of_single_rollout_changes_something(name: str) -> None:
    def run(**settings: float) -> list[float]:
        algorithm = algorithms.create(name, **settings)
        for reward, kl in ((1.0, 0.002), (0.0, 0.004), (1.0, 0.02), (1.0, 0.003)):
            algorithm.observe(["x"], [reward], kl=kl)
        signal, _ = algorithm.advantages(["x", "y", "z"], [1.0, 0.0, 0.5], [1, 1, 1])
        return [*signal.tolist(), *algorithm.metrics().values()]

    changes = {
        "prior_strength": 5.0,
        "prior_mean": 0.1,
        "eta_min": 0.5,
        "eta_max": 0.99,
        "kl_target": 0.05,
        "window": 1,
        "eps": 0.5,
    }
    assert set(changes) == set(algorithms.options(name))
    for option, value in changes.items():
        assert run(**{option: value}) != run(), option


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_group_methods_group_by_prompt_id(name: str) -> None:
    algorithm = algorithms.create(name)
    ids = ["b", "a", "b", "a", "c", "c"]
    rewards = np.array([1, 0, 0, 0, 1, 1], np.float32)
    signal, metrics = algorithm.advantages(ids, rewards, [1] * 6)
    expected = getattr(advantages, name)(rewards, [0, 1, 0, 1, 2, 2])
    np.testing.assert_array_equal(signal, expected)
    assert signal[0] > 0 > signal[2]
    assert metrics["advantage/degenerate_fraction"] == pytest.approx(4 / 6)
    assert metrics["advantage/std"] == pytest.approx(float(np.std(expected)))
    assert "baseline/unseen_fraction" not in metrics and algorithm.metrics() == {}
    with pytest.raises(ValueError, match="n >= 2"):
        algorithm.advantages(["a", "b"], [1, 0], [1, 1])


@pytest.mark.parametrize("name", ["grpo", "reinforce_pp"])
def test_eps_reaches_the_advantages(name: str) -> None:
    batch = (["a", "a"], [1.0, 0.0], [2, 2])
    plain, _ = algorithms.create(name).advantages(*batch)
    damped, _ = algorithms.create(name, eps=1.0).advantages(*batch)
    assert 0 < damped[0] < 0.9 * plain[0]


def test_reinforce_pp_reads_the_lengths() -> None:
    algorithm = algorithms.create("reinforce_pp")
    signal, metrics = algorithm.advantages(["a", "b"], [1, 0], [1, 3])
    np.testing.assert_allclose(signal, [1.5, -0.5], rtol=1e-6)
    assert metrics["advantage/degenerate_fraction"] == 0.0
    _, metrics = algorithm.advantages(["a", "b", "c", "d"], [1, 0, 1, 0], [1, 3, 2, 0])
    assert metrics["advantage/degenerate_fraction"] == 0.25
    _, metrics = algorithm.advantages(["a", "b"], [1, 1], [1, 3])
    assert metrics["advantage/degenerate_fraction"] == 1.0


@pytest.mark.parametrize("name", ALL)
def test_a_batch_without_signal_is_all_degenerate(name: str) -> None:
    algorithm = algorithms.create(name)
    signal, metrics = algorithm.advantages(["a", "a"], [1.0, 1.0], [4, 7])
    assert (signal == 0).all() and signal.dtype == np.float32
    assert metrics["advantage/degenerate_fraction"] == 1.0 and metrics["advantage/std"] == 0.0


@pytest.mark.parametrize("name", ALL)
def test_lengths_must_agree(name: str) -> None:
    algorithm = algorithms.create(name)
    with pytest.raises(ValueError, match="rewards of shape"):
        algorithm.advantages(["a", "a"], [1.0], [4, 7])
    with pytest.raises(ValueError, match="lengths of shape"):
        algorithm.advantages(["a", "a"], [1.0, 0.0], [4])


@pytest.mark.parametrize("name", ALL)
def test_state_goes_on_exactly(name: str) -> None:
    rng = np.random.default_rng(10)
    original, restored = algorithms.create(name), algorithms.create(name)

    def batch() -> tuple[list[str], np.ndarray, np.ndarray]:
        ids = [f"p{i}" for i in rng.permutation(20)[:8]] * 2
        return ids, rng.integers(0, 2, 16).astype(np.float32), rng.integers(1, 50, 16)

    for _ in range(5):
        ids, rewards, _ = batch()
        original.observe(ids, rewards, float(rng.random() * 0.01))
    restored.load_state_dict(original.state_dict())
    for _ in range(3):
        ids, rewards, lengths = batch()
        for a, b in zip(
            original.advantages(ids, rewards, lengths),
            restored.advantages(ids, rewards, lengths),
            strict=True,
        ):
            np.testing.assert_equal(a, b)
        for algorithm in (original, restored):
            algorithm.observe(ids, rewards, 0.003)
        assert original.metrics() == restored.metrics()


def test_state_of_another_method_is_refused() -> None:
    mvsr, grpo = algorithms.create("mvsr"), algorithms.create("grpo")
    algorithms.create("mssr").load_state_dict(mvsr.state_dict())
    with pytest.raises(ValueError, match="another algorithm"):
        mvsr.load_state_dict(grpo.state_dict())
    with pytest.raises(ValueError, match="another algorithm"):
        grpo.load_state_dict(mvsr.state_dict())
    with pytest.raises(ValueError, match="version"):
        grpo.load_state_dict({"version": 7})


def test_the_registry_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"'gropo', did you mean 'grpo'\?.*'reinforce_pp'"):
        algorithms.create("gropo")
    with pytest.raises(ValueError, match=r"no option 'kl_taget', did you mean 'kl_target'\?"):
        algorithms.create("mssr", kl_taget=0.1)
    with pytest.raises(ValueError, match="eta_min"):
        algorithms.create("mssr", eta_min=2.0)
    for name in ("mssr", "grpo", "reinforce_pp"):
        with pytest.raises(ValueError, match="eps"):
            algorithms.create(name, eps=-1.0)


def test_a_users_method_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "_registry", dict(registry_module._registry))

    @algorithms.register("mine")
    class Mine(Algorithm):
        def __init__(self, *, scale: float = 2.0) -> None:
            self.scale = scale

        def advantages(
            self, prompt_ids: Sequence[str], rewards: npt.ArrayLike, lengths: npt.ArrayLike
        ) -> tuple[npt.NDArray[np.float32], dict[str, float]]:
            return self.scale * np.asarray(rewards, np.float32), {}

    assert algorithms.options("mine") == {"scale": 2.0}
    signal, _ = algorithms.create("mine", scale=3.0).advantages(["a"], [1.0], [1])
    assert signal.tolist() == [3.0]
    assert algorithms.create("mine").state_dict() == {"version": 1}
    with pytest.raises(ValueError, match="taken by GRPO"):
        algorithms.register("grpo")(Mine)
    with pytest.raises(ValueError, match="must be a keyword with a default"):

        @algorithms.register("theirs")
        class Theirs(Mine):
            def __init__(self, scale: float) -> None:
                super().__init__(scale=scale)


def test_importing_algorithms_is_quick_and_pure() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import mssr.algorithms; import mssr.rewards\n"
        "seconds = time.perf_counter() - start; light = 'torch' not in sys.modules\n"
        "mssr.algorithms.losses.policy_loss; mssr.algorithms.shaping.entropy_bonus\n"
        "heavy = sorted({'ray', 'transformers', 'vllm', 'datasets', 'omegaconf'} & set(sys.modules))\n"
        "ours = sorted(m for m in sys.modules if m.startswith('mssr.') and m.split('.')[1] not in"
        " ('algorithms', 'rewards', 'errors', 'plugins'))\n"
        "print(seconds < 2, light, heavy, ours)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True True [] []"
