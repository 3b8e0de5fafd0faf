"""The arithmetic of memory: parameters of a model, and what fits where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mssr.config import ModelConfig
from mssr.models.memory import GIB, colocated_fits
from mssr.models.published import read_shape, shape_of
from mssr.runs.config import load_config

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
GEOMETRY = ROOT / "configs/geometry3k/qwen2_5_vl_3b.yaml"
SMALL, LARGE = "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"
HUB: dict[str, dict[str, Any]] = {
    SMALL: {
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "in_chans": 3},
    },
    LARGE: {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152064,
        "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584, "in_chans": 3},
    },
}
"""What of the hub's config.json says something of sizes; the language model's keys are at the top level."""


def meta_model(tree: dict[str, Any]) -> Any:
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**tree))


@pytest.mark.parametrize("name", [SMALL, LARGE])
def test_parameters_of_every_part_are_those_of_the_model(name: str) -> None:
    shape, model = shape_of(HUB[name]), meta_model(HUB[name])
    assert shape == read_shape(ModelConfig(path=name))
    assert shape == shape_of(model.config.to_dict())  # as transformers writes it

    def count(part: Any) -> int:
        return sum(p.numel() for p in part.parameters())

    core = model.model
    assert shape.text_config.layer == count(core.language_model.layers[0])
    assert shape.vision_config.block == count(core.visual.blocks[0])
    assert shape.vision == count(core.visual)
    assert shape.text_config.embedding == count(core.language_model.embed_tokens)
    assert shape.parameters == count(model)


def test_a_pair_fits_on_a_large_gpu_and_not_on_a_small_one() -> None:
    config = load_config(GEOMETRY, ["actor.num_ranks=8", "rollout.workers=8"])
    fits, reason = colocated_fits(config, 80 * GIB)
    assert fits and "GiB" in reason
    fits, reason = colocated_fits(config, 16 * GIB)
    assert not fits and "of 16.0 GiB" in reason
    config = load_config(GEOMETRY, ["actor.num_ranks=1", "rollout.workers=1"])
    fits, reason = colocated_fits(config, 80 * GIB)
    assert not fits and reason.startswith("rank + engine: ")


def test_what_is_planned_for_a_rank_is_near_what_its_updates_allocate() -> None:
    command = [sys.executable, "scripts/bench/memory_plan.py", "--cases", "defaults"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    [row] = [line.split(" | ") for line in ran.stdout.splitlines() if line.startswith("| defaults")]
    peak, planned = float(row[2]), float(row[3])
    assert peak > 30  # MiB
    assert planned == pytest.approx(peak, rel=0.15)
