"""`mssr plan`: what fits, what to change, and how long it takes; on every shipped config for GPUs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mssr.cluster.machine import Gpu, Machine, describe
from mssr.config import Config, ModelConfig
from mssr.errors import UserError
from mssr.models.gpus import KINDS
from mssr.models.host_memory import host_memory
from mssr.models.memory import EngineMemory, colocated_fits, totals
from mssr.models.published import read_shape
from mssr.models.rank_memory import GIB, Pass, RankMemory, Workload
from mssr.models.step_time import step_time
from mssr.runs.config import load_config
from mssr.tools.cli import main
from mssr.tools.plan import Plan, make_plan
from mssr.trainer import fit

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[2]
GEOMETRY = ROOT / "configs/geometry3k"
THREE, SEVEN = GEOMETRY / "qwen2_5_vl_3b.yaml", GEOMETRY / "qwen2_5_vl_7b.yaml"
SMALL, LARGE = "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"
SHAPE = read_shape(ModelConfig(path=LARGE))
H100 = KINDS["H100-80GB"]
APART = ["actor.num_ranks=6", "rollout.workers=2", "cluster.weight_transfer=object_store"]


def shipped() -> list[tuple[str, str]]:
    """Config and the GPUs that its name means."""
    kinds = {"4gpu": ["4xH100-80GB", "4xA100-80GB"], "1gpu": ["H100-80GB", "A100-80GB"]}
    kinds["24gb"] = ["RTX-4090-24GB", "L4-24GB"]
    files = [*GEOMETRY.glob("*.yaml"), *(ROOT / "configs/paper").rglob("*.yaml")]
    found = []
    for file in sorted(files):
        gpus = kinds.get(file.stem.rpartition("_")[2], ["8xH100-80GB", "8xA100-80GB"])
        found += [(str(file.relative_to(ROOT)), text) for text in gpus]
    return found


@pytest.mark.parametrize(("path", "gpus"), shipped())
def test_a_shipped_config_fits_colocated_on_the_gpus_that_it_is_for(path: str, gpus: str) -> None:
    plan = make_plan(load_config(ROOT / path), gpus, nodes=1)
    assert plan.problems == []
    assert plan.decision.colocated and plan.needed == plan.per_node


def test_the_table_of_the_docs_is_what_the_command_says() -> None:
    lines = (ROOT / "docs/memory.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if "](../configs/geo" in line]
    assert len(rows) == len(list(GEOMETRY.glob("*.yaml")))
    for _, _, _, link, sizes, *methods in rows:
        path = link.partition("](../")[2].removesuffix(")")
        number = {"4gpu": 4, "1gpu": 1, "24gb": 1}.get(Path(path).stem.rpartition("_")[2], 8)
        kind = "RTX-4090-24GB" if "24gb" in path else H100.name
        for method, text in zip(("mssr", "grpo"), methods, strict=True):
            config = load_config(ROOT / path, [f"algorithm.name={method}"])
            plan = make_plan(config, f"{number}x{kind}", nodes=1)
            taken, seconds = totals(next(iter(plan.memory.tables.values()))), plan.time().seconds
            assert sizes == f"{taken['generate'] / GIB:.0f}, {taken['update'] / GIB:.0f}"
            hours = seconds * config.trainer.steps * number / 3600
            assert text.removesuffix(" |") == f"{seconds:.0f} s, {hours:.0f} h"


def test_the_command_prints_a_table_that_a_terminal_can_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(SEVEN), "--gpus", "8xH100-80GB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "fits"
    assert lines[0].endswith(": 8.29e9 parameters, 0.68e9 of them in the vision tower")
    assert any(line.startswith("engine: KV cache") for line in lines)


def test_what_does_not_fit_is_refused_and_fits_with_what_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", str(SEVEN), "--gpus", "4xH100-80GB", "actor.num_ranks=4", "rollout.workers=4"]
    assert main([*command, "actor.activation_checkpointing=false"]) == 2
    problems, settings = capsys.readouterr().out.split("with these it fits:\n")
    assert "does not fit: rank + engine: update takes" in problems
    assert "  actor.activation_checkpointing=true\n" in settings
    assert main([*command, *settings.split()]) == 0


def planned(name: str, *settings: str) -> Plan:
    return make_plan(load_config(SEVEN, [f"model.path=Qwen/{name}", *settings]), "8xH200-141GB", 1)


def test_a_model_of_text_has_no_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(SEVEN), "model.path=Qwen/Qwen3-8B", "--gpus", "8xH100-80GB"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Qwen/Qwen3-8B: 8.19e9 parameters, no vision tower\n")
    assert "assumed: 0 tokens an image" in out and "encoded prompts" not in out
    both = planned("Qwen3-8B"), planned("Qwen3-VL-8B-Instruct", "model.freeze_vision=true")
    text, seeing = (RankMemory(p.config, p.shape, "cuda").update() for p in both)
    assert "image features" in seeing.keys() - text.keys()
    assert text["parameters"] < seeing["parameters"]
    with pytest.raises(UserError, match=r"model\.freeze_vision=true is for models that see images"):
        planned("Qwen3-8B", "model.freeze_vision=true")


def test_a_model_of_experts_holds_all_and_computes_with_some() -> None:
    dense, experts = planned("Qwen3-VL-32B-Instruct"), planned("Qwen3-VL-30B-A3B-Instruct")
    assert experts.memory.engine.weights > 0.9 * dense.memory.engine.weights
    assert sum(RankMemory(experts.config, experts.shape, "cuda").update().values()) > 60 * GIB
    assert experts.shape.text_config.multiplied < dense.shape.text_config.multiplied / 9
    assert experts.time().update < dense.time().update / 4
    assert experts.time().generate < 0.6 * dense.time().generate


def test_features_for_deeper_layers_take_memory_of_an_engine() -> None:
    made = planned("Qwen3-VL-8B-Instruct")
    vision = made.shape.vision_config
    assert vision is not None and vision.levels == 3
    plain = dataclasses.replace(made.shape, vision_config=dataclasses.replace(vision, levels=0))
    engines = [EngineMemory.of(made.config, s, H100.memory_bytes, True) for s in (made.shape, plain)]
    assert engines[0].work - engines[1].work == pytest.approx(2 * 16384 * 4096 * 3)


def test_where_nothing_helps_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(SEVEN), "--gpus", "T4-16GB", "actor.num_ranks=1", "rollout.workers=1"]) == 2
    out = capsys.readouterr().out
    assert "it takes more GPUs or nodes" in out
    assert "no bfloat16" in out


def test_what_a_training_would_place_apart_is_not_planned_for_together() -> None:
    lagging = make_plan(load_config(SEVEN, ["rollout.lag=1"]), "8xH100-80GB", 1)
    assert not lagging.decision.colocated
    assert lagging.problems == ["16 GPUs are needed and 8 are there: lower actor.num_ranks, rollout.workers"]
    # Where it is memory that keeps them apart, there are too few for that: it says what is to fit.
    large = make_plan(load_config(SEVEN), "8xA100-40GB", 1)
    assert large.decision.colocated and large.problems[0].startswith("rank + engine: ")


def test_gpus_are_counted() -> None:
    config = load_config(THREE, [*APART])
    assert make_plan(config, "8xH100-80GB", 1).problems == []
    assert make_plan(config, "4xH100-80GB", 2).problems == []
    [problem] = make_plan(config, "4xH100-80GB", 1).problems
    assert problem.startswith("8 GPUs are needed and 4 are there")
    wide = load_config(THREE, ["rollout.tensor_parallel=4", "rollout.workers=2"])
    assert any("on one node, with 2 GPUs" in line for line in make_plan(wide, "2xH100-80GB", 4).problems)


def test_a_model_that_is_neither_here_nor_known_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"config.json of nobody/none cannot be read .* or one of Qwen/"):
        make_plan(load_config(THREE, ["model.path=nobody/none"]), "8xH100-80GB", 1)


def seconds(config: Config, path: str, colocated: bool, work: Workload) -> float:
    transport = "ipc" if colocated else "object_store"
    return step_time(config, read_shape(ModelConfig(path=path)), H100, colocated, transport, work).seconds


def test_seconds_are_near_what_others_measured_and_what_was_worked_out_by_hand() -> None:
    work, seven = Workload(640, 160, 600), load_config(SEVEN)
    assert seconds(seven, LARGE, True, work) == pytest.approx(133, rel=0.25)
    assert seconds(load_config(SEVEN, APART), LARGE, False, work) == pytest.approx(205, rel=0.25)
    # EasyR1 on 8 H100, geometry3k: 512 prompts with 5 responses, 2000 and 1800 tokens/s/GPU, so 750 and
    # 675 tokens a response with its prompt; 120 s a step each, MFU 23% and 8%. It is slower where it waits.
    easy = [
        "algorithm.name=grpo",
        "rollout.n=5",
        "rollout.rollouts_per_step=2560",
        "actor.updates_per_step=4",
    ]
    large = step_time(load_config(SEVEN, easy), SHAPE, H100, True, "ipc", Workload(350, 80, 320))
    assert large.seconds == pytest.approx(120, rel=0.35)
    assert large.mfu == pytest.approx(0.23, abs=0.05)
    assert 30 < seconds(load_config(THREE, easy), SMALL, True, Workload(350, 80, 245)) < 120


MEMORY = {
    "actor.activation_checkpointing=true": ["actor.activation_checkpointing=false"],
    "actor.micro_batch_tokens=4096": ["actor.micro_batch_tokens=16384"],
    "actor.head_chunk_tokens=256": [
        "actor.head_chunk_tokens=8192",
        "actor.micro_batch_tokens=16384",
        "actor.lora.rank=8",
    ],
    "actor.shard_size=8": ["actor.shard_size=2"],
    "algorithm.kl.coef=0": ["algorithm.kl.coef=0.01"],
    "actor.lora.rank=16": [],
    "model.freeze_vision=true": ["actor.shard_size=2"],
    "actor.optimizer=adamw_8bit": [],
    "actor.master_dtype=bfloat16": [],
    "actor.offload=optimizer": [],
    "actor.offload=all": ["actor.offload=optimizer"],
    "actor.offload_reference=true": [],
    "actor.keep_gathered=false": ["actor.keep_gathered=true"],
}
"""Option -> those beside which it saves memory of a rank."""


@pytest.mark.parametrize("option", MEMORY)
def test_an_option_that_saves_memory_does_so_by_plan(option: str) -> None:
    beside = MEMORY[option]

    def peak(*settings: str) -> float:
        config = load_config(SEVEN, settings)
        return sum(RankMemory(config, SHAPE, "cuda").update().values())

    assert peak(*beside, option) < 0.995 * peak(*beside)


def test_an_engine_gets_what_is_left() -> None:
    plans = {
        share: make_plan(load_config(SEVEN, [f"rollout.gpu_memory_utilization={share}"]), "8xH100-80GB", 1)
        for share in (0.3, 0.5)
    }
    engine = plans[0.5].memory.engine
    more = engine.cache - plans[0.3].memory.engine.cache
    assert more == pytest.approx(0.2 * H100.memory_bytes)
    assert engine.token == 2 * 28 * 512 * 2  # keys and values, 28 layers, 4 heads of 128, bfloat16
    split = make_plan(
        load_config(SEVEN, ["rollout.tensor_parallel=2", "rollout.workers=4"]), "8xH100-80GB", 1
    )
    assert split.memory.engine.token == engine.token / 2
    assert split.memory.engine.weights < 0.6 * engine.weights


def test_colocated_sums_are_those_of_both() -> None:
    [table] = make_plan(load_config(SEVEN), "8xH100-80GB", 1).memory.tables.values()
    generating = totals(table)["generate"]
    engine = 0.65 * H100.memory_bytes
    assert generating == pytest.approx(
        engine
        + sum(
            row["generate"]
            for name, row in table.items()
            if not name.startswith("engine") and "generate" in row
        )
    )
    assert colocated_fits(load_config(SEVEN), int(generating) + 1)[0]
    assert not colocated_fits(load_config(SEVEN), int(0.5 * generating))[0]


def test_a_checkpoint_of_states_in_host_memory_is_begun_while_engines_sleep() -> None:
    config = load_config(SEVEN, ["actor.offload=optimizer"])
    [table] = make_plan(config, "8xH100-80GB", 1).memory.tables.values()
    assert "save" not in table["engine: KV cache"] and "save" not in table["engine: weights"]
    states = table["optimizer states"]
    assert states["save"] == pytest.approx(8.29e9 / 8 * 8, rel=0.01) and not states["generate"]
    [kept] = make_plan(load_config(SEVEN), "8xH100-80GB", 1).memory.tables.values()
    assert kept["engine: KV cache"]["save"] == kept["engine: KV cache"]["generate"]


def test_gradients_that_wait_for_other_copies_of_the_policy_are_in_float32() -> None:
    def gradients(*settings: str) -> float:
        config = load_config(SEVEN, ["actor.master_dtype=bfloat16", "actor.num_ranks=8", *settings])
        return RankMemory(config, SHAPE, "cuda").update()["gradients"]

    layers, all_of_them = 28 * SHAPE.text_config.layer, SHAPE.parameters
    assert gradients("actor.shard_size=8") == 2 * all_of_them / 8
    assert gradients("actor.shard_size=4") == (4 * layers + 2 * (all_of_them - layers)) / 4


def test_every_copy_of_the_policy_is_copied_for_a_checkpoint() -> None:
    one = load_config(SEVEN)
    two = load_config(SEVEN, ["actor.num_ranks=16", "rollout.workers=16", "actor.shard_size=8"])
    of_node = host_memory(two, SHAPE, "cuda", "ipc", nodes=2)
    assert of_node == host_memory(one, SHAPE, "cuda", "ipc")


def test_offloaded_states_take_a_power_of_two_bytes_for_every_tensor() -> None:
    def offloaded(*settings: str) -> float:
        config = load_config(SEVEN, settings)
        return host_memory(config, SHAPE, "cuda", "ipc")["offloaded"] / 8

    # Of a rank: 4 bytes each of an eighth of gate, up and down (34 MB) take 64 MiB, of the embedding 512 MiB.
    least = 2 * (28 * 3 * 2**26 + 2 * 2**29)
    assert least < offloaded("actor.offload=optimizer") < 1.25 * least
    assert offloaded("actor.offload=optimizer") > 1.5 * 8 * SHAPE.parameters / 8
    assert offloaded("actor.lora.rank=8", "actor.offload=all") > 2 * SHAPE.text / 8  # beneath them


def test_a_pass_holds_at_least_the_longest_sequence() -> None:
    config = load_config(THREE, ["actor.micro_batch_tokens=16"])
    largest = Pass.largest(config, read_shape(ModelConfig(path=SMALL)), Workload(640, 160, 600))
    assert largest.tokens == 4096
    assert largest.patches > 4 * 640 and largest.responses > 600


def here(memory: float, gpu: float = 0.0) -> Machine:
    known = describe()
    gpus = (Gpu(0, "NVIDIA H100 80GB HBM3", int(gpu), int(gpu), "9.0", False),) if gpu else ()
    return dataclasses.replace(known, memory_bytes=int(memory), gpus=gpus)


def test_training_warns_of_gpus_memory_and_disk_that_do_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "free_disk", lambda path: 100 * GIB)
    three = load_config(GEOMETRY / "qwen2_5_vl_3b_1gpu.yaml", [f"trainer.run_dir={tmp_path}"])
    assert fit.shortages(three, "cuda", here(500 * GIB, 80 * GIB)) == []
    [line] = fit.shortages(three, "cuda", here(500 * GIB, 40 * GIB))
    assert line.startswith("rank + engine: ") and "of 40.0 GiB" in line
    [line] = fit.shortages(three, "cuda", here(16 * GIB, 80 * GIB))
    assert "of memory of 16 GiB" in line
    [line] = fit.shortages(load_config(SEVEN), "cuda", here(500 * GIB, 80 * GIB))
    assert line.startswith("checkpoints take 371 GiB and 100 are free")
    unknown = load_config(SEVEN, [f"model.path={tmp_path}"])
    assert fit.shortages(unknown, "cuda", here(GIB, GIB)) == []


def test_the_digits_run_fits_on_a_laptop_of_8_gib(tmp_path: Path) -> None:
    digits = load_config(ROOT / "configs/digits/mssr.yaml", [f"model.path={tmp_path}", "reward.workers=2"])
    tiny = {"intermediate_size": 256, "num_hidden_layers": 4}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 64, "intermediate_size": 128, "depth": 3, "out_hidden_size": 128}
    text = {"hidden_size": 128, "vocab_size": 512, **tiny}
    tree = {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    assert fit.shortages(digits, "cpu", here(8 * GIB)) == []
    [line] = fit.shortages(digits, "cpu", here(2 * GIB))
    assert "of memory of 2 GiB" in line
