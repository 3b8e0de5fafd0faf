"""A tiny model, rows, a reward and the settings of a run of TRL's trainers on them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback
from transformers.utils import logging

from mssr.algorithms import Algorithm
from mssr.models.tiny import build_tiny

torch.set_num_threads(1)
logging.set_verbosity_error()
QUESTION = "What is the sum of the two digits?"
CORPUS = [QUESTION, "<think>3 and 5</think>\\boxed{8}", "<think>guess</think>\\boxed{1}", "larger"] * 3
ROWS = 8


def make_model(path: Path) -> Path:
    """A tiny Qwen2.5-VL, of whose tokens every sixth ends a response, so that lengths differ."""
    build_tiny(path, "qwen2_5_vl", CORPUS, seed=0)
    file = path / "generation_config.json"
    generation = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**generation, "eos_token_id": list(range(0, 256, 6))}))
    return path


def make_rows(count: int = ROWS, images: bool = True) -> datasets.Dataset:
    """With an image each, or none."""
    rng = np.random.default_rng(1)

    def row(i: int) -> dict[str, Any]:
        image = Image.fromarray(rng.integers(0, 255, (56, 28 * (1 + i % 3), 3), dtype=np.uint8))
        prompt = [{"role": "user", "content": f"{QUESTION} {i}"}]
        return {"id": f"t{i}", "prompt": prompt, "images": [image]}

    features = datasets.Features(
        id=datasets.Value("string"),
        prompt=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        images=datasets.List(datasets.Image()),
    )
    rows = datasets.Dataset.from_list([row(i) for i in range(count)], features=features)
    return rows if images else rows.remove_columns("images")


class Rewards:
    """A reward that depends on the response only, and what it was asked."""

    __name__ = "varied"

    def __init__(self, missing: str | None = None) -> None:
        self.missing = missing
        """Id of the prompt that gets None."""
        self.calls: list[dict[str, Any]] = []

    def __call__(self, completion_ids: list[list[int]], id: list[str], **_: Any) -> list[float | None]:
        scores = [
            None if i == self.missing else sum(c) % 4 / 3 for i, c in zip(id, completion_ids, strict=True)
        ]
        self.calls.append({"ids": id, "rewards": scores, "tokens": completion_ids})
        return scores


def settings(out: Path, **more: Any) -> dict[str, Any]:
    """Of a run: 4 rollouts a generation, two updates, which are two passes each."""
    return {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
        **more,
    }


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def history(trainer: Any, key: str) -> list[float]:
    """A metric of every log that has it."""
    return [log[key] for log in trainer.state.log_history if key in log]


class Steps(TrainerCallback):
    """What each generation was trained on, by row, and the weights before it."""

    def __init__(self) -> None:
        self.advantages: list[list[float]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.weights.append(weights(self.trainer))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % args.updates_per_generation == 0:
            self.advantages.append(list(self.trainer._logs["advantages"]))
            self.weights.append(weights(self.trainer))


def by_hand(method: Algorithm, call: dict[str, Any], kl: Any) -> tuple[np.ndarray, dict[str, float]]:
    """(B,) advantages and the metrics of a generation, from `mssr.algorithms` alone."""
    scored = [i for i, reward in enumerate(call["rewards"]) if reward is not None]
    ids, rewards = [call["ids"][i] for i in scored], [np.float32(call["rewards"][i]) for i in scored]
    advantages = np.zeros(len(call["ids"]), np.float32)
    advantages[scored], metrics = method.advantages(ids, rewards, [len(call["tokens"][i]) for i in scored])
    method.observe(ids, rewards, kl)
    return advantages, {**metrics, **method.metrics()}
