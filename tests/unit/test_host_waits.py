"""The host never waits for the device in a micro-batch of the update, so that the device never waits for the
host. On a device that stands in, see `stand_in_device`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mssr.actor import step
from mssr.actor.update import PolicyUpdater
from mssr.algorithms.sequences import check_lengths, sequence_sums, to_tokens
from mssr.config.actor import LoraConfig
from mssr.device import to_device
from mssr.models import attention, encoded, packing, policy, vision
from mssr.models.bounded_cache import BoundedCache
from mssr.models.families import FAMILIES
from mssr.models.lora import add_adapters
from mssr.models.policy import PolicyModel
from mssr.types import TrainBatch
from tests.conftest import Workspace
from tests.unit.stand_in_device import DEVICE, StandIn
from tests.unit.step_lab import StepLab, open_lab

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def lab(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StepLab]:
    with open_lab(workspace, tmp_path_factory.mktemp("lab")) as lab:
        yield lab


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device computes attention as a GPU does, and no constant on it outlives the test."""
    monkeypatch.setattr(attention, "_kernel_takes", lambda query: query.is_meta)
    # That of the host takes no float64.
    can_use = "transformers.integrations.moe._can_use_grouped_mm"
    monkeypatch.setattr(can_use, lambda x, weight, offsets: weight.is_meta)
    yield
    encoded._per_channel.cache_clear()


def nothing(model: PolicyModel) -> None:
    pass


def adapt(model: PolicyModel) -> None:
    """Adapters, and so a frozen tower, whose features are kept."""
    add_adapters(model.model, LoraConfig(rank=4), seed=0)
    for name, p in model.named_parameters():
        p.data = p.data.double()
        if ".lora_B." in name:
            p.data += 0.01
    model.features = BoundedCache(2**24)


def recompute_in_half(model: PolicyModel) -> None:
    model.bfloat16().model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.train()


Prepare = Callable[[PolicyModel], None]


def copied(
    updater: PolicyUpdater, prepare: Prepare, mode: StandIn | None = None, device: str = "cpu"
) -> PolicyUpdater:
    """The same with models of its own, on a device, or on the one that stands in if that is there."""
    models = [copy.deepcopy(model) for model in (updater.policy, updater.reference)]
    for model in models:
        if model is not None:
            prepare(model.to(device))
        if model is not None and mode is not None:
            mode.put(model)
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1, foreach=False)  # type: ignore[union-attr]
    parts: Any = updater.config, *models, optimizer, updater.prompts, 0
    return PolicyUpdater(*parts, DEVICE if mode else torch.device(device))


def micro_batches(updater: PolicyUpdater, batch: TrainBatch) -> dict[str, Any]:
    """All passes of a step; the gradient of its first update."""
    state, plan = updater.begin(batch), updater.plan(batch, 0)
    assert sum(len(update.ranks[0]) for update in plan.updates) > 1
    updater.guard.begin()
    updater._before_updates(state, plan)
    updater.backward(state, plan.updates[0])
    updater._probe_kl(state, plan)
    updater.guard.flag()
    return {name: p.grad for name, p in updater.policy.named_parameters() if p.grad is not None}


SEVERAL = "actor.micro_batch_tokens=100", "actor.updates_per_step=1"
NORM = ["copy from the device", "copy to the device"]
TWO = "actor.updates_per_step=2"
CASES: dict[str, tuple[Prepare, list[str]]] = {
    "plain": (nothing, []),
    "reference, entropy, weights by sequence": (
        nothing,
        [
            "algorithm.kl.coef=0.1",
            "algorithm.loss.entropy_coef=0.01",
            "algorithm.correction.weight=sequence",
            "algorithm.correction.mask=geometric",
            TWO,
        ],
    ),
    "text anchor, loss by sequence": (
        nothing,
        ["algorithm.loss.text_anchor_coef=0.1", "algorithm.loss.name=gspo", TWO],
    ),
    "adapters": (adapt, []),
    "bfloat16, recomputed activations": (recompute_in_half, []),
}


@pytest.mark.parametrize("case", CASES)
def test_no_micro_batch_waits(lab: StepLab, tmp_path: Path, device: None, case: str) -> None:
    check_no_waits(lab, tmp_path, *CASES[case])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_none_waits_in_any_family(
    workspace_of: Callable[[str], Workspace], lab: StepLab, tmp_path: Path, device: None, model_type: str
) -> None:
    """In the process group of the other."""
    own = StepLab(workspace_of(model_type), ["t1", "t2", "t0"])
    check_no_waits(own, tmp_path, nothing, ["actor.micro_batch_tokens=50"])


def check_no_waits(lab: StepLab, tmp_path: Path, prepare: Prepare, options: list[str]) -> None:
    updater = lab.updater(tmp_path, *SEVERAL, *options)
    expected = micro_batches(copied(updater, prepare), lab.batch)
    with StandIn() as mode:
        gradients = micro_batches(copied(updater, prepare, mode), lab.batch)
    waits = mode.waits
    if lab.policy.family.experimental:  # without native kernels it goes through the sequences one by one
        waits = [wait for wait in waits if "/mssr/models/families/" not in wait]
    assert waits == []
    assert gradients.keys() == expected.keys()
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm()
    tolerance = 0.02 if prepare is recompute_in_half else 1e-9
    for name, gradient in gradients.items():
        assert (gradient.value - expected[name]).norm() < tolerance * norm, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_torch_finds_no_wait_on_a_gpu(lab: StepLab, tmp_path: Path, case: str) -> None:
    """It raises where the host waits. The first time kernels are loaded and memory is pinned."""
    prepare, options = CASES[case]
    updater = lab.updater(tmp_path, *SEVERAL, *options)

    def prepare_in_half(model: PolicyModel) -> None:
        prepare(model)
        for p in model.parameters():  # after it: the kernel takes no float64
            p.data = p.data.bfloat16()

    beside = copied(updater, prepare_in_half, device="cuda:0")
    for mode in ("default", "error"):
        beside.policy.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            gradients = micro_batches(beside, lab.batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected = micro_batches(copied(updater, prepare), lab.batch)
    norm, off = (
        torch.stack([x.double().norm() for x in xs]).norm()
        for xs in (expected.values(), (g.cpu().double() - expected[n] for n, g in gradients.items()))
    )
    assert off < 0.1 * norm


def test_a_step_waits_once_an_update_and_for_its_metrics(lab: StepLab, tmp_path: Path, device: None) -> None:
    """For the norm of the gradient, on which it depends whether the update is made. The norm goes back to a
    device that has nothing to do. However many micro-batches there are."""
    found = {}
    for updates, tokens in ((1, 64), (2, 4096)):
        more = f"actor.updates_per_step={updates}", f"actor.micro_batch_tokens={tokens}"
        updater = lab.updater(tmp_path, *more)
        with StandIn() as mode:
            copied(updater, nothing, mode).step(lab.batch, 0)
        assert all("mssr/actor/distributed.py" in wait for wait in mode.waits)
        found[updates, tokens] = [wait.partition(":")[0] for wait in mode.waits]
    end = ["copy from the device"] * 3
    assert found[1, 64] == NORM + end and found[2, 4096] == NORM * 2 + end


def test_log_probs_are_waited_for_once(lab: StepLab, tmp_path: Path, device: None) -> None:
    updater = lab.updater(tmp_path, "algorithm.kl.coef=0.1")
    expected = updater.log_probs(lab.batch, reference=True)
    with StandIn() as mode:
        found = copied(updater, nothing, mode).log_probs(lab.batch, reference=True)
    assert len(mode.waits) == 2  # of the policy and of the reference
    np.testing.assert_allclose(found.policy, expected.policy)
    np.testing.assert_allclose(found.reference, expected.reference)  # type: ignore[arg-type]


# --- what waits is seen ----------------------------------------------------------------------------

HOST = torch.arange(6.0)
WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.max()),
    "if": lambda x: 1 if x.isfinite().all() else 0,
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.cpu().numpy(),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "where of one": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 1),
    "boolean index": lambda x: x[x > 1],
    "boolean index to write to": lambda x: x.clone().index_put_((x > 1,), x[:4]),
    "masked_scatter": lambda x: x.masked_scatter(x > 1, x.clone().requires_grad_()).sum().backward(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "segment_reduce": lambda x: torch.segment_reduce(x, "sum", lengths=x.new_tensor([6]).long()),
    "split by a tensor": lambda x: torch.tensor_split(x, x[:2].long().cpu()),
    "index on the host": lambda x: x[torch.tensor([0, 2])],
    "copy to the device": lambda x: HOST.to(x.device),
    "copy that only seems not to block": lambda x: HOST.to(x.device, non_blocking=True),
    "copy that blocks from pinned memory": lambda x: HOST.pin_memory().to(x.device),
    "copy into": lambda x: x.copy_(HOST),
    "copy from the device": lambda x: HOST.clone().copy_(x),
    "tensor of values": lambda x: x + torch.tensor([1.0] * 6, device=x.device),
    "range that is asked for": lambda x: x.histc(3),
    "length that is asked for": lambda x: check_lengths(x.long(), 15),
}
NO_WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "pinned": lambda x: to_device(HOST, x.device),
    "scalar": lambda x: x * 2 + torch.tensor(3.0),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "fill": lambda x: x.clone()[2:].fill_(1.0),
    "set": lambda x: x.clone().index_put_((x > 1,), torch.tensor(0.0)),
    "slice": lambda x: x[1:4].sum(),
    "index": lambda x: x[to_device(torch.tensor([0, 2]), x.device)],
    "counts in a range": lambda x: x.histc(3, min=0, max=5),
    "spread": lambda x: to_tokens(x, torch.tensor([1, 2, 0, 0, 3, 1]), like=x.new_empty(7)),
    "sums": lambda x: sequence_sums(x, torch.tensor([1, 5])),
}


@pytest.mark.parametrize("name", [*WAITS, *NO_WAITS])
def test_what_waits_is_seen(name: str) -> None:
    function = (WAITS | NO_WAITS)[name]
    with StandIn() as mode:
        x = to_device(HOST, DEVICE).requires_grad_(name == "masked_scatter")
        try:
            function(x)
        except AssertionError as error:
            mode.waits.append(str(error))
    assert bool(mode.waits) == (name in WAITS), mode.waits


def old_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, non_blocking=True)


def old_features(self: PolicyModel, pixels: torch.Tensor, grids: Any) -> torch.Tensor:
    grid_thw = to_device(torch.tensor(grids), pixels.device)
    return image_features(self, pixels, list(map(tuple, grid_thw.tolist())))  # type: ignore[arg-type]


def old_index_copy(embeds: torch.Tensor, _: int, where: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(embeds, dtype=torch.bool).index_fill(1, where, True)
    return embeds.masked_scatter(mask, features[0])


image_features = PolicyModel._image_features
OLD: dict[str, tuple[Any, str, Any, str]] = {
    "unpinned batch": (packing, "to_device", old_copy, "copy to the device"),
    "unpinned tokens": (step, "to_device", old_copy, "copy to the device"),
    "unpinned places of images": (vision, "to_device", old_copy, "copy to the device"),
    "grids on the device": (PolicyModel, "_image_features", old_features, "test_host_waits.py"),
    "features by a mask": (torch.Tensor, "index_copy", old_index_copy, "masked_scatter_backward"),
    "transformers' look for packing": (policy, "NAME", "another", "masking_utils.py"),
    "attention by a loop": (attention, "_kernel_takes", lambda query: False, "mssr/models/attention.py"),
}


@pytest.mark.parametrize("name", OLD)
def test_the_waits_that_there_were_are_seen(
    lab: StepLab, tmp_path: Path, device: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    where, attribute, old, place = OLD[name]
    monkeypatch.setattr(where, attribute, old)
    updater = lab.updater(tmp_path, "actor.micro_batch_tokens=4096")
    with StandIn() as mode:
        beside = copied(updater, nothing, mode)
        beside.backward(beside.begin(lab.batch), beside.plan(lab.batch, 0).updates[0])
    assert mode.waits and all(place in wait for wait in mode.waits)
