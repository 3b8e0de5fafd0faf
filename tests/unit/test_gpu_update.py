"""scripts/bench/gpu_update.py: its shapes, its count of operations, and a run of it on the CPU."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import gpu_update
import pytest
import torch
import transformers
from gpu_update import make_batches, make_config
from torch.utils.flop_counter import FlopCounterMode
from workload import draw_lengths, model_config

from mssr.actor.worker import PolicyWorker
from mssr.config import Config
from mssr.models.cost import CostModel
from mssr.models.published import shape_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("name", "parameters"), [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_the_shapes_are_those_of_the_published_models(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(model_config(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """Of forward and backward of an update with images. torch counts no attention on a CPU; that part of the
    formula has its test in test_cost.py."""
    args = argparse.Namespace(size="tiny", device="cpu", threads=1, lora=0, options=[], scale=0.2)
    prompts, responses = draw_lengths(4, 1, args.scale)
    config = make_config(args, tmp_path, prompts)
    worker = PolicyWorker(config, 0, f"file://{tmp_path}/rendezvous", set_threads=False)
    try:
        [batch] = make_batches(config, 4, 512, responses)
        with FlopCounterMode(display=False) as counter:
            worker.updater.backward(worker.updater.begin(batch), worker.updater.plan(batch, 0).updates[0])
    finally:
        worker.close()
    assert len(batch) == 4 and abs(batch.prompt_lengths - prompts).max() < 20
    model = worker.policy.model.config
    cost = CostModel(shape_of(model.to_dict()))
    operations = cost.operations(batch, range(len(batch)))
    patches = 4 * int((batch.tokens == model.image_token_id).sum())
    # Pixels need no gradient: the first layer of the tower has less to do.
    patch_values = model.vision_config.in_channels * 2 * model.vision_config.patch_size**2
    to_pixels = 2 * patch_values * model.vision_config.hidden_size * patches
    expected = 3 * (operations.matrices + cost.per_patch * patches) - to_pixels
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)
    text = model.text_config
    per_pair = 2 * text.num_hidden_layers * text.hidden_size  # heads * their width = hidden here
    assert operations.attention == pytest.approx(per_pair * float((batch.lengths**2).sum()))
    assert cost.per_patch * patches < operations.vision < 2 * cost.per_patch * patches
    assert operations.training() == pytest.approx(3 * operations.forward)
    assert operations.training(True, True) == pytest.approx(
        3 * operations.forward - sum((operations.matrices, 2 * operations.vision))
    )


def test_a_table_of_all_phases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    sizes = ["--size", "tiny", "--device", "cpu", "--sequences", "4", "--per-update", "2", "--scale", "0.1"]
    gpu_update.main([*sizes, "--threads", "1", "--peak-tflops", "0.1", "--out", str(out)])
    lines = [line.split("|")[1:-1] for line in out.read_text().splitlines() if line.startswith("|")]
    rows = {cells[0].strip(): cells[1:] for cells in lines[2:]}
    assert set(rows) == set(gpu_update.ROWS.values())
    for name in ("old log-probs", "reference log-probs", "forward and backward", "**update**: these three"):
        seconds, rate, mfu, memory = rows[name]
        assert float(seconds) > 0 and float(rate) > 0 and float(mfu.strip(" %")) > 0 and float(memory) > 0
    gpu_update.main([*sizes, "--threads", "1", "--out", str(out), "algorithm.kl.coef=0"])
    second = out.read_text().split("## ")[2]
    assert "reference log-probs" not in second and "not known here" in second


@pytest.mark.parametrize("freeze", ["true", "false"])
def test_vision_counts_where_the_tower_runs(tmp_path: Path, freeze: str) -> None:
    """The features of a frozen one are kept: the first pass of a step, the reference's, computes them."""
    args = argparse.Namespace(size="tiny", device="cpu", threads=1, lora=0, per_update=2, scale=0.1)
    args.options = [f"model.freeze_vision={freeze}"]
    prompts, responses = draw_lengths(4, 1, args.scale)
    config = make_config(args, tmp_path, prompts)
    update = gpu_update.measure(args, config, responses)[0][0]
    [batch, _] = make_batches(config, 2, 512, responses)
    cost = CostModel(shape_of(transformers.AutoConfig.from_pretrained(tmp_path / "model").to_dict()))
    operations = cost.operations(batch, range(len(batch)))
    text = operations.matrices + operations.attention
    found = update.operations
    assert found["reference"] == pytest.approx(operations.forward)
    if freeze == "true":
        assert found["forward and backward"] == pytest.approx(3 * text)
        assert found["old log-probs"] == pytest.approx(text)
    else:
        assert found["forward and backward"] == pytest.approx(3 * operations.forward)
        assert found["old log-probs"] == pytest.approx(operations.forward)


def test_an_option_that_is_none_is_named() -> None:
    with pytest.raises(SystemExit, match=r"no option actor\.nonsense"):
        gpu_update.set_option(Config(), "actor.nonsense=1")


def test_neither_ray_nor_vllm_nor_datasets_is_imported(tmp_path: Path) -> None:
    """In a process of its own: a machine with a GPU may have none of them."""
    program = (
        "import sys; import gpu_update; from mssr.actor.worker import PolicyWorker; "
        "print(*{'ray', 'vllm', 'datasets', 'omegaconf', 'math_verify'} & set(sys.modules))"
    )
    where, command = Path(gpu_update.__file__).parent, [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=where)
    assert result.stdout.strip() == ""
