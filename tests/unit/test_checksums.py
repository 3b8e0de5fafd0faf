"""Checksums tell whether an engine has the actor's weights, however it lays them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mssr.errors import TrainingError, TransferInterruptedError
from mssr.rollout.checksums import Arriving, Loaded, WeightCheck, checksum, checksums, differences

pytestmark = pytest.mark.unit
Tensors = dict[str, torch.Tensor]
LAYER = "model.language_model.layers.0"
ENGINE_LAYER = "language_model.model.layers.0"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 16, 4, 2, 4, 30
EXPERTS, EXPERT_WIDTH = 3, 8


def actor_weights(seed: int = 0) -> Tensors:
    """By Hugging Face names: what vLLM fuses, pads, splits or leaves whole."""
    torch.manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.visual.patch_embed.proj.weight": (8, 3, 2, 2, 2),
        "model.visual.blocks.0.attn.qkv.weight": (24, 8),
        "model.visual.blocks.0.mlp.gate_proj.bias": (12,),
        "model.visual.blocks.0.mlp.up_proj.bias": (12,),
        "model.language_model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{LAYER}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        f"{LAYER}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{LAYER}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        f"{LAYER}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"{LAYER}.input_layernorm.weight": (HIDDEN,),
        f"{LAYER}.mlp.gate.weight": (EXPERTS, HIDDEN),
        f"{LAYER}.mlp.experts.gate_up_proj": (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN),
        f"{LAYER}.mlp.experts.down_proj": (EXPERTS, HIDDEN, EXPERT_WIDTH),
    }
    found = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    return found | {"lm_head.weight": found["model.language_model.embed_tokens.weight"]}


def engine_weights(actor: Tensors, process: int, processes: int) -> Tensors:
    """What vLLM has of them, in one of its processes."""

    def rows(tensor: torch.Tensor, of: int = processes) -> torch.Tensor:
        return tensor.chunk(of)[process * of // processes]

    def part(name: str) -> torch.Tensor:
        return actor[f"{LAYER}.self_attn.{name}_proj.weight"]

    kv = min(processes, KV_HEADS)
    padded = nn.functional.pad(actor["lm_head.weight"], (0, 0, 0, 64 - VOCABULARY))
    qkv = torch.cat([rows(part("q")), rows(part("k"), kv), rows(part("v"), kv)])
    mlp, router = f"{ENGINE_LAYER}.mlp", actor[f"{LAYER}.mlp.gate.weight"]
    halves = actor[f"{LAYER}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
    w13 = torch.cat([half.chunk(processes, dim=1)[process] for half in halves], dim=1)
    down = actor[f"{LAYER}.mlp.experts.down_proj"]
    experts = {"w13_weight": w13, "w2_weight": down.chunk(processes, dim=2)[process]}
    return {
        "visual.patch_embed.proj.weight": actor["model.visual.patch_embed.proj.weight"],
        "visual.blocks.0.attn.qkv.weight": rows(actor["model.visual.blocks.0.attn.qkv.weight"]),
        "visual.blocks.0.mlp.gate_up_proj.bias": torch.cat(
            [rows(actor[f"model.visual.blocks.0.mlp.{x}_proj.bias"]) for x in ("gate", "up")]
        ),
        "language_model.model.embed_tokens.weight": rows(padded),
        f"{ENGINE_LAYER}.self_attn.qkv_proj.weight": qkv,
        f"{ENGINE_LAYER}.self_attn.o_proj.weight": part("o").chunk(processes, dim=1)[process],
        f"{ENGINE_LAYER}.input_layernorm.weight": actor[f"{LAYER}.input_layernorm.weight"],
        **{f"{mlp}.experts.routed_experts.{name}": weight for name, weight in experts.items()},
        # A module in two places.
        f"{mlp}.gate.weight": router,
        f"{mlp}.experts.gate.weight": router,
        "language_model.lm_head.weight": rows(padded),
    }


def loaded(
    actor: Tensors, processes: int = 1, change: Callable[[Tensors], Any] = lambda held: None
) -> list[Loaded]:
    """By an engine without fault, but for a change of what its last process has."""
    found = []
    for process in range(processes):
        held = {k: v.clone() for k, v in engine_weights(actor, process, processes).items()}
        if process == processes - 1:
            change(held)
        copies = max(1, processes // KV_HEADS)
        found.append(Loaded("", checksums(actor), checksums(held), kv_copies=copies))
    return found


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_engine_that_has_them_passes(processes: int) -> None:
    """Fused, padded, split by rows, columns and within experts, whole everywhere, heads in two of four."""
    actor = actor_weights()
    assert differences(checksums(actor), loaded(actor, processes)) == []


def test_an_engine_of_transformers_fuses_nothing() -> None:
    actor = actor_weights()
    sent = checksums(actor)
    assert differences(sent, [Loaded("", sent, sent)]) == []
    q, k = (f"{LAYER}.self_attn.{x}_proj.weight" for x in "qk")
    exchanged = sent | {q: sent[k], k: sent[q]}
    assert differences(sent, [Loaded("", sent, exchanged)]) == [k, q]


def flip_a_bit(name: str) -> Callable[[Tensors], None]:
    def flip(held: Tensors) -> None:
        held[name].flatten().view(torch.int16)[3] ^= 1

    return flip


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"{ENGINE_LAYER}.self_attn.qkv_proj.weight", f"{LAYER}.self_attn.q_proj.weight"),
        (f"{ENGINE_LAYER}.input_layernorm.weight", f"{LAYER}.input_layernorm.weight"),
        ("visual.patch_embed.proj.weight", "model.visual.patch_embed.proj.weight"),
        (f"{ENGINE_LAYER}.mlp.experts.routed_experts.w13_weight", f"{LAYER}.mlp.experts.gate_up_proj"),
        (f"{ENGINE_LAYER}.mlp.experts.routed_experts.w2_weight", f"{LAYER}.mlp.experts.down_proj"),
    ],
)
def test_one_bit_is_seen_and_its_tensor_named(name: str, told: str, processes: int) -> None:
    actor = actor_weights()
    assert told in differences(checksums(actor), loaded(actor, processes, flip_a_bit(name)))


def test_weights_of_another_time_are_seen() -> None:
    old, new = actor_weights(0), actor_weights(1)
    assert differences(checksums(new), loaded(old)) == sorted(new)
    # An engine that was sent the new ones, and did not take them.
    stale = [Loaded("", checksums(new), loaded(old)[0].held)]
    assert differences(checksums(new), stale) == sorted(new)


def test_a_tensor_that_was_not_sent_is_seen() -> None:
    """As the tied head, which vLLM does not derive from the embedding when it loads again."""
    actor = actor_weights()
    without = {k: v for k, v in actor.items() if k != "lm_head.weight"}
    assert differences(checksums(without), loaded(actor)) == [
        "language_model.lm_head.weight",
        "lm_head.weight",
    ]
    # Lost on the way.
    [engine] = loaded(actor)
    lost = Loaded("", checksums(without), engine.held)
    assert differences(checksums(actor), [lost]) == ["lm_head.weight"]


def test_what_cannot_be_seen_is_compared_by_what_arrived() -> None:
    actor = actor_weights()
    [engine] = loaded(actor)
    assert engine.held is not None and engine.arrived is not None
    name = f"{ENGINE_LAYER}.self_attn.o_proj.weight"
    visible = dict(engine.held) | {name: None}
    packed = Loaded("", engine.arrived, visible)
    assert differences(checksums(actor), [packed]) == []
    changed = dict(engine.arrived) | {f"{LAYER}.self_attn.o_proj.weight": 1}
    wrong = differences(checksums(actor), [Loaded("", changed, visible)])
    assert wrong == [f"{LAYER}.self_attn.o_proj.weight"]
    # As is all of an engine that quantizes.
    assert differences(checksums(actor), [Loaded("", engine.arrived)]) == []
    assert differences(checksums(actor), [Loaded("", changed)]) == wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checksum_is_of_the_bits_and_not_of_their_order(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(50, 40).to(dtype)
    shuffled = tensor.flatten()[torch.randperm(tensor.numel())].reshape(40, 50)
    padded = torch.cat([tensor, torch.zeros(7, 40, dtype=dtype)])
    assert checksum(tensor) == checksum(shuffled.T) == checksum(padded)
    top, bottom = tensor.split([20, 30])
    assert checksum(top) + checksum(bottom) == checksum(tensor)
    # Changes that a plain sum would not see.
    moved = tensor.clone()
    moved[0, 0], moved[0, 1] = tensor[0, 0] + 1, tensor[0, 1] - 1
    assert checksum(moved) != checksum(tensor) != checksum(-tensor)


def test_when_an_engine_is_checked() -> None:
    actor = actor_weights()
    sent, right = checksums(actor), loaded(actor)
    first, always, never = (WeightCheck(when) for when in ("first", "always", "never"))
    for check, after in ((first, False), (always, True)):
        assert check.due("engine 0")
        check("engine 0", "engine 0", sent, right)
        assert check.due("engine 0") is after and check.due("its successor")
    assert not never.due("engine 0")
    with pytest.raises(TrainingError, match=r"engine 1 has not .*: lm_head.weight, .* and 11 more"):
        first("engine 1", "engine 1", checksums(actor_weights(1)), loaded(actor_weights(1), 1, dict.clear))
    assert first.due("engine 1")


def test_a_load_that_is_interrupted_ends_in_order() -> None:
    """The engine's own code must not be left in its midst."""

    def two() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(2)
        raise TransferInterruptedError("the rank is gone")

    arriving = Arriving(two(), check=True)  # type: ignore[arg-type]
    assert [name for name, _ in arriving] == ["a"]
    result = arriving.loaded(nn.Linear(2, 2))
    assert result.interrupted == "the rank is gone" and result.arrived is None
