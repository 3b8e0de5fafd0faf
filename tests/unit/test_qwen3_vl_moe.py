"""Qwen3-VL-MoE: its router, its experts, and how their weights lie in files and engines."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mssr.actor.worker import PolicyWorker
from mssr.config import LoraConfig, ModelConfig
from mssr.errors import UserError
from mssr.models.families import FAMILIES, family_of
from mssr.models.loading import check_model_path, import_transformers, load_model
from mssr.models.lora import add_adapters
from mssr.models.tiny import TinySize, train_tokenizer
from mssr.runs.config import load_config
from tests.conftest import CORPUS, Workspace
from tests.e2e.ranks import make_batch

pytestmark = pytest.mark.unit
FAMILY: Any = FAMILIES["qwen3_vl_moe"]
FILE = "model.safetensors"


def tiny_config() -> Any:
    return FAMILY.tiny_config(train_tokenizer(CORPUS).get_vocab(), TinySize())


def made(config: Any, device: str) -> Any:
    with torch.device(device):
        return import_transformers().Qwen3VLMoeForConditionalGeneration(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("moe")
    FAMILY.save(made(tiny_config(), "cpu"), directory)
    return directory


@pytest.fixture
def block(saved: Path) -> Any:
    """A router with its experts, as they are trained."""
    return load_model(ModelConfig(path=str(saved)), torch.float32).model.language_model.layers[0].mlp


# --- the router --------------------------------------------------------------------------------------------


def test_a_router_computes_in_float32_in_a_bfloat16_pass(block: Any) -> None:
    """Two experts whose logits are equal in bfloat16; float32 tells them apart."""
    router, k = block.gate.bfloat16(), block.gate.top_k
    hidden = torch.ones(1, router.hidden_dim, dtype=torch.bfloat16)
    with torch.no_grad():
        router.weight.fill_(-1.0)
        router.weight[1:4] = 1.0
        router.weight[1, 0] -= 2**-6  # of a sum of 128
        router.weight[3, 0] += 2**-6
    logits, weights, chosen = router(hidden)
    assert sorted(chosen[0].tolist()) == [2, 3] and k == 2
    assert logits.dtype == torch.float32 and logits[0, 3] - logits[0, 2] == 2**-6
    assert weights.dtype == torch.bfloat16  # as what the experts give is
    theirs = type(router).forward(router, hidden)[0]
    assert theirs[0, 1] == theirs[0, 2] == theirs[0, 3]  # in transformers', by which expert 1 is as good


def test_a_router_chooses_as_transformers_does(block: Any) -> None:
    hidden = torch.randn(50, block.gate.hidden_dim, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(block.gate(hidden), type(block.gate).forward(block.gate, hidden), strict=True):
        assert torch.equal(ours, theirs)
    assert block.gate.double()(hidden.double())[0].dtype == torch.float64


def balance(block: Any, weight: torch.Tensor, hidden: torch.Tensor) -> float:
    with torch.no_grad():
        block.gate.weight.copy_(weight)
        block.gate(hidden)
    language_model = SimpleNamespace(layers=[SimpleNamespace(mlp=block), SimpleNamespace(mlp=nn.Identity())])
    [value] = FAMILY.measure(language_model)["policy/router_balance"]
    return float(value)


def test_the_balance_is_1_where_all_have_the_same_and_e_over_k_where_some_have_all(block: Any) -> None:
    e, k, d = block.gate.num_experts, block.gate.top_k, block.gate.hidden_dim
    weight = torch.zeros(e, d)
    weight[torch.arange(e), torch.arange(e)] = 50.0
    weight[torch.arange(e), (torch.arange(e) + 1) % e] = 49.0
    assert balance(block, weight, torch.eye(d)[:e]) == pytest.approx(1.0, abs=1e-5)
    to_two = torch.zeros(e, d)
    to_two[1:3] = 1.0
    assert balance(block, to_two, torch.ones(7, d)) == pytest.approx(e / k, abs=1e-5)


def test_the_balance_is_that_of_transformers_over_the_experts_of_a_token(block: Any) -> None:
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(n, block.gate.hidden_dim, generator=generator) * 0.3 for n in (5, 40))
    expected = load_balancing_loss_func((hidden @ weight.T,), num_experts=5, top_k=2)
    assert balance(block, weight, hidden) == pytest.approx(float(expected) / 2, rel=1e-5) != 1


def test_the_balance_of_all_passes_is_reported(
    workspace_of: Callable[[str], Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that train, each once, though with recomputed activations routers run twice."""
    workspace, found, measure = workspace_of("qwen3_vl_moe"), [], FAMILY.measure

    def recorded(language_model: Any) -> dict[str, torch.Tensor]:
        found.append(measure(language_model)["policy/router_balance"])
        return {"policy/router_balance": found[-1]}

    monkeypatch.setattr(FAMILY, "measure", recorded)
    sizes = ["rollout.rollouts_per_step=4", "actor.micro_batch_tokens=128", "actor.updates_per_step=1"]
    overrides = [*sizes, "actor.num_ranks=1", "actor.activation_checkpointing=true"]
    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])
    worker = PolicyWorker(load_config(workspace.config, overrides), 0, f"file://{tmp_path}/rendezvous")
    try:
        passes = len(worker.updater.plan(batch, 0).updates[0].ranks[0])
        metrics = worker.update(batch, 0)
    finally:
        worker.close()
    assert passes > 1 and {len(values) for values in found} == {3}  # the fourth layer has no experts
    assert metrics["policy/router_balance"] == pytest.approx(torch.stack(found[:passes]).mean().item())


# --- experts -----------------------------------------------------------------------------------------------


def test_experts_without_tokens_have_a_gradient_of_zeros(block: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have a row all the same: some kernels leave what was in memory where there is none."""
    grouped, offsets = nn.functional.grouped_mm, []

    def counted(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        offsets.append(offs)
        return grouped(x, weight, offs=offs)

    monkeypatch.setattr(nn.functional, "grouped_mm", counted)
    experts, generator = block.experts, torch.Generator().manual_seed(0)
    hidden = torch.randn(9, experts.hidden_dim, generator=generator, requires_grad=True)
    chosen = torch.tensor([[0, 3]]).expand(9, -1)
    weights = torch.rand(9, 2, generator=generator, requires_grad=True)
    parameters = [hidden, weights, *experts.parameters()]
    found = []
    for forward in (experts.forward, lambda *args: type(experts).forward(experts, *args)):
        out = forward(hidden, chosen, weights)
        assert out.shape == hidden.shape
        found.append([out, *torch.autograd.grad(out.square().sum(), parameters)])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
    for gradient in found[0][-2:]:
        assert [bool(expert.any()) for expert in gradient] == [True, False, False, True, False]
    rows = [torch.diff(offs, prepend=offs.new_zeros(1)).tolist() for offs in offsets]
    assert all(min(r) >= 1 and sum(r) == 24 for r in rows[:2]) and min(rows[2]) == 0


def test_adapters_reach_no_experts() -> None:
    config = tiny_config()
    config.text_config.mlp_only_layers = []
    with pytest.raises(UserError) as error:
        add_adapters(made(config, "meta"), LoraConfig(rank=2, targets=["gate_proj"]), seed=0)
    said = "actor.lora.targets: the language model has no linear layer gate_proj; it has "
    assert str(error.value) == said + "k_proj, o_proj, q_proj, v_proj"


# --- files and engines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": []}, {"decoder_sparse_step": 2}])
def test_a_shape_has_the_parameters_of_the_model(changes: dict[str, Any]) -> None:
    """By the names in published files, and by those that transformers writes."""
    config = tiny_config()
    tree = config.to_dict()
    written = tree["text_config"] | changes
    published = written | {"num_experts": written["num_local_experts"]}
    del published["num_local_experts"]
    model = made(type(config)(**tree | {"text_config": dict(written)}), "meta")
    for text in (written, published):
        shape = FAMILY.shape(tree | {"text_config": text})
        assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_weights_of_experts_that_are_not_normalised_are_refused() -> None:
    tree = tiny_config().to_dict()
    tree["text_config"]["norm_topk_prob"] = False
    with pytest.raises(UserError, match=r"^model\.path: norm_topk_prob=false in its config\.json"):
        FAMILY.shape(tree)


def test_files_have_experts_as_published_ones(saved: Path, tmp_path: Path) -> None:
    """Which is how vLLM and transformers read them, and how an engine is handed them."""
    model, stored = load_model(ModelConfig(path=str(saved)), torch.float32), load_file(saved / FILE)
    text = model.config.text_config
    e, d, width = text.num_experts, text.hidden_size, text.moe_intermediate_size
    stem = "model.language_model.layers.0.mlp.experts"
    assert stored[f"{stem}.gate_up_proj"].shape == (e, d, 2 * width)
    assert stored[f"{stem}.down_proj"].shape == (e, width, d)
    state = {n: FAMILY.engine_weight(n, w) for n, w in model.state_dict().items() if n != "lm_head.weight"}
    assert state.keys() == stored.keys() and all(torch.equal(state[n], stored[n]) for n in stored)
    assert text.norm_topk_prob is True  # vLLM wants it; transformers does not know it
    FAMILY.save(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == (saved / FILE).read_bytes()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_experts_are_packed_anew_on_cpu_alone(device: str) -> None:
    """On a GPU recorded graphs call the kernel."""
    experts, other = nn.Linear(2, 2, device=device), nn.Linear(2, 2, device=device)
    experts.quant_method = SimpleNamespace(moe_kernel="kernel")  # type: ignore[assignment]
    other.quant_method = SimpleNamespace()  # type: ignore[assignment]
    FAMILY.before_load(nn.Sequential(other, nn.Sequential(experts), nn.ReLU()))
    assert experts.quant_method.moe_kernel == (None if device == "cpu" else "kernel")
    assert vars(other.quant_method) == {}


def test_what_transformers_saved_is_refused(saved: Path, tmp_path: Path) -> None:
    """vLLM would end in shapes that do not fit."""
    section = ModelConfig(path=str(tmp_path))
    model = load_model(ModelConfig(path=str(saved)), torch.float32)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=rf"^model\.path: {tmp_path} was saved by transformers, .*\.save\("
    ) as said:
        check_model_path(section)
    assert "\n" not in str(said.value)
    family_of(load_model(section, torch.float32).config).save(model, tmp_path)
    check_model_path(section)
    (tmp_path / FILE).write_bytes(b"not much")
    with pytest.raises(UserError, match=rf"^model\.path: {tmp_path / FILE} cannot be read"):
        check_model_path(section)


def test_an_expert_is_shared_out_over_devices_or_refused(saved: Path, tmp_path: Path) -> None:
    tree = json.loads((saved / "config.json").read_text())
    shutil.copy(saved / FILE, tmp_path)
    for width in (96, 90):
        tree["text_config"]["moe_intermediate_size"] = width
        (tmp_path / "config.json").write_text(json.dumps(tree))
        fails = pytest.raises(UserError, match="tensor_parallel=4 does not divide moe_intermediate_size=90")
        with fails if width == 90 else contextlib.nullcontext():
            check_model_path(ModelConfig(path=str(tmp_path)), tensor_parallel=4)
