"""examples/cluster: each file says what its program reads, and the Slurm script stops and requeues."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mssr.config import Config
from mssr.config.options import describe
from mssr.models.published import published

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "cluster"
SBATCH_OPTIONS = """job-name nodes ntasks-per-node gpus-per-node cpus-per-task mem exclusive time signal
requeue open-mode output""".split()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)


def test_options_of_mssr_in_the_examples_exist() -> None:
    known = describe(Config)
    for path in EXAMPLES.iterdir():
        for key in re.findall(r"\b((?:trainer|cluster|rollout|actor|model|data)\.\w+)=", path.read_text()):
            assert key in known, f"{path.name}: {key}"


def _sbatch_lines() -> dict[str, str]:
    """Options of the script, which Slurm reads up to the first line that is a command."""
    options = {}
    for line in (EXAMPLES / "slurm.sh").read_text().splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match, line
            options[match[1]] = match[2] or ""
    return options


def test_sbatch_lines() -> None:
    options = _sbatch_lines()
    assert list(options) == SBATCH_OPTIONS
    # To the script alone, which passes it on: ranks and engines go on until the training has stopped.
    assert re.fullmatch(r"B:TERM@\d+", options["signal"])


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the script as Slurm would, with stand-ins that write down how they were called."""
    stand_ins = {
        "scontrol": 'if [ "$1" = show ]; then printf "node-a\\nnode-b\\nnode-c\\n"; fi',
        "srun": "exec sleep 60",
        "python": """
            if [ "$1" = -c ]; then echo 10.0.0.1; exit; fi
            until [ "$(grep -c ^srun "$CALLS")" = 2 ]; do sleep 0.05; done
        """,
        "mssr": """
            [ "$1" = train ] || exit ${DOCTOR:-0}
            trap 'sleep 0.2; echo checkpoint >>"$CALLS"; exit 143' TERM
            echo ready
            for _ in $(seq ${TICKS:-600}); do sleep 0.1; done
            exit ${CODE:-0}
        """,
    }
    (tmp_path / "bin").mkdir()
    for name, body in stand_ins.items():
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
        path.chmod(0o755)

    def start(**variables: str) -> subprocess.Popen[str]:
        env = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "MSSR_VENV": str(tmp_path),
            "CALLS": str(tmp_path / "calls"),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node-[a-c]",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_GPUS_PER_NODE": "8",
        }
        return subprocess.Popen(
            ["bash", str(EXAMPLES / "slurm.sh"), "my.yaml", "trainer.steps=3"],
            env=env | variables,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def _end(job: subprocess.Popen[str], tmp_path: Path) -> tuple[int, list[str]]:
    code = job.wait(timeout=120)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)  # as Slurm ends all steps of a job
    assert job.stdout is not None
    job.stdout.close()
    return code, (tmp_path / "calls").read_text().splitlines()


def test_slurm_starts_ray_on_all_nodes(slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    code, calls = _end(slurm(TICKS="1"), tmp_path)
    assert code == 0
    head, workers = sorted(
        (call for call in calls if call.startswith("srun")), key=lambda c: "--head" not in c
    )
    ray_head = "ray start --head --node-ip-address=10.0.0.1 --port=23456"
    assert f"--nodes=1 --ntasks=1 --nodelist=node-a {ray_head}" in head
    assert "--nodes=2 --ntasks=2 --exclude=node-a ray start --address=10.0.0.1:23456" in workers
    assert all("--gpus-per-node=8" in c and "--num-cpus=64" in c and "--block" in c for c in (head, workers))
    rest = [call for call in calls if not call.startswith("srun")]
    assert rest[-3:] == [
        "python examples/cluster/wait_for_nodes.py 3 10.0.0.1:23456",
        "mssr doctor my.yaml trainer.steps=3 --address 10.0.0.1:23456",
        "mssr train my.yaml trainer.steps=3 cluster.address=10.0.0.1:23456",
    ]


def test_slurm_job_that_is_stopped_writes_its_checkpoint_and_is_requeued(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    job = slurm()
    assert job.stdout is not None and job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    code, calls = _end(job, tmp_path)
    assert code == 143 and calls[-2:] == ["checkpoint", "scontrol requeue 123456"]


@pytest.mark.parametrize("variables", [{"TICKS": "1", "CODE": "2"}, {"DOCTOR": "2"}])
def test_slurm_job_with_an_error_is_not_requeued(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path, variables: dict[str, str]
) -> None:
    code, calls = _end(slurm(**variables), tmp_path)
    assert code == 2 and not any("requeue" in call for call in calls)
    assert any(call.startswith("mssr train") for call in calls) == ("CODE" in variables)


# `mssr doctor` as it is, but for the libraries that tests/e2e/test_acceptance.py has it load.
MSSR = f"""#!/bin/sh
if [ "$1" = train ]; then echo "mssr $*"; exit; fi
exec {sys.executable} -c '
import sys
from mssr.tools import cli, gpu_checks
gpu_checks.libraries = lambda: dict(device="cpu", gpus=0, nccl="")
sys.exit(cli.main())' "$@"
"""


def test_two_machines_with_a_token_pass_the_doctor(tmp_path: Path) -> None:
    """Two raylets on this machine that claim a GPU each, started as a user starts them on two."""
    (tmp_path / "mssr").write_text(MSSR)
    (tmp_path / "mssr").chmod(0o755)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text(json.dumps(published()["Qwen/Qwen2.5-VL-7B-Instruct"]))
    (tmp_path / "c.yaml").write_text(f"model: {{path: {tmp_path}}}\ndata: {{train: a/b, val: a/b}}\n")
    few = "--num-cpus=1 --num-gpus=1 --object-store-memory=100000000 --min-worker-port=0 --max-worker-port=0"
    # Short, because the path of a socket may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="mssr-") as home, contextlib.ExitStack() as stack:
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": home}
        env["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{env['PATH']}"

        def start(*role: str, **variables: str) -> subprocess.Popen[str]:
            command = [str(EXAMPLES / "two_machines.sh"), *role]
            started = subprocess.Popen(command, env=env | variables, stdout=subprocess.PIPE, text=True)
            stack.callback(started.communicate, timeout=120)
            stack.callback(started.terminate)
            return started

        # A network that only the driver's environment, which workers get, tells right.
        env["GLOO_SOCKET_IFNAME"] = "none"
        head = start("head", RAY_OPTIONS=f"{few} --port=0 --temp-dir={home}")
        assert head.stdout is not None
        address = next(m[1] for line in head.stdout if (m := re.search(r"--address='([\d.:]+)'", line)))
        start("worker", address, RAY_OPTIONS=few)
        arguments = [str(tmp_path / "c.yaml"), f"trainer.run_dir={tmp_path}/run"]
        training = start("train", "2", address, *arguments, GLOO_SOCKET_IFNAME="lo")
        said, _ = training.communicate(timeout=300)
    assert said.startswith("2 nodes: "), said
    assert "2, all of them free" in said and "the run has room" in said and "among 2 GPUs on 2 nodes" in said
    assert said.splitlines()[-1] == f"mssr train {' '.join(arguments)} cluster.address={address}", said


def test_kuberay_manifest() -> None:
    """What the CRD's schema cannot tell: one image, GPUs, shared memory and the shared claim in all pods."""
    job = yaml.safe_load((EXAMPLES / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    pods = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    containers: list[dict[str, Any]] = []
    for pod in pods:
        template = pod["template"]["spec"]
        [container] = template["containers"]
        containers.append(container)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["volumes"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"} and set(volumes) == set(mounts)
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["limits"] == container["resources"]["requests"]
    head, worker = containers
    assert head["image"] == worker["image"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    version = re.search(r'"ray>=([\d.]+),', (ROOT / "pyproject.toml").read_text())
    assert version and spec["rayVersion"].startswith(version[1])
    entrypoint = job["spec"]["entrypoint"]
    assert "cluster.address=auto" in entrypoint and not set(entrypoint) & set("&|;\n'\"$")


def test_skypilot_task() -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert set(task) == {
        "name",
        "num_nodes",
        "workdir",
        "resources",
        "volumes",
        "envs",
        "secrets",
        "setup",
        "run",
    }
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    assert set(re.findall(r"\$\{?(SKYPILOT_\w+)", task["run"])) == {
        "SKYPILOT_NODE_IPS",
        "SKYPILOT_NODE_RANK",
        "SKYPILOT_NUM_NODES",
    }
