"""The methods as the driver calls them, their registry, and the cost of importing them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from mssr import algorithms
from mssr.algorithms import Algorithm
from mssr.algorithms.methods import ALGORITHMS
from mssr.errors import UserError
from tests.unit import formulas as advantages

pytestmark = pytest.mark.unit

ALL = "dr_grpo grpo lite_ppo mssr mvsr reinforce_pp reinforce_pp_baseline rloo spo".split()
NEW = ["dbb", "flash_reinforce", "maxrl"]  # by value in test_combinations.py
GROUP_METHODS = "dr_grpo grpo lite_ppo reinforce_pp_baseline rloo".split()
SINGLE_ROLLOUT = ["mssr", "mvsr", "spo"]
BATCH_STATISTICS = [*SINGLE_ROLLOUT, "lite_ppo", "reinforce_pp", "reinforce_pp_baseline"]


def kl_of(algorithm: Algorithm, kl: float, rollouts: int) -> float | list[float]:
    """What `observe` wants: one number, or each response's."""
    return [kl] * rollouts if algorithm.kl_source == "last_visit" else kl


def test_the_methods_are_there_with_their_defaults() -> None:
    assert algorithms.names() == sorted(ALL + NEW)
    for name in ALL:
        algorithm = algorithms.create(name)
        assert algorithm.name == name
        assert algorithm.default_n == (8 if name in GROUP_METHODS else 1)
        assert algorithm.min_n == (2 if name in GROUP_METHODS else 1)
        assert algorithm.shapes_entropy == (name == "mssr")
        aggregations = {"dr_grpo": "constant_length", "lite_ppo": "token_mean"}
        assert algorithm.aggregation == aggregations.get(name)
        assert algorithm.default_sampler == ("uncertainty" if name == "spo" else "epochs")
        assert algorithm.kl_source == ("last_visit" if name == "spo" else "update")
        assert algorithm.divergence == ("abs" if name == "spo" else "k3")
        assert algorithm.init_rollouts == (8 if name == "spo" else 0)
        assert algorithm.bounded_rewards == (name in SINGLE_ROLLOUT)
        assert (algorithm.baseline is not None) == (name in SINGLE_ROLLOUT)
        weightings = {name: "sequence" for name in (*SINGLE_ROLLOUT, "lite_ppo")}
        weightings |= {"reinforce_pp": "token", "reinforce_pp_baseline": "token"}
        assert algorithms.options(name).get("weighting") == weightings.get(name)
    assert algorithms.options("rloo") == algorithms.options("dr_grpo") == {}
    assert algorithms.options("grpo") == {"eps": 1e-6}


@pytest.mark.parametrize("name", GROUP_METHODS)
def test_group_methods_group_by_prompt_id(name: str) -> None:
    algorithm = algorithms.create(name)
    ids = ["b", "a", "b", "a", "c", "c"]
    rewards = np.array([1, 0, 0, 0, 1, 1], np.float32)
    signal, metrics = algorithm.advantages(ids, rewards, [1] * 6)
    lengths = [[1] * 6] if name == "reinforce_pp_baseline" else []
    expected = getattr(advantages, name)(rewards, [0, 1, 0, 1, 2, 2], *lengths)
    np.testing.assert_array_equal(signal, expected)
    assert signal[0] > 0 > signal[2]
    assert metrics["advantage/degenerate_fraction"] == pytest.approx(4 / 6)
    assert metrics["advantage/std"] == pytest.approx(float(np.std(expected)))
    assert "baseline/unseen_fraction" not in metrics and algorithm.metrics() == {}
    with pytest.raises(ValueError, match="n >= 2"):
        algorithm.advantages(["a", "b"], [1, 0], [1, 1])


@pytest.mark.parametrize("name", ["grpo", "lite_ppo", "reinforce_pp", "reinforce_pp_baseline"])
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


@pytest.mark.parametrize("name", ["mssr", "mvsr", "reinforce_pp", "spo"])
def test_a_batch_of_one_has_no_signal(name: str) -> None:
    signal, metrics = algorithms.create(name).advantages(["a"], [1.0], [4])
    assert signal.tolist() == [0.0] and metrics["advantage/degenerate_fraction"] == 1.0


@pytest.mark.parametrize("name", ALL + NEW)
def test_lengths_must_agree(name: str) -> None:
    algorithm = algorithms.create(name)
    with pytest.raises(ValueError, match="rewards of shape"):
        algorithm.advantages(["a", "a"], [1.0], [4, 7])
    with pytest.raises(ValueError, match="lengths of shape"):
        algorithm.advantages(["a", "a"], [1.0, 0.0], [4])


@pytest.mark.parametrize("name", ALL + NEW)
def test_wrong_batches_are_refused(name: str) -> None:
    advantages_of = algorithms.create(name).advantages
    for rewards, lengths, message in (
        ([1.0, math.nan], [4, 7], "(finite|must be in).*nan"),
        ([1.0, math.inf], [4, 7], "(finite|must be in).*inf"),
        ([1.0, 0.0], [4, -1], "lengths must be >= 0, not -1"),
        ([1.0, 0.0], [4, 1.5], "whole numbers of tokens, not 1.5"),
        ([1.0, 0.0], [4, math.nan], "whole numbers of tokens, not nan"),
    ):
        with pytest.raises(ValueError, match=message):
            advantages_of(["a", "a"], rewards, lengths)
    with pytest.raises(ValueError, match="single string 'aa'"):
        advantages_of("aa", [1.0, 0.0], [1, 1])
    with pytest.raises(ValueError, match="non-empty"):
        advantages_of([], [], [])


@pytest.mark.parametrize("name", sorted(set(ALL) - set(SINGLE_ROLLOUT)))
def test_rewards_may_have_any_scale(name: str) -> None:
    algorithm = algorithms.create(name)
    ids, lengths = ["a", "a", "b", "b"], [4, 7, 1, 2]
    plain, _ = algorithm.advantages(ids, [1.0, 0.0, 0.0, 1.0], lengths)
    moved, _ = algorithm.advantages(ids, [17.0, -3.0, -3.0, 17.0], lengths)
    scale = 20 if name in ("rloo", "dr_grpo") else 1
    np.testing.assert_allclose(moved, scale * plain, rtol=1e-4)


@pytest.mark.parametrize("name", BATCH_STATISTICS)
def test_weighting_reaches_the_advantages(name: str) -> None:
    batch = (["a", "a", "b", "b"], [1.0, 0.0, 0.0, 0.5], [1, 9, 2, 4])
    by_weighting = {
        weighting: algorithms.create(name, weighting=weighting).advantages(*batch)[0]
        for weighting in ("sequence", "token")
    }
    assert np.abs(by_weighting["sequence"] - by_weighting["token"]).max() > 0.05
    default, _ = algorithms.create(name).advantages(*batch)
    np.testing.assert_array_equal(default, by_weighting[algorithms.options(name)["weighting"]])


@pytest.mark.parametrize("name", ALL)
def test_an_empty_response_has_no_signal(name: str) -> None:
    signal, metrics = algorithms.create(name).advantages(["a", "a", "b", "b"], [1, 0, 1, 0], [3, 2, 0, 1])
    assert np.isfinite(signal).all() and signal[:2].any()
    assert metrics["advantage/degenerate_fraction"] == 0.25


@pytest.mark.parametrize("name", ALL + NEW)
def test_state_goes_on_exactly(name: str) -> None:
    rng = np.random.default_rng(10)
    original, restored = algorithms.create(name), algorithms.create(name)

    def batch() -> tuple[list[str], np.ndarray, np.ndarray]:
        ids = [f"p{i}" for i in rng.permutation(20)[:8]] * 2
        return ids, rng.integers(0, 2, 16).astype(np.float32), rng.integers(1, 50, 16)

    for _ in range(5):
        ids, rewards, _ = batch()
        original.observe(ids, rewards, kl_of(original, float(rng.random() * 0.05), len(ids)))
    restored.load_state_dict(original.state_dict())
    assert original.metrics() == restored.metrics()
    for _ in range(3):
        ids, rewards, lengths = batch()
        for a, b in zip(
            original.advantages(ids, rewards, lengths),
            restored.advantages(ids, rewards, lengths),
            strict=True,
        ):
            np.testing.assert_equal(a, b)
        for algorithm in (original, restored):
            algorithm.observe(ids, rewards, kl_of(algorithm, 0.003, len(ids)))
        assert original.metrics() == restored.metrics()


def test_state_of_another_method_is_refused() -> None:
    mvsr, grpo = algorithms.create("mvsr"), algorithms.create("grpo")
    for name in ("mssr", "spo"):
        algorithms.create(name).load_state_dict(mvsr.state_dict())
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
    for name in ("grpo", *BATCH_STATISTICS):
        with pytest.raises(ValueError, match="eps"):
            algorithms.create(name, eps=-1.0)
    for name in BATCH_STATISTICS:
        with pytest.raises(ValueError, match="weighting must be 'sequence' or 'token', not 'tokens'"):
            algorithms.create(name, weighting="tokens")


def test_a_users_method_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ALGORITHMS, "known", dict(ALGORITHMS.known))

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
    with pytest.raises(ValueError, match=r"taken by Method\(baseline='group_mean'"):
        algorithms.register("grpo")(Mine)
    with pytest.raises(ValueError, match="must be a keyword with a default"):

        @algorithms.register("theirs")
        class Theirs(Mine):
            def __init__(self, scale: float) -> None:
                super().__init__(scale=scale)


FILE_METHOD = """
from dataclasses import replace
from mssr.algorithms import Algorithm, Estimator, get
import numpy as np

SPO, GRPO = get("spo"), get("grpo")
Slower = replace(SPO, defaults={**SPO.defaults, "half_life": 0.2})

class Signs(Algorithm):
    aggregation = "sequence_mean"
    def __init__(self, *, scale=1.0):
        self.scale = scale
    def advantages(self, prompt_ids, rewards, lengths):
        return np.float32(self.scale) * np.sign(np.asarray(rewards, np.float32) - 0.5), {}

class Stricter(Estimator):
    min_n = 4

class Abstract(Algorithm):
    pass

class Demanding(Signs):
    def __init__(self, scale):
        super().__init__(scale=scale)

def function():
    pass
"""


def test_a_users_method_can_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FILE_METHOD)
    spec = f"{path}:Signs"
    assert algorithms.get(spec) is algorithms.get(spec)
    assert algorithms.get(spec).name == spec and algorithms.get(spec).aggregation == "sequence_mean"
    assert algorithms.options(spec) == {"scale": 1.0}
    signal, _ = algorithms.create(spec, scale=2.0).advantages(["a", "b"], [1, 0], [1, 1])
    assert signal.tolist() == [2.0, -2.0]
    with pytest.raises(ValueError, match="no option 'scal', did you mean 'scale'"):
        algorithms.create(spec, scal=2.0)
    slower = f"{path}:Slower"
    assert algorithms.options(slower) == algorithms.options("spo") | {"half_life": 0.2}
    built = algorithms.create(slower)
    assert built.name == slower and built.beta.discount.half_life == 0.2  # type: ignore[attr-defined]
    assert algorithms.get(f"{path}:Stricter").name == f"{path}:Stricter"
    strict = algorithms.create(f"{path}:Stricter").advantages
    assert strict(["a", "a"], [1, 0.5], [1, 1])[0].tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="has only one"):
        strict(["a", "b"], [1, 0.5], [1, 1])
    assert algorithms.get(f"{path}:GRPO") == replace(algorithms.get("grpo"), name=f"{path}:GRPO")
    assert algorithms.get("grpo").name == "grpo" and algorithms.names() == sorted(ALL + NEW)
    for attribute, message in {
        "Abstract": "Abstract does not define advantages",
        "Demanding": "option 'scale' of Demanding must be a keyword with a default",
        "function": "function is not a subclass of mssr.algorithms.Algorithm",
        "np": "np is not a subclass",
        "Sings": "has no class 'Sings', did you mean 'Signs'",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            algorithms.create(f"{path}:{attribute}")
        assert str(error.value).startswith(f"algorithm '{path}:{attribute}'")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must not contain a colon"):
        algorithms.register("a:b")


def test_importing_algorithms_loads_no_torch_and_nothing_else_of_ours() -> None:
    """Nor do the rewards, which are checked before a run: they know the config, the room below them."""
    program = (
        "import sys, mssr.algorithms\n"
        "def ours(*but):\n"
        "    rooms = {m.split('.')[1] for m in sys.modules if m.startswith('mssr.')}\n"
        "    return sorted(rooms - {'errors', 'device', *but})\n"
        "algorithms = ours('algorithms')\n"
        "import mssr.rewards\n"
        "light = 'torch' not in sys.modules\n"
        "mssr.algorithms.losses.policy_loss; mssr.algorithms.shaping.entropy_bonus\n"
        "heavy = sorted({'ray', 'transformers', 'vllm', 'datasets', 'omegaconf'} & set(sys.modules))\n"
        "print(light, heavy, algorithms, ours('algorithms', 'config', 'rewards'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True [] [] []"
