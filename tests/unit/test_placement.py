"""Where engines and ranks sit, and what is refused before anything is loaded; on a real cluster in
tests/e2e/test_two_nodes.py."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import ray
import torch

from mssr.cluster import machine, placement, preflight
from mssr.cluster.faults import explained, is_lost
from mssr.cluster.placement import Decision, Node, Places, Unit, decide, fit
from mssr.cluster.preflight import Found
from mssr.cluster.ray_calls import Failure, Worker
from mssr.cluster.ray_cluster import RayCluster
from mssr.cluster.ray_generation import SPARE, Generation
from mssr.cluster.ray_start import worker_environment
from mssr.config import Config
from mssr.config.checks import validate
from mssr.config.loading import config_yaml
from mssr.errors import EngineError, TrainingError, UserError
from mssr.rollout.vllm_engine import MEMORY_HINT
from mssr.runs.config import load_config
from mssr.types import RolloutRequest, SamplingParams

pytestmark = pytest.mark.unit
DIGITS = Path(__file__).parents[2] / "configs/digits/mssr.yaml"


def make_config(**options: Any) -> Config:
    """``rollout__lag=1`` for rollout.lag=1."""
    config = Config()
    config.model.path, config.data.train = "model", "rows.jsonl"
    config.rollout.workers = config.actor.num_ranks = 4
    for key, value in options.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return config


@pytest.mark.parametrize(
    ("options", "device", "fits", "colocated", "words"),
    [
        ({}, "cuda", True, True, "it fits"),
        ({}, "cuda", False, False, "it does not"),
        ({}, "cpu", True, False, "on CPU"),
        ({"cluster__placement": "colocated"}, "cpu", False, True, "cluster.placement"),
        ({"cluster__placement": "apart"}, "cuda", True, False, "cluster.placement"),
        ({"rollout__lag": 1}, "cuda", True, False, "rollout.lag=1"),
        ({"actor__score_early": "always"}, "cuda", True, False, "actor.score_early=always"),
        ({"actor__num_ranks": 6}, "cuda", True, False, "actor.num_ranks=6"),
        ({"rollout__tensor_parallel": 2}, "cuda", True, False, "engines take 8 GPUs"),
        ({"rollout__workers": 2, "rollout__tensor_parallel": 2}, "cuda", True, True, "it fits"),
        ({"actor__num_ranks": 0, "cluster__placement": "colocated"}, "cuda", True, False, "no ranks"),
    ],
)
def test_which_placement_is_chosen(
    monkeypatch: pytest.MonkeyPatch, options: Any, device: str, fits: bool, colocated: bool, words: str
) -> None:
    said = (fits, "it fits" if fits else "it does not")
    monkeypatch.setattr(placement, "colocated_fits", lambda config, gpu_bytes: said)
    decision = decide(make_config(**options), device, 80 * 2**30)
    assert not decide(make_config(), "cuda", 0).colocated
    assert decision.colocated is colocated and words in str(decision)
    assert str(decision).startswith(f"placement {'colocated' if colocated else 'apart'}: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollout__lag": 1}, "rollout.lag=1 works at the same time; set cluster.placement=apart"),
        ({"actor__score_early": "always", "actor__updates_per_step": 4}, "actor.score_early=always works"),
        ({"actor__num_ranks": 3}, "rollout.workers=4 times rollout.tensor_parallel=1 is 4"),
        ({"rollout__tensor_parallel": 2}, "is 8, which must be actor.num_ranks=4"),
        ({"cluster__launcher": "local"}, "places processes, and cluster.launcher=local"),
        ({"cluster__env": {"LD_PRELOAD": "x"}}, "cluster.env.LD_PRELOAD is read before"),
        ({"cluster__env": {"CUDA_VISIBLE_DEVICES": "0"}}, "CUDA_VISIBLE_DEVICES is overwritten"),
        ({"cluster__env": {"OMP_NUM_THREADS": 4}}, "cluster.threads_per_actor"),
        ({"cluster__env": {"NCCL_IB_DISABLE": True}}, "cluster.env.NCCL_IB_DISABLE=true must be text"),
    ],
)
def test_what_colocated_engines_and_workers_environments_cannot_be(options: Any, words: str) -> None:
    config = make_config(cluster__placement="colocated")
    validate(config)
    for key, value in options.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    with pytest.raises(UserError) as error:
        validate(config)
    assert words in str(error.value) and "\n" not in str(error.value)


def units(*gpus: int) -> list[Unit]:
    return [Unit({"GPU": float(n), "CPU": float(n)}) for n in gpus]


def nodes(*gpus: int) -> list[tuple[str, dict[str, float]]]:
    return [(f"n{k}", {"GPU": float(n), "CPU": 64.0}) for k, n in enumerate(gpus)]


@pytest.mark.parametrize(
    ("wanted", "there", "found"),
    [
        ((1, 1), (8, 2), ["n1", "n1"]),  # the smallest node that holds all
        ((1,) * 10, (8, 2, 8), ["n2"] * 8 + ["n0"] * 2),
        ((4, 4, 1, 1), (6, 6), ["n1", "n0", "n1", "n1"]),
        ((4, 4), (6, 2), ["n0"]),  # six GPUs and two do not hold two units of four
    ],
)
def test_units_go_to_as_few_nodes_as_possible(wanted: Any, there: Any, found: list[str]) -> None:
    assert list(fit(units(*wanted), nodes(*there)).values()) == found


def test_places_are_sorted_by_node_and_gpu_and_a_rank_sits_on_the_gpu_of_its_engine_process() -> None:
    config = make_config(rollout__workers=3, rollout__tensor_parallel=2, actor__num_ranks=6)
    places = Places(config, "cuda", colocated=True)
    assert [unit.needs for unit in places.units] == [{"GPU": 2.0, "CPU": 4.0}] * 3
    where = [("10.0.0.10", ("0", "1")), ("10.0.0.9", ("10", "11")), ("10.0.0.9", ("2", "3"))]
    for unit, (address, gpus) in zip(places.units, where, strict=True):
        unit.node = unit.address = address
        unit.gpus = gpus
    places.sort()
    assert [seat.gpus for seat in places.engines] == [("2", "3"), ("10", "11"), ("0", "1")]
    assert [seat.gpus for seat in places.ranks] == [("2",), ("3",), ("10",), ("11",), ("0",), ("1",)]
    assert [places.ranks[k].unit is places.engines[k // 2].unit for k in range(6)] == [True] * 6


def test_too_few_gpus_is_a_line_with_what_there_is() -> None:
    config = make_config(actor__num_ranks=8, rollout__workers=2, rollout__tensor_parallel=4)
    places, apart = Places(config, "cuda", colocated=False), Decision(False, "as cluster.placement says")

    def node(address: str, total: float, free: float) -> Node:
        return Node(address, address, {"GPU": total, "CPU": 64.0}, {"GPU": free, "CPU": 64.0})

    with pytest.raises(UserError) as error:
        places.reserve([node("10.0.0.1", 8, 8), node("10.0.0.2", 4, 4)], apart)
    said = str(error.value)
    assert "actor.num_ranks=8 and rollout.workers=2 of 4 devices each (placement apart" in said
    assert "need 16 GPU, 16 CPU" in said and "4 of 4 GPU, 64 of 64 CPU on 10.0.0.2" in said
    assert "room for 6 of 10 parts" in said and "cluster.placement=colocated" in said
    held = str(places.no_room([node("10.0.0.1", 8, 8), node("10.0.0.2", 8, 3)], apart))
    assert "3 of 8 GPU" in held and "others hold the rest" in held


def test_a_place_is_looked_at_where_mssr_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its first import fails there, and not in a line."""
    modules: set[str] = set()

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            modules.add(module)
            return super().find_class(module, name)

    sent = Mock()
    monkeypatch.setattr(placement.ray, "remote", sent)
    monkeypatch.setattr(Unit, "strategy", None)
    Places._ask(Mock(), Unit({"CPU": 1.0}))
    [function] = sent.return_value.call_args.args
    Reader(io.BytesIO(ray.cloudpickle.dumps(function))).load()
    assert modules and not [name for name in modules if name.startswith("mssr")]


HERE = machine.describe()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"missing": ["/data/x"]}, "node 10.0.0.2 does not see /data/x"),
        ({"sees_run_dir": False}, "trainer.run_dir=runs/mssr: node 10.0.0.2 does not see"),
        ({"machine": None, "failure": "No module named 'mssr'"}, "cannot run mssr: No module named 'mssr'"),
        (
            {"machine": replace(HERE, gpus=(), gpu_problem="nvidia-smi failed")},
            "10.0.0.2: its GPUs cannot be used (nvidia-smi failed)",
        ),
        ({"machine": replace(HERE, driver="470.1", cuda="13.0", gpu_problem="")}, "580 or newer"),
        (
            {"machine": replace(HERE, host="b", gpu_problem="", versions=HERE.versions | {"ray": "2.1"})},
            "ray is 2.1 on b; ",
        ),
    ],
)
def test_a_node_that_cannot_work_is_refused_in_a_line(changes: dict[str, Any], words: str) -> None:
    good = Found("10.0.0.2", replace(HERE, gpu_problem=""))
    preflight.check(Config(), "cuda", [good])
    with pytest.raises(UserError) as error:
        preflight.check(Config(), "cuda", [good, replace(good, **changes)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_drivers_variables_and_the_configs_reach_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("NCCL_", "GLOO_", "VLLM_", "HF_"))]:
        monkeypatch.delenv(name)
    for name, value in {"NCCL_DEBUG": "INFO", "HF_HOME": "/hf", "VLLM_HOST_IP": "10.0.0.1", "X": "3"}.items():
        monkeypatch.setenv(name, value)
    config = make_config(cluster__env={"NCCL_DEBUG": "WARN", "X": None, "N": 1})
    assert worker_environment(config) == {"NCCL_DEBUG": "WARN", "HF_HOME": "/hf", "X": "3", "N": "1"}
    monkeypatch.delenv("X")
    with pytest.raises(UserError, match=r"env\.X=null takes the value from here"):
        worker_environment(config)


def test_a_secret_among_the_variables_is_taken_from_the_environment_and_not_written() -> None:
    with pytest.raises(UserError, match=r"cluster\.env\.HF_TOKEN looks like a secret"):
        load_config(DIGITS, ["cluster.env.HF_TOKEN=abc"])
    loaded = load_config(DIGITS, ["cluster.env.HF_TOKEN=null"])
    assert loaded.cluster.env == {"HF_TOKEN": None}
    assert "abc" not in config_yaml(make_config(cluster__env={"HF_TOKEN": "abc"}))


def test_a_worker_may_take_start_timeout_s_to_start() -> None:
    limits: list[float] = []

    class Patient:
        def gather(self, refs: list[Any], hang_timeout_s: float, **_: Any) -> list[Any]:
            limits.append(hang_timeout_s)
            return [None for _ in refs]

    cluster = RayCluster.__new__(RayCluster)
    cluster._config, cluster._calls = make_config(cluster__start_timeout_s=7.0), Patient()  # type: ignore
    cluster._stop = lambda: False
    cluster._started([(Worker("engine 0", None), "ref")])
    assert limits == [7.0]


CUDA_ERROR = "CUDA error: uncorrectable ECC error encountered"
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError(CUDA_ERROR), True),
        (torch.AcceleratorError("the GPU has fallen off the bus"), True),
        (RuntimeError("NCCL error: unhandled system error"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), True),
        (torch.OutOfMemoryError(NO_MEMORY), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_a_broken_device_is_lost_and_one_that_is_full_is_not(error: Exception, lost: bool) -> None:
    assert is_lost(Failure(Worker("actor rank 0", None), error)) is lost


@pytest.mark.parametrize(
    ("error", "setting"),
    [
        (torch.OutOfMemoryError(NO_MEMORY), "actor.micro_batch_tokens"),
        (EngineError(f"vLLM failed: {NO_MEMORY}; {MEMORY_HINT}"), "rollout.gpu_memory_utilization"),
    ],
)
def test_out_of_memory_names_the_settings(error: Exception, setting: str) -> None:
    told = explained(Failure(Worker("worker 3", None), error))
    assert isinstance(told, TrainingError) and "\n" not in str(told)
    assert str(told).startswith("worker 3: ") and NO_MEMORY[:20] in str(told)
    assert str(told).count(setting) == 1
    assert told.__cause__ is error
    other = ValueError("a")
    assert explained(Failure(Worker("worker 3", None), other)) is other


def test_a_fast_engine_holds_a_second_of_spare_requests() -> None:
    job = Generation(None, [RolloutRequest("p", 0, 0)], SamplingParams(1.0, 8), slots=256)  # type: ignore[arg-type]
    spare = [job._most(rate) - 256 for rate in (0.0, 1.0, 100.0, 1000.0)]
    assert spare == [256 // SPARE, 256 // SPARE, 100, 128]
