"""Adapters: what they change, what they leave alone, and that engine and actor mean the same policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mssr.actor.checkpoint import SafeReader
from mssr.actor.sending import WeightSender
from mssr.actor.worker import PolicyWorker
from mssr.cluster.base import join_log_probs
from mssr.config import LoraConfig, to_dict
from mssr.errors import UserError
from mssr.models.loading import load_model
from mssr.models.lora import add_adapters, is_adapter
from mssr.models.packing import pack
from mssr.models.policy import PolicyModel
from mssr.runs import export as export_tool
from mssr.runs.config import load_config
from tests.conftest import Workspace
from tests.e2e.ranks import make_batch
from tests.unit.worker_lab import LORA, open_worker, weights_of

pytestmark = pytest.mark.unit


def all_log_probs(worker: PolicyWorker, batch: Any) -> tuple[np.ndarray, np.ndarray]:
    found = join_log_probs([worker.log_probs(batch, reference=True)], batch)
    assert found.reference is not None
    return found.policy, found.reference


def plain_log_probs(worker: PolicyWorker, batch: Any, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """By a model without adapters that has these weights."""
    model = load_model(worker.config.model, torch.float32)
    model.load_state_dict(weights)
    policy = PolicyModel(model)
    items = worker.updater.prompts.items(batch, range(len(batch.prompt_ids)))
    with torch.no_grad():
        return policy(pack(items, policy.merge_size))[0].numpy()


def test_the_policy_moves_and_the_reference_does_not(workspace: Workspace, tmp_path: Path) -> None:
    """Reference = the model before training; engine = actor, with the adapters merged, by plain names."""
    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])
    base = load_model(load_config(workspace.config).model, torch.float32).state_dict()
    with open_worker(workspace, tmp_path, *LORA) as worker:
        before = weights_of(worker)
        assert before.keys() == base.keys()
        assert all(torch.equal(before[n], base[n]) for n in base)  # every B is 0
        start = all_log_probs(worker, batch)
        np.testing.assert_array_equal(start[0], start[1])
        for step in range(2):
            metrics = worker.update(batch, step)
        assert metrics["policy/kl_ref"] > 0
        policy, reference = all_log_probs(worker, batch)
        np.testing.assert_array_equal(reference, start[1])
        assert np.abs(policy - reference).max() > 0.01
        after = weights_of(worker)
        np.testing.assert_allclose(plain_log_probs(worker, batch, after), policy, atol=1e-5)
        np.testing.assert_allclose(plain_log_probs(worker, batch, base), reference, atol=1e-5)
        changed = {n for n in base if not torch.equal(after[n], base[n])}
        linear = {n for n in base if ".language_model.layers." in n and n.endswith("proj.weight")}
        assert changed == linear
        # One model in memory, and an optimizer of the adapters alone.
        trained = {n for n, p in worker.policy.named_parameters() if p.requires_grad}
        assert trained and all(map(is_adapter, trained))
        [group] = worker.updater.optimizer.param_groups
        assert len(group["params"]) == len(trained) == 2 * len(linear)
        assert worker.policy.features  # of a frozen tower


def test_a_checkpoint_holds_the_adapters_alone_and_exports_merged(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])
    # Features that are kept were computed beside other images than those of a resumed run: equal to rounding.
    bitwise = "actor.vision_cache_gib=0"
    with open_worker(workspace, tmp_path, *LORA, bitwise) as worker:
        worker.update(batch, 0)
        worker.checkpoint.begin(str(tmp_path / "saved" / "actor"))
        worker.checkpoint.result()
        saved, config = weights_of(worker), worker.config
        worker.update(batch, 1)
        onward = weights_of(worker)
    names = SafeReader(str(tmp_path / "saved" / "actor")).read_metadata().state_dict_metadata
    assert names and all(is_adapter(name) for name in names)
    assert any(name.startswith("optimizer") for name in names)
    with open_worker(workspace, tmp_path, *LORA, bitwise) as worker:
        worker.checkpoint.load(str(tmp_path / "saved" / "actor"))
        loaded = weights_of(worker)
        worker.update(batch, 1)
        resumed = weights_of(worker)
    assert all(torch.equal(loaded[n], saved[n]) for n in saved)
    assert all(torch.equal(resumed[n], onward[n]) for n in saved)

    monkeypatch.setattr(export_tool, "resolve", lambda path: path)
    monkeypatch.setattr(export_tool, "verify", lambda path: SimpleNamespace(config=to_dict(config)))
    out = export_tool.export(tmp_path / "saved", tmp_path / "out", dtype="float32")
    model_config = config.model
    exported = load_model(type(model_config)(path=str(out)), torch.float32).state_dict()
    assert exported.keys() == saved.keys()
    for name, value in saved.items():
        torch.testing.assert_close(exported[name], value, atol=1e-6, rtol=0)
    base = load_model(model_config, torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(out / "adapter")).merge_and_unload().state_dict()
    for name, value in saved.items():
        torch.testing.assert_close(adapted[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        "actor.lora.dropout=0.5 actor.vision_cache_gib=0",
        "actor.lora.rank=0 actor.optimizer=adamw_8bit",
        "actor.lora.rank=0 actor.master_dtype=bfloat16 actor.rounding=stochastic",
        "actor.lora.rank=0 actor.master_dtype=bfloat16 actor.rounding=kahan",
    ],
)
def test_a_run_that_is_resumed_goes_on_bitwise(workspace: Workspace, tmp_path: Path, options: str) -> None:
    batch, directory = make_batch(workspace, ["t0", "t1", "t2", "t3"]), str(tmp_path / "saved")
    with open_worker(workspace, tmp_path, *LORA, *options.split()) as worker:
        worker.update(batch, 0)
        worker.checkpoint.begin(directory)
        worker.checkpoint.result()
        worker.update(batch, 1)
        onward = weights_of(worker)
    with open_worker(workspace, tmp_path, *LORA, *options.split()) as worker:
        worker.checkpoint.load(directory)
        worker.update(batch, 1)
        resumed = weights_of(worker)
    assert all(torch.equal(resumed[n], onward[n]) for n in onward)


def test_every_option_reaches_the_weights(workspace: Workspace, tmp_path: Path) -> None:
    batch = make_batch(workspace, ["t0", "t1", "t2", "t3"])

    def train(*overrides: str) -> dict[str, torch.Tensor]:
        with open_worker(workspace, tmp_path, *LORA, *overrides) as worker:
            for step in range(2):
                worker.update(batch, step)
            return weights_of(worker)

    def differs(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
        return any(not torch.equal(a[n], b[n]) for n in a)

    basis = train()
    assert not differs(basis, train())
    for option in ("rank=8", "alpha=8", "dropout=0.5", "targets=[q_proj,v_proj]"):
        assert differs(basis, train(f"actor.lora.{option}")), option
    full = train("actor.lora.rank=0")
    narrow = train("actor.lora.rank=0", "actor.master_dtype=bfloat16")
    compensated = train("actor.lora.rank=0", "actor.master_dtype=bfloat16", "actor.rounding=kahan")
    eight = train("actor.lora.rank=0", "actor.optimizer=adamw_8bit")
    assert differs(full, narrow) and differs(narrow, compensated) and differs(full, eight)
    assert all(torch.equal(v, v.bfloat16().float()) for v in (*narrow.values(), *compensated.values()))
    for offload in ("optimizer", "all"):  # on CPU there is nowhere to go
        assert not differs(full, train("actor.lora.rank=0", f"actor.offload={offload}"))
    targeted = train("actor.lora.targets=[q_proj]")
    base = load_model(load_config(workspace.config).model, torch.float32).state_dict()
    changed = {n for n in base if not torch.equal(targeted[n], base[n])}
    assert changed and all("language_model" in n and n.endswith("q_proj.weight") for n in changed)


def test_dropout_is_where_a_gradient_is(workspace: Workspace) -> None:
    model = load_model(load_config(workspace.config).model, torch.float32)
    add_adapters(model, LoraConfig(rank=2, dropout=0.5), seed=0)
    layer = model.model.language_model.layers[0].mlp.gate_proj
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
    assert not torch.equal(layer(x), layer(x))


def test_a_target_that_is_not_there_is_named(workspace: Workspace) -> None:
    model = load_model(load_config(workspace.config).model, torch.float32)
    with pytest.raises(UserError, match=r"no linear layer qkv; it has down_proj, gate_proj, k_proj"):
        add_adapters(model, LoraConfig(rank=2, targets=["qkv"]), seed=0)


def test_adapters_that_wait_on_the_host_are_merged_on_the_device(workspace: Workspace) -> None:
    """With actor.offload=all. On a device without memory, which takes no factor of the host's."""
    model = load_model(load_config(workspace.config).model, torch.float32)
    add_adapters(model, LoraConfig(rank=2), seed=0)
    sent = WeightSender(model, torch.bfloat16, torch.device("meta")).weights()
    assert {(tensor.device.type, tensor.dtype) for _, tensor in sent} == {("meta", torch.bfloat16)}
