"""Tiny models with random weights and a mixed data set: what most tests train on."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A shell's background jobs ignore Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported anywhere: two cores, several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Ray would give its workers, which do all the work here, a thirtieth of a core that anything else wants.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, settings
from PIL import Image

# How long an example takes says how busy the machine is.
settings.register_profile("mssr", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mssr")

# What the tests find in their data is not to be kept beside the user's.
os.environ["MSSR_CACHE"] = tempfile.mkdtemp(prefix="mssr-test-cache-")
atexit.register(shutil.rmtree, os.environ["MSSR_CACHE"], ignore_errors=True)

QUESTION = "What is the sum of the two digits?"
CORPUS = [QUESTION, "<think>3 and 5</think>\\boxed{8}", "<think>guess</think>\\boxed{1}", "larger"] * 3
# Images of different sizes; two, one or no image in a prompt.
IMAGE_SIZES = [[(112, 56)], [(56, 56), (84, 140)], [], [(112, 112)]]

REWARD = '''
def varied(response, answer):
    """Random models never answer right; this gives them something to learn from."""
    return float(sum(map(ord, response)) % 3 == 0)

def too_large(response, answer):
    return 5.0

def broken(response, answer):
    raise RuntimeError("no score today")
'''


@dataclass(frozen=True)
class Workspace:
    """A directory with model, data and a config that trains on them in seconds."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def instead(self) -> list[str]:
        """Overrides of another one's config that put model and data of this one in their place."""
        files = {"model.path": "model", "data.train": "train.parquet", "data.val": "val.parquet"}
        return [f"{key}={self.path / name}" for key, name in files.items()]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    features = datasets.Features(
        id=datasets.Value("string"),
        images=datasets.List(datasets.Image()),
        problem=datasets.Value("string"),
        answer=datasets.Value("string"),
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(path))


def make_rows(count: int, prefix: str, seed: int, text_only: bool = False) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def image(size: tuple[int, int]) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))

    return [
        {
            "id": f"{prefix}{i}",
            "images": [] if text_only else [image(size) for size in IMAGE_SIZES[i % len(IMAGE_SIZES)]],
            "problem": QUESTION,
            "answer": str(i % 10),
        }
        for i in range(count)
    ]


def make_workspace(path: Path, model_type: str = "qwen2_5_vl") -> Workspace:
    """Fill an empty directory; for models that take text only with rows without images."""
    from mssr.models.families import FAMILIES
    from mssr.models.tiny import build_tiny

    build_tiny(path / "model", model_type, CORPUS, seed=0)
    text_only = FAMILIES[model_type].tower_name is None
    write_rows(path / "train.parquet", make_rows(8, "t", 1, text_only))
    # The same ids as in train, as in data that is numbered from 0, but other rows.
    write_rows(path / "val.parquet", make_rows(4, "t", 2, text_only))
    (path / "reward.py").write_text(REWARD)
    config = {
        "experiment_name": "test",
        "model": {"path": str(path / "model")},
        "data": {
            "train": str(path / "train.parquet"),
            "val": str(path / "val.parquet"),
            "id_column": "id",
            "instruction": "",
            "min_pixels": 3136,
            "max_pixels": 50176,
            "max_prompt_length": 128,
        },
        "reward": {"name": f"{path / 'reward.py'}:varied"},
        "rollout": {"rollouts_per_step": 16, "max_response_length": 12, "kv_cache_gib": 1},
        "actor": {"num_ranks": 2, "updates_per_step": 2, "lr": 1e-3, "micro_batch_tokens": 256},
        "trainer": {"steps": 3, "val_every": 2, "save_every": 3, "samples_every": 1},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return Workspace(path)


@pytest.fixture(scope="session", autouse=True)
def every_metric_is_explained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All runs of all tests: a key that they write is in mssr/runs/glossary.txt."""
    yield
    from mssr.runs.glossary import find

    for path in tmp_path_factory.getbasetemp().rglob("metrics.jsonl"):
        config = path.with_name("config.yaml")
        if not (config.is_file() and path.with_name("samples").is_dir()):
            continue  # written by hand
        own_loss = re.search(r"^  loss:\n(    .*\n)*?    name: .*\.py:", config.read_text(), re.MULTILINE)
        for key in set(re.findall(r'"(\w+(?:/\w+)+)": ', path.read_text(errors="replace"))):
            about = find(key)
            assert about and (own_loss or about.key != "policy/*"), f"{key} of {path} is not in the glossary"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def workspace_of(
    workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Workspace]:
    """The workspace of a family, made when it is asked for."""
    made = {"qwen2_5_vl": workspace}

    def make(model_type: str) -> Workspace:
        if model_type not in made:
            made[model_type] = make_workspace(tmp_path_factory.mktemp(model_type), model_type)
        return made[model_type]

    return make


@pytest.fixture(scope="session")
def run_mssr() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in a process of its own, as a user would. Pytest's limit bounds it."""

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mssr.tools.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run
