"""What `mssr plan` says of a rank beside torch's FSDP2 memory tracker, in the shapes of 3B and 7B.

    python scripts/bench/memory_tracker.py --out scripts/bench/results/memory_tracker.md

Tensors are fake (shapes without memory), collectives do nothing, and the rank is the first of so many: two
forward and backward passes over text, with the head and its loss. There are neither a reference nor a vision
tower, and no optimizer, whose step in place torch's fake tensors take for one that makes new tensors.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from report import MIB, arguments, publish
from report import table as markdown
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from workload import model_config

from mssr.actor.distributed import shard
from mssr.config import Config
from mssr.models import attention
from mssr.models.bounded_cache import BoundedCache
from mssr.models.packing import PackedBatch
from mssr.models.policy import PolicyModel
from mssr.models.published import shape_of
from mssr.models.rank_memory import Pass, RankMemory

CASES = [
    ("tiny", 2, True),
    ("3b", 8, True),
    ("3b", 4, True),
    ("3b", 8, False),
    ("7b", 8, True),
    ("7b", 32, True),
]
"""Shape, ranks, activation checkpointing."""


@contextlib.contextmanager
def ranks(count: int) -> Iterator[Any]:
    """A mesh of so many ranks, of which this process is the first and the only one."""
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def one_sequence(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **options: Any
) -> tuple[Any, None]:
    """In place of the loop over sequences, which looks at where they begin; keeps as much."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, _ = flash(query, key, value, 0.0, True, scale=scaling)
    return torch.cat([out[0].transpose(0, 1)])[None], None


def batch(config: Any, tokens: int, responses: int) -> PackedBatch:
    """One sequence of text."""
    made = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "position_ids": torch.arange(tokens).expand(4, 1, tokens),
        "response_index": torch.arange(tokens - responses, tokens),
        "targets": torch.zeros(responses, dtype=torch.int64),
        "cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32),
        "max_length": tokens,
    }
    empty: dict[str, Any] = {name: None for name in PackedBatch.__dataclass_fields__}
    return PackedBatch(**(empty | made))


def tracked(name: str, count: int, checkpointing: bool, tokens: int, responses: int) -> float:
    """Peak bytes of a rank by torch's tracker."""
    config = model_config(name)
    config.image_token_id = -1
    with ranks(count) as mesh, FakeTensorMode(allow_non_fake_inputs=True), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(attention, "varlen_attention", one_sequence))
        made = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
        made.model.visual = torch.nn.Identity()
        attention.use_varlen_attention(made)
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
            made.train()
        policy = PolicyModel(made, features=BoundedCache(0))
        model = shard(policy, mesh, torch.bfloat16, keep_gathered=False)
        tracker = FSDPMemTracker(model)
        inputs = batch(config, tokens, responses)
        with tracker:
            for _ in range(2):
                loss, *_ = model(inputs, False, lambda log_probs, entropy, part: log_probs.sum())
                loss.backward()
                tracker.reset_mod_stats()
        peak = tracker.get_tracker_snapshot("peak")
    return max(float(of_device["Total"]) for of_device in peak.values())


def planned(name: str, count: int, checkpointing: bool, tokens: int, responses: int) -> float:
    config = Config()
    config.model.dtype, config.algorithm.kl.coef = "bfloat16", 0.0
    config.model.freeze_vision, config.actor.vision_cache_gib = True, 0.0
    config.actor.num_ranks, config.actor.activation_checkpointing = count, checkpointing
    shape = shape_of(model_config(name).to_dict())
    rank = RankMemory(config, shape, "cpu", Pass(tokens, responses, 0))
    parts = rank.update()
    return sum(parts.values()) - parts["optimizer states"] - rank.c * shape.vision


def benchmark(args: argparse.Namespace) -> list[str]:
    rows = []
    for name, count, checkpointing in [case for case in CASES if not args.sizes or case[0] in args.sizes]:
        tokens = 512 if name == "tiny" else 8192
        case = (name, count, checkpointing, tokens, tokens // 2)
        by_torch, by_plan = tracked(*case), planned(*case)
        numbers = (f"{by_torch / MIB:.0f}", f"{by_plan / MIB:.0f}", f"{by_plan / by_torch - 1:+.1%}")
        rows.append((name, str(count), "yes" if checkpointing else "no", str(tokens), *numbers))
        print(rows[-1], flush=True)
    columns = ("shape", "ranks", "checkpointing", "tokens", "tracker, MiB", "planned", "off by")
    return markdown(columns, rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="*", help="tiny, 3b, 7b; default: all")
    args = parser.parse_args()
    publish(args, lambda: benchmark(args), "torch transformers")


if __name__ == "__main__":
    main()
