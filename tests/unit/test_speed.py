"""What a record says of speed and memory, and where it is shown."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mssr.actor import operations
from mssr.cluster.ray_calls import Worker
from mssr.cluster.ray_cluster import RayCluster
from mssr.models.gpus import KINDS
from mssr.runs.console import Console
from mssr.runs.plot import summary
from mssr.trainer.timing import speed

pytestmark = pytest.mark.unit
STEP = {
    "rollout/tokens": 4000.0,
    "rollout/prompt_tokens": 6000.0,
    "timing/step_s": 10.0,
    "timing/update_s": 5.0,
    "perf/update_tera_operations": 8000.0,
}
ON_GPUS = {"perf/gpus": 4.0, "perf/gpu_peak_tflops": 989.4}


def test_speed_on_gpus() -> None:
    """Two ranks: 8000e12 operations in 5 s are 800e12 a second and rank."""
    assert speed(STEP | ON_GPUS, rollouts=20, ranks=2) == pytest.approx(
        {
            "perf/rollouts_per_s": 2.0,
            "perf/tokens_per_s": 400.0,
            "perf/tokens_per_s_per_gpu": 250.0,
            "perf/update_tflops": 800.0,
            "perf/mfu": 800 / 989.4,
        }
    )


def test_without_gpus_there_is_neither_their_share_nor_mfu() -> None:
    """Absent, not 0."""
    assert speed(STEP, 20, 2).keys() == {"perf/rollouts_per_s", "perf/tokens_per_s", "perf/update_tflops"}


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA L4", 121.0), ("NVIDIA H100 MIG 1g.10gb", None)])
def test_the_peak_is_that_of_the_device(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(operations, "model_operations", lambda *args: 3e12)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    nothing: Any = None
    found = operations.work_metrics(nothing, nothing, nothing, nothing, torch.device("cuda", 0))
    assert found.pop("perf/update_tera_operations") == 3.0
    assert found.get("perf/gpu_peak_tflops") == peak
    on_cpu = operations.work_metrics(nothing, nothing, nothing, nothing, torch.device("cpu"))
    assert on_cpu == {"perf/update_tera_operations": 3.0}


def test_what_engines_say_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = object.__new__(RayCluster)
    cluster._engines = [Worker(f"engine {k}", Mock()) for k in range(3)]
    found: dict[str, list[Any]] = {
        "rss_gib": [1.0, 2.0],
        "metrics": [
            {"memory/rollout_rss_gib": 4.0, "perf/preemptions": 3.0, "perf/kv_cache_usage": 0.5},
            None,  # it was replaced
            {"memory/rollout_rss_gib": 3.0, "perf/preemptions": 2.0, "perf/kv_cache_usage": 0.75},
        ],
    }
    monkeypatch.setattr(cluster, "_call_ranks", found.__getitem__)
    monkeypatch.setattr(cluster, "_call_engines", lambda engines, method: found[method])
    units = [SimpleNamespace(needs={"CPU": 1.0, "GPU": 1.0}), SimpleNamespace(needs={"CPU": 2.0, "GPU": 2.0})]
    vars(cluster)["_places"] = SimpleNamespace(units=units)
    metrics = cluster.metrics()
    driver = metrics.pop("memory/driver_rss_gib")
    assert metrics.pop("memory/total_rss_gib") == pytest.approx(driver + 3 + 7)
    assert metrics == {
        "memory/actor_rss_gib": 2.0,
        "memory/rollout_rss_gib": 4.0,
        "perf/gpus": 3.0,
        "perf/preemptions": 5.0,
        "perf/kv_cache_usage": 0.75,
    }
    vars(cluster)["_places"] = SimpleNamespace(units=[SimpleNamespace(needs={"CPU": 1.0})])
    found["metrics"] = [{"memory/rollout_rss_gib": 4.0}]
    assert not cluster.metrics().keys() & {"perf/gpus", "perf/preemptions"}


def test_the_line_and_the_summary_say_it_where_it_is_known() -> None:
    shown = {"reward/accuracy": 0.5, "policy/entropy": 0.3, "policy/kl_update": 0.001}
    step = shown | STEP | {"step": 1, "memory/total_rss_gib": 9.0}
    gpu_step = step | ON_GPUS | {"memory/actor_gpu_gib": 71.5, "memory/rollout_gpu_gib": 60.0}
    lines, rows = [], []
    for record in (step, gpu_step):
        record = record | speed(record, 20, 2)
        stream = io.StringIO()
        console = Console(stream, "plain", 2)
        console.begin(0)
        console.step(1, record)
        lines.append(stream.getvalue())
        rows.append(dict(summary([record])))
    assert "  2 rollouts/s  " in lines[0] and "GPU" not in lines[0] and "MFU" not in lines[0]
    assert "  2 rollouts/s  250 tokens/s/GPU  MFU 81%  " in lines[1]
    on_gpus = {
        "tokens/s/GPU, median": "250",
        "MFU of the update, median": "80.9%",
        "peak GPU memory of a rank, GiB": "71.50",
        "peak GPU memory of an engine, GiB": "60.00",
    }
    assert rows[1] == rows[0] | on_gpus and not rows[0].keys() & on_gpus.keys()


def test_every_kind_that_trains_has_a_peak() -> None:
    assert [k.name for k in KINDS.values() if k.bf16_flops is None] == ["V100-32GB", "V100-16GB", "T4-16GB"]
