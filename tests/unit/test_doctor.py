"""`mssr doctor`: every fault of a machine or cluster is a row that says what to do, and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from mssr.cluster import machine as facts
from mssr.cluster.machine import Gpu, Machine, describe
from mssr.cluster.ray_start import init_ray
from mssr.config import Config
from mssr.errors import UserError
from mssr.models.host_memory import disk_bytes
from mssr.models.shapes import read_shape
from mssr.runs.config import load_config
from mssr.tools import doctor, gpu_checks
from mssr.tools.cli import main
from mssr.tools.machine_checks import ERROR, OK, WARNING, Row, Run, guarded, machine_rows

H100 = Gpu(0, "GPU-aa", "NVIDIA H100 80GB HBM3", 80 * 2**30, 79 * 2**30, "9.0", False)
RUN = Run(weights_bytes=16_582_000_000, by_object_store=False, gpus_here=True)


def libraries_rows(machine: Machine) -> list[Row]:
    return list(guarded("here", "libraries", lambda: doctor._libraries(machine)))


def gpu_machine(**changes: Any) -> Machine:
    """A sound machine with two GPUs, but for the changes."""
    sound: dict[str, Any] = {
        "cuda": "13.0",
        "driver": "580.95.05",
        "gpus": (H100, dataclasses.replace(H100, index=1)),
        "memory_bytes": 2**40,
        "shm_bytes": 2**39,
        "shm_free_bytes": 2**39,
        "open_files": 2**20,
        "processes": -1,
        "locked_memory_bytes": -1,
        "rdma": True,
        "verbs": True,
        "compiler": "/usr/bin/gcc",
        "python_headers": True,
    }
    return dataclasses.replace(describe(), **(sound | changes))


def test_a_sound_machine_has_no_complaints() -> None:
    assert {row.status for row in machine_rows("here", gpu_machine(), RUN)} == {OK}


@pytest.mark.parametrize(
    ("changes", "check", "status", "words"),
    [
        ({"driver": "570.1"}, "driver", ERROR, "needs 580 or newer: install a newer driver"),
        ({"driver": "", "gpus": ()}, "driver", ERROR, "built for CUDA 13.0, but:"),
        ({"cuda": ""}, "driver", ERROR, "CPU build: scripts/setup.sh --gpu"),
        ({"gpus": (dataclasses.replace(H100, mig=True),)}, "GPUs", ERROR, "nvidia-smi -mig 0"),
        ({"gpus": (dataclasses.replace(H100, compute_capability="7.5"),)}, "GPUs", ERROR, "7.5"),
        ({"gpus": (dataclasses.replace(H100, free_bytes=2**34),)}, "GPUs", WARNING, "lacks 64.0 GiB of 80.0"),
        ({"gpus": (H100, dataclasses.replace(H100, name="NVIDIA L4"))}, "GPUs", WARNING, "of one kind"),
        ({"compiler": ""}, "compiler", ERROR, "no C compiler: apt-get install gcc:"),
        ({"python_headers": False}, "compiler", ERROR, "apt-get install python3."),
        ({"shm_bytes": 2**26, "shm_free_bytes": 2**26}, "shared memory", ERROR, "--ipc=host"),
        ({"shm_free_bytes": 2**33}, "shared memory", WARNING, "old files"),
        # 16 GiB are what docker run --shm-size 16g gives, 16.3e9 bytes of them the object store's.
        ({"shm_bytes": 2**34, "shm_free_bytes": 2**34}, "shared memory", WARNING, "weights have 15.4 GiB"),
        ({"open_files": 1024}, "limits", WARNING, "ulimit -n is 1024: ulimit -n 65536"),
        ({"processes": 1000}, "limits", WARNING, "ulimit -u"),
        ({"verbs": False}, "RDMA", WARNING, "libibverbs1"),
        ({"locked_memory_bytes": 65536}, "RDMA", WARNING, "ulimit -l unlimited"),
    ],
)
def test_each_fault_of_a_machine(changes: dict[str, Any], check: str, status: str, words: str) -> None:
    [row] = [row for row in machine_rows("here", gpu_machine(**changes), RUN) if row.status != OK]
    assert (row.check, row.status) == (check, status)
    assert words in f"{row.found}: {row.advice}"


def test_what_only_some_runs_need() -> None:
    small = gpu_machine(shm_bytes=2**34, shm_free_bytes=2**34)
    certain = dataclasses.replace(RUN, by_object_store=True)
    assert [r.check for r in machine_rows("here", small, certain) if r.status == ERROR] == ["shared memory"]
    head = gpu_machine(driver="", gpus=())
    elsewhere = dataclasses.replace(RUN, gpus_here=False)
    assert {row.status for row in machine_rows("node", head, elsewhere)} == {OK}
    bare = gpu_machine(cuda="", gpus=(), compiler="", python_headers=False)
    assert {row.status for row in machine_rows("cpu", bare, RUN)} == {OK}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library is loaded, no cluster is looked for."""
    found = {"device": "cpu", "gpus": 0, "nccl": "", "no_peer": []}
    monkeypatch.setattr(gpu_checks, "libraries", lambda: found)
    monkeypatch.setattr(doctor, "_RAY_ADDRESS_FILE", tmp_path / "none")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("quick")
def test_table_json_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert main(["doctor", "--json"]) == 0
    rows = [Row(**row) for row in json.loads(capsys.readouterr().out)]
    assert {"machine", "driver", "GPUs", "compiler", "shared memory", "libraries"} <= {r.check for r in rows}
    assert "hf_abc" not in str(rows)
    assert [r.advice for r in rows if r.status == WARNING and r.check == "environment"] == [
        "unset NCCL_P2P_DISABLE"
    ]
    # A driver too old for the torch that is installed ends with the code of wrong input, and a line.
    monkeypatch.setattr(
        facts, "describe", lambda: gpu_machine(driver="550.54")
    )  # nor does torch see its GPUs
    assert main(["doctor"]) == 2
    text = capsys.readouterr().out
    assert "  error    driver         the driver is 550.54" in text
    assert "-> install a newer driver on the host" in text and "errors: 2" in text


@pytest.mark.usefixtures("quick")
def test_a_config_is_checked_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("model: {path: m}\ndata: {train: a.parquet, val: a.parquet}\n")
    assert main(["doctor", "c.yaml", "--json", "rollout.wrkers=2"]) == 2
    [row] = [row for row in json.loads(capsys.readouterr().out) if row["status"] == ERROR]
    assert "did you mean rollout.workers" in row["found"]
    assert main(["doctor", "c.yaml", "model.path=./none", "--json"]) == 2
    assert "model.path: directory ./none does not exist" in capsys.readouterr().out
    for name in ("m", "m/model.safetensors", "a.parquet"):
        (tmp_path / name).mkdir() if name == "m" else (tmp_path / name).touch()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    assert main(["doctor", "c.yaml", "--json"]) == 0
    [files] = [row for row in json.loads(capsys.readouterr().out) if row["check"] == "files"]
    assert files["found"] == f"{tmp_path}/a.parquet, {tmp_path}/m"


@pytest.mark.usefixtures("quick")
def test_disk_for_the_checkpoints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = "Qwen/Qwen2.5-VL-7B-Instruct"
    (tmp_path / "c.yaml").write_text(f"model: {{path: {model}}}\ndata: {{train: a/b, val: a/b}}\n")
    config = load_config(tmp_path / "c.yaml")
    need = int(disk_bytes(config, read_shape(config.model)))
    assert need > 300e9  # four of 99 GB: the newest two, the best, and one that is being written
    for free, status in ((need + 1, OK), (need - 1, WARNING)):
        monkeypatch.setattr(facts, "free_disk", lambda path, free=free: free)
        main(["doctor", str(tmp_path / "c.yaml"), "--json"])
        [row] = [row for row in json.loads(capsys.readouterr().out) if row["check"] == "disk"]
        assert row["status"] == status


@pytest.mark.usefixtures("quick")
def test_a_check_that_fails_is_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise OSError("disk on fire\nmore")

    monkeypatch.setattr(gpu_checks, "libraries", broken)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "warning  libraries      could not be checked: disk on fire\n" in text and "environment" in text
    monkeypatch.setattr(facts, "describe", broken)
    assert main(["doctor"]) == 0
    assert "itself         could not be checked: disk on fire" in capsys.readouterr().out


def test_libraries_that_do_not_load_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    [row] = libraries_rows(gpu_machine())
    assert row.status == ERROR and "ImportError: libcudart.so.13: cannot open" in row.found


def test_gpus_that_torch_does_not_see_and_slow_links(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"device": "cuda", "gpus": 0, "nccl": "2.28.9", "no_peer": []}
    monkeypatch.setattr(gpu_checks, "libraries", lambda: found)
    assert [row.status for row in libraries_rows(gpu_machine())] == [OK, ERROR]
    found |= {"gpus": 2, "no_peer": [[0, 1], [1, 0]]}
    for speed, status in ((300.0, OK), (20.0, WARNING)):
        speeds = {"all_reduce": speed, "broadcast": speed}
        monkeypatch.setattr(gpu_checks, "bandwidth", lambda *args, speeds=speeds: speeds)
        _, peers, bandwidth = libraries_rows(gpu_machine())
        assert "[0, 1]" in peers.found and (bandwidth.check, bandwidth.status) == ("NCCL", status)
    busy = gpu_machine(gpus=(H100, dataclasses.replace(H100, free_bytes=2**30)))
    assert libraries_rows(busy)[-1].found == "not measured: the GPUs are in use"


def test_ranks_that_never_meet_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "_COLLECTIVES_TIMEOUT_S", 0.0)
    with pytest.raises(RuntimeError, match="no answer within 0 s"):
        gpu_checks.bandwidth([1], 2, f"127.0.0.1:{doctor._free_port()}", "gloo")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes that claim a GPU each."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    nodes.add_node(num_cpus=1, num_gpus=1)
    yield nodes
    nodes.shutdown()


@pytest.mark.usefixtures("quick")
def test_nodes_of_a_cluster(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").touch()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (tmp_path / "c.yaml").write_text(f"model: {{path: {tmp_path}/m}}\ndata: {{train: a/b, val: a/b}}\n")

    def rows(*arguments: str) -> tuple[int, dict[str, list[Row]]]:
        code = main(["doctor", str(tmp_path / "c.yaml"), "--json", "--address", cluster.address, *arguments])
        found: dict[str, list[Row]] = {}
        for row in json.loads(capsys.readouterr().out):
            found.setdefault(row["check"], []).append(Row(**row))
        assert not ray.is_initialized()
        return code, found

    code, found = rows(f"trainer.run_dir={tmp_path}/run")
    assert code == 0
    assert found["connection"][0].found.endswith("2 nodes")
    assert found["GPUs"][-1].found.startswith("2, 2 of them free; the run takes 2 (placement apart: ")
    assert [row.status for row in found["all checks"]] == [OK, OK]
    assert "among 2 GPUs on 2 nodes" in found["NCCL"][0].found

    # What one node has and another has not.
    @contextlib.contextmanager
    def of_another_disk(directory: Path) -> Iterator[tuple[str, str]]:
        yield str(directory / "marker"), "nonce"

    ours = gpu_machine(cuda="", versions=describe().versions | {"ray": "2.59.0"})
    monkeypatch.setattr(facts, "describe", lambda: ours)
    monkeypatch.setattr(facts, "marker", of_another_disk)
    monkeypatch.setattr(facts, "shared_paths", lambda config: [str(tmp_path), "/data/train.parquet"])
    monkeypatch.setattr(doctor, "_bandwidth_across", lambda nodes, backend: [(OK, "not again")])
    code, found = rows("actor.num_ranks=3", "rollout.workers=1")
    assert code == 2
    missing = ["/data/train.parquet is not there"] * 2
    assert [row.found for row in found["files"] if row.where != "config"] == missing
    assert [row.status for row in found["run directory"]] == [ERROR] * 2
    assert "ray is 2.59.0 on" in found["versions"][0].found
    assert found["GPUs"][-1].status == ERROR and "the run takes 4" in found["GPUs"][-1].found


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For `mssr doctor` and for a run: one line, with what a head may want."""

    def init(**options: Any) -> None:
        raise failure

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    config = Config()
    config.cluster.address = "10.0.0.1:6379"
    for failure in (ConnectionError("Failed to connect"), ray.exceptions.AuthenticationError("no token\nx")):
        [row] = guarded("cluster", "x", lambda: doctor._cluster("10.0.0.1:6379", gpu_machine(), RUN, None))
        assert row.status == ERROR and row.found.startswith(f"10.0.0.1:6379: {str(failure)[:8]}")
        assert "RAY_AUTH_MODE=token" in row.advice
        with pytest.raises(UserError, match=r"cluster.address=10.0.0.1:6379: .*set RAY_AUTH_MODE=token$"):
            init_ray(config, processes=1)
