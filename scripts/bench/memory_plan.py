"""What `mssr plan` says of a rank's memory, beside what is allocated in real updates on CPU.

    python scripts/bench/memory_plan.py --out scripts/bench/results/memory_plan.md

Every case is one or two ranks, each a process: a `PolicyWorker` with random weights makes two updates of
several passes under torch's profiler, which sees every allocation, of tensors and of work space inside
operators. Compared is the peak of rank 0, from its first line to its last, with the arithmetic for a pass of
the size of its largest.

With ``offload`` the class that moves the optimizer's states does so although there is no GPU, and the host's
copy of them is added to what is planned. ``actor.offload=all`` and ``actor.offload_reference`` move nothing
on CPU and are not measured.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_update import make_batches, make_config
from report import MIB, arguments, publish
from report import table as markdown
from workload import VOCABULARY, family_and_size, write_model

from mssr.actor import worker as worker_module
from mssr.actor.optimizers import OffloadedOptimizer
from mssr.actor.worker import PolicyWorker
from mssr.config import Config
from mssr.models.published import read_shape
from mssr.models.rank_memory import Parts, Pass, RankMemory

PROMPT, RESPONSE = 160, 96
"""Tokens of each prompt, all but some of them an image's, and of each response."""
PASSES, TOKENS = 2, 1024
"""Passes of a rank in each update, and tokens of a pass."""
CHECKPOINTING = "actor.activation_checkpointing=true"
BF16 = "model.dtype=bfloat16"
CASES: dict[str, tuple[str, int, list[str]]] = {
    "defaults": ("tiny", 1, []),
    "LoRA": ("20m", 1, [CHECKPOINTING, "actor.lora.rank=16", "actor.vision_cache_gib=0"]),
    "offload of the optimizer": ("20m", 1, [CHECKPOINTING, "actor.offload=optimizer"]),
    "8-bit moments": ("20m", 1, [CHECKPOINTING, "actor.optimizer=adamw_8bit"]),
    "bfloat16, stochastic": ("20m", 1, [BF16, CHECKPOINTING, "actor.master_dtype=bfloat16"]),
    "bfloat16, kahan": (
        "20m",
        1,
        [BF16, CHECKPOINTING, "actor.master_dtype=bfloat16", "actor.rounding=kahan"],
    ),
    "bfloat16, float32 masters": ("20m", 1, [BF16, CHECKPOINTING]),
    "frozen tower": ("20m", 1, ["model.freeze_vision=true", "actor.vision_cache_gib=0"]),
    "everything gathered": ("20m", 2, ["actor.keep_gathered=true"]),
    "checkpointing": ("20m", 1, [CHECKPOINTING]),
    "2 ranks": ("60m", 2, []),
    "checkpointing, large": ("200m", 1, [CHECKPOINTING]),
    "LoRA, bfloat16, large": ("200m", 1, [BF16, "actor.lora.rank=32", "actor.vision_cache_gib=0"]),
    "Qwen3-VL-MoE, tiny": ("tiny-qwen3_vl_moe", 1, []),
    "Qwen2-VL": ("20m-qwen2_vl", 1, []),
    "Qwen3-VL": ("20m-qwen3_vl", 1, []),
    "Qwen3-VL, checkpointing": ("20m-qwen3_vl", 1, [CHECKPOINTING]),
    "Qwen3-VL-MoE": ("20m-qwen3_vl_moe", 1, []),
    "Qwen3-VL-MoE, checkpointing": ("20m-qwen3_vl_moe", 1, [CHECKPOINTING]),
}
"""Name -> size, ranks, options."""


def planned(config: Config, largest: Pass) -> tuple[float, Parts]:
    """Bytes of a rank at its peak, and the parts of it."""
    rank = RankMemory(config, read_shape(config.model), "cpu", largest)
    rank.offload = config.actor.offload
    parts = rank.update()
    if rank.offload == "optimizer":
        parts["optimizer states"] += rank.moments
    return sum(parts.values()), parts


def run_rank(size: str, ranks: int, rank: int, directory: Path, options: list[str]) -> dict[str, Any]:
    """Make the updates of one rank; its peak, and the largest pass."""
    args = argparse.Namespace(size=size, scale=1.0, lora=0, threads=1, device="cpu", options=options)
    sequences = ranks * PASSES * (TOKENS // (PROMPT + RESPONSE))
    config = make_config(args, directory / str(rank), np.full(2 * sequences, PROMPT))
    # As published ones are. Float32 weights would be used where the file is mapped, and count as allocated.
    write_model(Path(config.model.path), size, torch.device("cpu"), torch.bfloat16)
    config.actor.num_ranks, config.actor.micro_batch_tokens = ranks, TOKENS
    config.actor.activation_checkpointing = CHECKPOINTING in options
    config.rollout.max_response_length, config.data.max_prompt_length = RESPONSE, 2 * PROMPT
    if config.actor.offload == "optimizer":
        worker_module.with_offload = lambda optimizer, *_: OffloadedOptimizer(optimizer)  # type: ignore[assignment]
    batches = make_batches(
        config, sequences, VOCABULARY[family_and_size(size)[1]], np.full(2 * sequences, RESPONSE)
    )
    passes = []
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        worker = PolicyWorker(config, rank, f"file://{directory}/rendezvous")
        gc.collect()  # what was read stays until Python looks for cycles

        def note(module: Any, inputs: Any) -> None:
            [packed, *_] = inputs
            patches = 0 if packed.pixels is None else len(packed.pixels)
            passes.append((packed.input_ids.numel(), len(packed.targets), patches))

        worker.policy.register_forward_pre_hook(note)
        for number, batch in enumerate(batches):
            assert not worker.update(batch, number)["policy/skipped_updates"]
        worker.close()
    events = profile.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total, parts = planned(config, Pass(*max(passes)))
    # The profiler does not see the loader's threads, and a frozen tower stays where these have put it.
    unseen = 0 if config.trains_vision else 4 * read_shape(config.model).vision
    peak = unseen + max(accumulate(n for _, n in changes))
    return {"peak": peak, "planned": total, "parts": parts}


def measure(name: str) -> dict[str, Any]:
    """Rank 0's answer; the processes have everything imported already."""
    size, ranks, options = CASES[name]
    start = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mssr-memory-") as scratch:
        answers = start.SimpleQueue()
        processes = [
            start.Process(target=_run, args=(size, ranks, rank, Path(scratch), options, answers))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes), name
        return answers.get()


def _run(size: str, ranks: int, rank: int, directory: Path, options: list[str], answers: Any) -> None:
    found = run_rank(size, ranks, rank, directory, options)
    if rank == 0:
        answers.put(found)


def benchmark(args: argparse.Namespace) -> list[str]:
    rows = []
    for name in args.cases or CASES:
        found = measure(name)
        off = found["planned"] / found["peak"] - 1
        parts = sorted(found["parts"].items(), key=lambda part: -part[1])
        text = ", ".join(
            f"{key} {value / MIB:.0f}" for key, value in parts if value > 0.01 * found["planned"]
        )
        numbers = (f"{found['peak'] / MIB:.0f}", f"{found['planned'] / MIB:.0f}", f"{off:+.1%}")
        rows.append((name, CASES[name][0], *numbers, text))
        print(rows[-1], file=sys.stderr, flush=True)
    return markdown(("case", "model", "peak, MiB", "planned", "off by", "planned for"), rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", nargs="*", choices=tuple(CASES))
    args = parser.parse_args()
    publish(args, lambda: benchmark(args), "torch transformers")


if __name__ == "__main__":
    main()
