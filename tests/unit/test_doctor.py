"""`mssr doctor`: every fault of a machine or cluster is a row that says what to do, and an exit code."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray

from mssr.cluster import machine as facts
from mssr.cluster import placement, preflight, ray_start
from mssr.cluster.machine import Gpu, Machine, describe
from mssr.cluster.placement import Node
from mssr.cluster.preflight import Found
from mssr.cluster.ray_start import init_ray
from mssr.config import Config
from mssr.errors import UserError
from mssr.models.host_memory import disk_bytes
from mssr.models.published import published, read_shape
from mssr.runs.config import load_config
from mssr.tools import doctor, gpu_checks
from mssr.tools.cli import main
from mssr.tools.machine_checks import ERROR, OK, WARNING, Row, guarded, machine_rows

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", 80 * 2**30, 79 * 2**30, "9.0", False)
WEIGHTS = 16_582_000_000


def rows_of(machine: Machine, needs_gpus: bool = True) -> list[Row]:
    return list(machine_rows("here", machine, WEIGHTS, needs_gpus))


def libraries_rows(machine: Machine) -> list[Row]:
    return list(guarded("here", "libraries", doctor._libraries(machine)))


def gpu_machine(**changes: Any) -> Machine:
    """A sound machine with two GPUs, but for the changes."""
    sound: dict[str, Any] = {
        "cuda": "13.0",
        "driver": "580.95.05",
        "gpus": (H100, dataclasses.replace(H100, index=1)),
        "memory_bytes": 2**40,
        "shm_bytes": 2**39,
        "open_files": 2**20,
        "processes": -1,
        "compiler": "/usr/bin/gcc",
        "python_headers": True,
    }
    return dataclasses.replace(describe(), **(sound | changes))


def test_a_sound_machine_has_no_complaints() -> None:
    assert {row.status for row in rows_of(gpu_machine())} == {OK}


@pytest.mark.parametrize(
    ("changes", "check", "status", "words"),
    [
        ({"driver": "570.1"}, "driver", ERROR, "needs 580 or newer: install a newer driver"),
        ({"driver": "", "gpus": ()}, "driver", ERROR, "built for CUDA 13.0, but:"),
        ({"cuda": ""}, "driver", ERROR, "CPU build: scripts/setup.sh --gpu"),
        ({"gpus": (dataclasses.replace(H100, mig=True),)}, "GPUs", ERROR, "nvidia-smi -mig 0"),
        ({"gpus": (dataclasses.replace(H100, compute_capability="7.5"),)}, "GPUs", ERROR, "7.5"),
        ({"gpus": (dataclasses.replace(H100, free_bytes=2**34),)}, "GPUs", WARNING, "lacks 64.0 GiB of 80.0"),
        ({"compiler": ""}, "compiler", ERROR, "no C compiler: apt-get install gcc:"),
        ({"python_headers": False}, "compiler", ERROR, "apt-get install python3."),
        ({"shm_bytes": 2**26}, "shared memory", ERROR, "--ipc=host"),
        # 16 GiB are what docker run --shm-size 16g gives, 16.3e9 bytes of them the object store's.
        ({"shm_bytes": 2**34}, "shared memory", WARNING, "weights have 15.4 GiB"),
        ({"open_files": 1024}, "limits", WARNING, "ulimit -n is 1024: ulimit -n 65536"),
        ({"processes": 1000}, "limits", WARNING, "ulimit -u"),
    ],
)
def test_each_fault_of_a_machine(changes: dict[str, Any], check: str, status: str, words: str) -> None:
    [row] = [row for row in rows_of(gpu_machine(**changes)) if row.status != OK]
    assert (row.check, row.status) == (check, status)
    assert words in f"{row.found}: {row.advice}"


def test_a_machine_that_needs_no_gpus() -> None:
    head = gpu_machine(driver="", gpus=(), shm_bytes=2**31)
    assert {row.status for row in rows_of(head, needs_gpus=False)} == {OK}
    bare = gpu_machine(cuda="", gpus=(), compiler="", python_headers=False)
    assert {row.status for row in rows_of(bare)} == {OK}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No library is loaded, no cluster is looked for."""
    monkeypatch.setattr(gpu_checks, "libraries", lambda: {"device": "cpu", "gpus": 0, "nccl": ""})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("quick")
def test_table_json_and_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json"]) == 0
    rows = [Row(**row) for row in json.loads(capsys.readouterr().out)]
    checks = {"machine", "driver", "GPUs", "compiler", "shared memory", "limits", "libraries", "disk"}
    assert {row.check for row in rows} == checks
    # A driver too old for the torch that is installed ends with the code of wrong input, and a line.
    old = gpu_machine(driver="550.54")  # nor does torch see its GPUs
    monkeypatch.setattr(facts, "describe", lambda: old)
    assert main(["doctor"]) == 2
    text = capsys.readouterr().out
    assert "  error    driver         the driver is 550.54" in text
    assert "-> install a newer driver on the host" in text and "errors: 2" in text


def put_model(directory: Path) -> None:
    directory.mkdir()
    (directory / "model.safetensors").touch()
    (directory / "config.json").write_text(json.dumps(published()["Qwen/Qwen2.5-VL-7B-Instruct"]))


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
    put_model(tmp_path / "m")
    assert main(["doctor", "c.yaml", "--json"]) == 2
    assert "a.parquet is not there" in capsys.readouterr().out
    (tmp_path / "a.parquet").touch()
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
    assert "warning  libraries      could not be checked: disk on fire\n" in text and "disk   " in text
    monkeypatch.setattr(facts, "describe", broken)
    assert main(["doctor"]) == 0
    assert "itself         could not be checked: disk on fire" in capsys.readouterr().out


def test_libraries_that_do_not_load_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    [row] = libraries_rows(gpu_machine())
    assert row.status == ERROR and "ImportError: libcudart.so.13: cannot open" in row.found


def test_gpus_that_torch_does_not_see_and_slow_links(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"device": "cuda", "gpus": 0, "nccl": "2.28.9"}
    monkeypatch.setattr(gpu_checks, "libraries", lambda: found)
    assert [row.status for row in libraries_rows(gpu_machine())] == [OK, ERROR]
    found["gpus"] = 2
    for speed, status in ((300.0, OK), (20.0, WARNING)):
        speeds = {"all_reduce": speed, "broadcast": speed}
        monkeypatch.setattr(gpu_checks, "bandwidth", lambda *args, speeds=speeds: speeds)
        row = libraries_rows(gpu_machine())[-1]
        assert (row.check, row.status) == ("NCCL", status) and "among 2 GPUs" in row.found
    busy = gpu_machine(gpus=(H100, dataclasses.replace(H100, free_bytes=2**30)))
    assert libraries_rows(busy)[-1].found == "not measured: the GPUs are in use"


def test_ranks_that_never_meet_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "TIMEOUT_S", 0.0)
    with pytest.raises(UserError, match="no answer within 0 s"):
        gpu_checks.bandwidth(1, 1, 2, f"127.0.0.1:{gpu_checks.free_port()}", "gloo")


@pytest.mark.usefixtures("quick")
def test_nodes_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A sound node, and one that lacks what the first has; test_cluster_examples.py has real ones."""
    put_model(tmp_path / "m")
    (tmp_path / "c.yaml").write_text(f"model: {{path: {tmp_path}/m}}\ndata: {{train: a/b, val: a/b}}\n")
    sound = gpu_machine(gpus=(H100,), cuda="")
    other = dataclasses.replace(sound, cuda="13.0", driver="550.54", open_files=100)
    other = dataclasses.replace(other, versions=sound.versions | {"ray": "2.59.0"})
    answers = [
        Found("10.0.0.1", dataclasses.replace(sound, cuda="13.0")),
        Found("10.0.0.2", other, missing=["/data/train.parquet"], sees_run_dir=False),
        Found("10.0.0.3", None, failure="no answer"),
    ]
    one = {"GPU": 1.0, "CPU": 64.0}
    nodes = [Node(answer.address, answer.address, one, one) for answer in answers]
    monkeypatch.setattr(facts, "describe", lambda: gpu_machine())
    monkeypatch.setattr(ray_start, "init_ray", lambda config, processes: None)
    monkeypatch.setattr(placement, "find_nodes", lambda device: nodes)
    monkeypatch.setattr(preflight, "survey", lambda *_: {answer.address: answer for answer in answers})
    monkeypatch.setattr(doctor, "_among_nodes", lambda *_: iter([(OK, "measured")]))

    def rows(*arguments: str) -> dict[str, list[Row]]:
        assert main(["doctor", str(tmp_path / "c.yaml"), "--json", "--address", "x:1", *arguments]) == 2
        found: dict[str, list[Row]] = {}
        for row in map(lambda row: Row(**row), json.loads(capsys.readouterr().out)):
            if row.where not in ("this machine", "config"):
                found.setdefault(f"{row.where}: {row.check}", []).append(row)
        return found

    found = rows()
    assert {check: row.status for check, [row, *_] in found.items()} == {
        "cluster: connection": OK,
        "node 10.0.0.1: all checks": OK,
        "node 10.0.0.2: driver": ERROR,
        "node 10.0.0.2: limits": WARNING,
        "node 10.0.0.2: files": ERROR,
        "node 10.0.0.2: run directory": ERROR,
        "node 10.0.0.3: answer": ERROR,
        "cluster: versions": ERROR,
        "cluster: GPUs": OK,
        "cluster: NCCL": OK,
    }
    assert "ray is 2.59.0 on" in found["cluster: versions"][0].found
    assert found["cluster: GPUs"][1].found.startswith("the run has room (placement apart: ")
    # A run that has no room is an error; NCCL is not measured beside another run.
    nodes[0] = dataclasses.replace(nodes[0], free={"GPU": 0.0, "CPU": 64.0})
    found = rows("actor.num_ranks=3", "rollout.workers=1")
    assert [row.status for row in found["cluster: GPUs"]] == [WARNING, ERROR]
    assert "3, 2 of them free" in found["cluster: GPUs"][0].found
    assert "need 4 GPU, 4 CPU" in found["cluster: GPUs"][1].found and "cluster: NCCL" not in found


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For `mssr doctor` and for a run: one line, with what a head may want."""

    def init(**options: Any) -> None:
        raise failure

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    config = Config()
    config.cluster.address = "10.0.0.1:6379"
    for failure in (ConnectionError("Failed to connect"), ray.exceptions.AuthenticationError("no token\nx")):
        [row] = guarded("cluster", "x", doctor._cluster("10.0.0.1:6379", gpu_machine(), WEIGHTS, None))
        assert row.status == ERROR and f"10.0.0.1:6379: {str(failure)[:8]}" in row.found
        assert "RAY_AUTH_MODE=token" in row.found
        with pytest.raises(UserError, match=r"cluster.address=10.0.0.1:6379: .*set RAY_AUTH_MODE=token$"):
            init_ray(config, processes=1)
