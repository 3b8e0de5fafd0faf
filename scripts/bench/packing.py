"""Tokens per second of the update, packed beside padded, as a Markdown table.

    python scripts/bench/packing.py --out scripts/bench/results/packing.md
    python scripts/bench/packing.py --device cuda --model 3b --scale 1 --sequences 512

Lengths are like those of Vision-R1, see `workload`; ``--scale`` multiplies all of them and the token budget.
An update is forward and backward of all sequences by `PolicyUpdater`, the weights being random.

The padded versions are the same code on micro-batches whose sequences are filled up to the same length,
within the same budget, padding counted. Head and vision tower skip padding and attention needs no
mask, so it is as cheap as it can be. They are filled up to

- the limits of prompt and response: batches of fixed width, as verl's without ``remove_padding``;
- the longest prompt and the longest response of the step, as TRL does. ``--sequences`` of the ``--step``
  sequences are trained on, to save time; the longest is that of all of them;
- the longest sequence of the micro-batch, in random order or sorted by length.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gpu_update import make_batches, make_config
from report import arguments, in_turn, publish, table
from workload import PROMPT, RESPONSE_LIMIT, SHAPES, VOCABULARY, draw_lengths

from mssr.actor.planning import MicroBatch, UpdatePlan
from mssr.actor.update import PolicyUpdater
from mssr.actor.worker import PolicyWorker
from mssr.models.packing import PackedBatch, pack
from mssr.types import TrainBatch

BUDGET = 16384
COLUMNS = ("update", "micro-batches", "share of real tokens", "s", "tokens/s", "time to packed",
           "CPU time to packed")  # fmt: skip


class PaddedUpdater(PolicyUpdater):
    """Every sequence of a micro-batch is filled up with tokens that nothing reads."""

    fill_to: int = 0

    def _packed(
        self, batch: TrainBatch, passes: tuple[MicroBatch, ...]
    ) -> Iterator[tuple[MicroBatch, PackedBatch]]:
        for micro in passes:
            items = self.prompts.items(batch, micro.sequences)
            longest = max(self.fill_to, *(len(i.prompt.token_ids) + len(i.response) for i in items))
            filled, real = [], []
            for item in items:
                missing = longest - len(item.prompt.token_ids) - len(item.response)
                response = torch.cat([item.response, torch.zeros(missing).long()])
                filled.append(dataclasses.replace(item, response=response))
                real += [True] * len(item.response) + [False] * missing
            packed = pack(filled, self.policy.merge_size)
            index, targets = packed.response_index[real], packed.targets[real]
            packed = dataclasses.replace(packed, response_index=index, targets=targets)
            yield micro, packed.to(self.device)


def padded_passes(order: np.ndarray, lengths: np.ndarray, budget: int, fill_to: int = 0) -> UpdatePlan:
    """As many sequences as the budget holds, filled up to the longest, in the given order."""
    micros: list[list[int]] = []
    for s in order.tolist():
        longest = max(fill_to, lengths[s], *lengths[micros[-1]]) if micros else 0
        if micros and longest * (len(micros[-1]) + 1) <= budget:
            micros[-1].append(s)
        else:
            micros.append([s])
    passes = tuple(MicroBatch(tuple(m), 1.0, True) for m in micros)
    return UpdatePlan(tuple(order.tolist()), (passes,))


def throughput(args: argparse.Namespace, scratch: Path) -> list[tuple[str, ...]]:
    budget, cuda = int(BUDGET * args.scale), args.device == "cuda"
    args.lora, args.options = 0, [f"actor.micro_batch_tokens={budget}", "algorithm.kl.coef=0"]
    of_step = draw_lengths(args.step, 1, args.scale)
    prompts, responses = (x[: args.sequences] for x in of_step)
    config = make_config(args, scratch, prompts)
    [batch] = make_batches(config, args.sequences, VOCABULARY[args.size], responses)
    lengths = batch.lengths
    worker = PolicyWorker(config, 0, f"file://{scratch}/rendezvous", args.device)
    packing = worker.updater

    def padded(order: np.ndarray, fill_to: int = 0) -> tuple[PolicyUpdater, UpdatePlan]:
        parts = packing.optimizer, packing.prompts, 0, worker.device
        updater = PaddedUpdater(config, worker.policy, None, *parts)
        updater.fill_to = fill_to
        return updater, padded_passes(order, lengths, budget, fill_to)

    shuffled = np.random.default_rng(3).permutation(len(lengths))
    longest = sum(int(x.max()) for x in of_step)
    limit = int((PROMPT[1] + RESPONSE_LIMIT) * args.scale)
    sides = {
        "packed": (packing, packing.plan(batch, 0).updates[0]),
        "padded to the longest of the micro-batch": padded(shuffled),
        "the same, sorted by length": padded(np.argsort(-lengths, kind="stable")),
        "padded to the longest prompt and response of the step": padded(shuffled, longest),
        "padded to the limits of prompt and response": padded(shuffled, limit),
    }

    def update(updater: PolicyUpdater, plan: UpdatePlan) -> None:
        worker.policy.zero_grad()
        updater.backward(updater.begin(batch), plan)

    updates = {name: functools.partial(update, *side) for name, side in sides.items()}
    times = in_turn(updates, args.repeats, cuda)
    worker.close()
    medians = {name: np.median(of_side, axis=0) for name, of_side in times.items()}
    rows = []
    for name, (updater, plan) in sides.items():
        computed, micros = int(lengths.sum()), plan.ranks[0]
        if isinstance(updater, PaddedUpdater):
            widths = (max(updater.fill_to, *lengths[list(m.sequences)]) for m in micros)
            computed = sum(len(m.sequences) * width for m, width in zip(micros, widths, strict=True))
        wall, to_packed = medians[name][0], medians[name] / medians["packed"]
        ratios = f"{to_packed[0]:.2f}", "" if cuda else f"{to_packed[1]:.2f}"
        share = f"{lengths.sum() / computed:.2f}"
        rows.append((name, str(len(micros)), share, f"{wall:.2f}", f"{lengths.sum() / wall:.0f}", *ratios))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", dest="size", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--scale", type=float, default=0.25, help="of all lengths and the token budget")
    parser.add_argument("--sequences", type=int, default=64, help="that are trained on, of the step's")
    parser.add_argument("--step", type=int, default=512, help="sequences whose longest decides the width")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def measure() -> list[str]:
        with tempfile.TemporaryDirectory(prefix="mssr-packing-") as scratch:
            speed = throughput(args, Path(scratch))
        return [
            f"Update (forward and backward) of {args.sequences} of the {args.step} sequences of a step, "
            f"{args.size} model, lengths times {args.scale:g}, {int(BUDGET * args.scale)} tokens a "
            f"micro-batch, {args.threads} threads; medians of {args.repeats}, the sides in turn. Tokens are "
            "those of prompts and responses, without padding.",
            "",
            *table(COLUMNS, speed),
        ]

    publish(args, measure, "torch transformers")


if __name__ == "__main__":
    main()
