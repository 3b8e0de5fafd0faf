"""The arithmetic of memory: parameters of a model, and what fits where."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mssr.errors import UserError
from mssr.models.families import FAMILIES
from mssr.models.loading import import_transformers
from mssr.models.memory import colocated_fits
from mssr.models.published import published, shape_of
from mssr.models.rank_memory import GIB
from mssr.runs.config import load_config

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
GEOMETRY = ROOT / "configs/geometry3k/qwen2_5_vl_3b.yaml"
PARAMETERS = {
    "Qwen2-VL-2B-Instruct": 2_208_985_600,
    "Qwen2-VL-7B-Instruct": 8_291_375_616,
    "Qwen2-VL-72B-Instruct": 73_405_560_320,
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen3-VL-2B-Instruct": 2_127_532_032,
    "Qwen3-VL-4B-Instruct": 4_437_815_808,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-32B-Instruct": 33_357_390_064,
    "Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
    "Qwen3-VL-235B-A22B-Instruct": 235_670_022_896,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen2.5-32B-Instruct": 32_763_876_352,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}
"""Of the weights on the hub, as it counts them; a head that is the embedding once."""


def test_published_models_have_as_many_parameters_as_their_weights_on_the_hub() -> None:
    found = {name.removeprefix("Qwen/"): shape_of(tree).parameters for name, tree in published().items()}
    assert found == PARAMETERS


def test_sizes_that_a_config_leaves_out_are_named() -> None:
    tree = copy.deepcopy(published()["Qwen/Qwen3-VL-8B-Instruct"])
    del tree["text_config"]["vocab_size"], tree["text_config"]["hidden_size"]
    with pytest.raises(UserError, match=r"config\.json does not say vocab_size, hidden_size$"):
        shape_of(tree)


@pytest.mark.parametrize(
    "name",
    "Qwen2-VL-2B-Instruct Qwen2.5-VL-7B-Instruct Qwen2.5-VL-32B-Instruct Qwen3-VL-4B-Instruct "
    "Qwen3-VL-8B-Instruct Qwen3-VL-30B-A3B-Instruct Qwen2.5-1.5B-Instruct Qwen2.5-7B-Instruct "
    "Qwen3-4B Qwen3-8B".split(),
)
def test_parameters_of_every_part_are_those_of_the_model(name: str) -> None:
    import torch

    transformers = import_transformers()
    tree = copy.deepcopy(published()["Qwen/" + name])
    tree.get("text_config", tree)["num_hidden_layers"] = 3  # as all are alike, and it takes a while
    shape, family = shape_of(tree), FAMILIES[tree["model_type"]]
    config, kind = transformers.AutoConfig.for_model(**tree), getattr(transformers, family.auto_class)
    with torch.device("meta"):
        model = kind.from_config(config)
    assert shape == shape_of(model.config.to_dict())  # as transformers writes it
    if shape.vision_config and "text_config" not in tree:  # as the hub has it by now
        text_config = {key: tree[key] for key in tree.keys() - {"vision_config", "model_type"}}
        assert shape == shape_of({**tree, **dict.fromkeys(text_config), "text_config": text_config})

    def count(part: Any) -> int:
        return sum(p.numel() for p in part.parameters())

    text, tower = family.language_model(model), family.tower(model)
    assert shape.text_config.layer == count(text.layers[0])
    assert shape.text_config.layers == count(text.layers)
    assert shape.text_config.embedding == count(text.embed_tokens)
    assert shape.parameters == count(model)
    weights = [p for n, p in model.named_parameters() if p.dim() > 1 and "visual" not in n]
    assert sorted(shape.matrices(vision=False)) == sorted(p.numel() for p in weights)
    if not shape.text_config.num_experts:
        assert shape.text_config.multiplied == sum(shape.text_config.matrices)
    if tower is None:
        assert shape.vision_config is None and shape.vision == 0
        return
    assert shape.vision_config is not None
    assert shape.vision_config.block == count(tower.blocks[0])
    assert shape.vision == count(tower)
    assert shape.vision_config.patch_values == tower.patch_embed.proj.weight[0].numel()
    assert sorted(shape.vision_config.matrices) == sorted(
        p.numel() for p in tower.parameters() if p.dim() > 1
    )


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
    cases = ["defaults", "Qwen3-VL-MoE, tiny"]  # experts, features for deeper layers, a tower without gates
    command = [sys.executable, "scripts/bench/memory_plan.py", "--cases", *cases]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    rows = [line.split(" | ") for line in ran.stdout.splitlines()]
    found = {row[0].removeprefix("| "): row for row in rows if row[0].removeprefix("| ") in cases}
    assert list(found) == cases
    for _, _, peak, planned, *_ in found.values():
        assert float(peak) > 30  # MiB
        assert float(planned) == pytest.approx(float(peak), rel=0.05)
