"""Facts about a machine: nvidia-smi's words, versions that differ, files that are not the same."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from mssr.cluster import machine
from mssr.cluster.machine import describe, differences, driver_problem, marker
from mssr.cluster.preflight import _look
from mssr.config import Config

# What nvidia-smi prints for the fields that are asked for, on two GPUs, one split into parts (MIG).
TWO_GPUS = """\
580.95.05, 0, NVIDIA H100 80GB HBM3, 81559, 81079, 9.0, Disabled
580.95.05, 1, NVIDIA H100 80GB HBM3, 81559, 1024, 9.0, Enabled
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a command of that name before others in PATH, which prints something and ends with a code."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def put(text: str, code: int = 0) -> None:
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\ncat <<'END'\n{text}END\nexit {code}\n")
        command.chmod(0o755)

    return put


def test_gpus_as_the_driver_lists_them(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi(TWO_GPUS)
    found = pickle.loads(pickle.dumps(describe()))
    assert found.driver == "580.95.05" and found.gpu_problem == ""
    first, second = found.gpus
    assert (first.name, first.compute_capability, first.mig) == ("NVIDIA H100 80GB HBM3", "9.0", False)
    assert (first.total_bytes, second.free_bytes, second.mig) == (81559 * 2**20, 2**30, True)


def test_a_gpu_whose_memory_is_the_hosts(nvidia_smi: Callable[..., None]) -> None:
    nvidia_smi("580.95.05, 0, NVIDIA GB10, [N/A], [N/A], 12.1, [N/A]\n")
    [gpu] = describe().gpus
    assert gpu.total_bytes == gpu.free_bytes == 0 and not gpu.mig


@pytest.mark.parametrize(
    ("text", "code", "problem"),
    [
        ("NVIDIA-SMI has failed because it could not\ncommunicate with the driver.\n", 9, "not communicate"),
        ("580.95.05, 0, [GPU is lost]\n", 0, "GPU is lost"),
        ("", 0, "ended with 0"),
    ],
)
def test_without_a_working_driver_its_words_are_the_answer(
    nvidia_smi: Callable[..., None], text: str, code: int, problem: str
) -> None:
    nvidia_smi(text, code)
    found = describe()
    assert found.gpus == () and found.driver == "" and problem in found.gpu_problem


def test_facts_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    found = describe()
    assert found.gpu_problem == "there is no nvidia-smi" and found.compiler == ""
    assert found.cores >= 1 and found.memory_bytes > 2**30 and found.shm_bytes > 0
    assert found.versions["torch"].startswith("2.13") and found.versions["vllm"].startswith("0.32")


@pytest.mark.parametrize(
    ("cuda", "driver", "sound"),
    [
        ("13.0", "580.95.05", True),
        ("13.2", "590.10", True),
        ("13.0", "575.57.08", False),
        ("12.8", "525.60.13", True),
        ("", "470.1", True),
        ("13.0", "", True),  # no GPU at all is another complaint
    ],
)
def test_the_driver_that_torch_needs(cuda: str, driver: str, sound: bool) -> None:
    problem = driver_problem(dataclasses.replace(describe(), cuda=cuda, driver=driver))
    assert (problem == "") == sound
    if not sound:
        assert "575.57.08" in problem and "CUDA 13.0" in problem and "580 or newer" in problem


def test_versions_that_differ_are_named_with_their_hosts() -> None:
    a = dataclasses.replace(describe(), host="a")
    b = dataclasses.replace(a, host="b", versions=a.versions | {"ray": "2.59.0", "vllm": ""})
    assert differences([]) == differences([a, a]) == []
    ray, vllm = differences([a, b, dataclasses.replace(a, host="c")])
    assert ray == f"ray is 2.59.0 on b; {a.versions['ray']} on a, c"
    assert vllm == f"vllm is {a.versions['vllm']} on a, c; missing on b"


def test_code_that_differs_under_one_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = tmp_path / "__init__.py"
    monkeypatch.setattr(machine.mssr, "__file__", str(code))
    code.write_text("a = 1")
    old = describe().versions["mssr"]
    assert describe().versions["mssr"] == old
    code.write_text("a = 2")
    assert describe().versions["mssr"] != old


def test_a_marker_is_there_for_a_while(tmp_path: Path) -> None:
    with marker(tmp_path) as first, marker(tmp_path) as second:
        assert first != second and Path(first).parent == Path(second).parent == tmp_path
        assert _look("", [str(tmp_path), str(tmp_path / "no")], first).missing == [str(tmp_path / "no")]
        assert _look("", [], first).sees_run_dir
    assert list(tmp_path.iterdir()) == []
    assert not _look("", [], first).sees_run_dir
    with pytest.raises(OSError), marker(tmp_path / "absent"):
        pass


def test_paths_that_every_node_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "a.parquet", "b.parquet", "c.jsonl", "images", "mathvista"):
        (tmp_path / name).touch()
    config = Config()
    config.model.path, config.data.image_dir = "model", "images"
    config.data.train = ["a.parquet@train[:10]", {"path": "hub/name@train", "weight": 2.0}]
    config.data.val = {"b": "b.parquet", "c": {"path": [str(tmp_path / "c.jsonl")]}}
    config.data.val |= {"m": {"benchmark": "mathvista", "data_dir": "mathvista"}, "n": {"benchmark": "mmk12"}}
    names = [Path(path).relative_to(tmp_path) for path in machine.shared_paths(config)]
    assert list(map(str, names)) == "a.parquet b.parquet c.jsonl images mathvista model".split()


def test_free_disk_of_a_directory_that_is_still_to_be_made(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "not" / "yet" / "made") > 0
