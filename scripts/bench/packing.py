"""Tokens per second of the update, packed beside padded, and the balance of ranks, as Markdown tables.

    PYTHONPATH=. python scripts/bench/packing.py --out scripts/bench/results/packing.md
    PYTHONPATH=. python scripts/bench/packing.py --device cuda --model 3b --scale 1 --sequences 512

Lengths are like those of Vision-R1, see `workload`; ``--scale`` multiplies all of them and the token budget.
An update is forward and backward of all sequences by `PolicyUpdater`, the weights being random.

The padded versions are the same code on micro-batches whose sequences are all filled up to the same length,
within the same budget, padding counted. Neither their head nor their vision tower works on padding, and their
attention needs no mask, so the padding is as cheap as it can be. They are filled up to

- the limits of prompt and response: batches of fixed width, as verl's without ``remove_padding``;
- the longest of the step: its longest prompt (filled up on the left) and its longest response (on the right),
  laid out before the step is cut into micro-batches, as TRL does. ``--sequences`` of the ``--step`` sequences
  are trained on, to save time; the longest is that of all of them;
- the longest sequence of the micro-batch, in random order or sorted by length.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mssr.actor.planning import MicroBatch, Planner, UpdatePlan
from mssr.actor.update import PolicyUpdater
from mssr.config import Config
from mssr.models.attention import use_varlen_attention
from mssr.models.cost import CostModel, SequenceWork
from mssr.models.encoded import EncodedPrompt
from mssr.models.packing import PackedBatch, PackItem, pack
from mssr.models.pixels import PixelNormalizer
from mssr.models.policy import PolicyModel
from mssr.types import TrainBatch
from scripts.bench.workload import PROMPT, RESPONSE_LIMIT, SHAPES, TEXT, draw_lengths, model_config

BUDGET = 16384


def make_policy(name: str, device: torch.device, attention: str) -> PolicyModel:
    config = model_config(name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    if attention == "varlen":
        use_varlen_attention(model)
    if device.type == "cuda":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return PolicyModel(model.train()).to(device)


class Prompts:
    """Made-up prompts and responses, in place of the actor's cache of encoded ones."""

    def __init__(self, policy: PolicyModel, lengths: np.ndarray, responses: np.ndarray, scale: float) -> None:
        config = policy.model.config
        vision = config.vision_config
        rng = np.random.default_rng(1)
        values = vision.in_channels * vision.patch_size**2
        pool = torch.randint(
            256,
            (4 * int(lengths.max()), values),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(0),
        )
        middle = (127.5,) * vision.in_channels
        normalizer = PixelNormalizer(middle, middle, vision.temporal_patch_size)
        self._items = []
        for k, (length, response) in enumerate(zip(lengths, responses, strict=True)):
            text = max(int(rng.integers(*TEXT) * scale), 8)
            height = max(int((length - text) ** 0.5), 1)
            width = (length - text) // height
            image = height * width
            ids = rng.integers(0, 250, length)
            ids[4] = config.vision_start_token_id
            ids[5 : 5 + image] = config.image_token_id
            types = (ids == config.image_token_id).astype(np.int32)
            prompt = EncodedPrompt(
                torch.from_numpy(ids),
                torch.from_numpy(types),
                pool[: 4 * image],
                torch.tensor([[1, 2 * height, 2 * width]]),
                (b"%d" % k,),
                normalizer,
            )
            tokens = torch.from_numpy(rng.integers(0, 250, response))
            self._items.append(PackItem(prompt, policy.rope_positions(prompt), tokens))

    def items(self, batch: TrainBatch, sequences: Sequence[int]) -> list[PackItem]:
        return [self._items[s] for s in sequences]

    def batch(self) -> TrainBatch:
        parts = [torch.cat([i.prompt.token_ids, i.response]).numpy() for i in self._items]
        responses = sum(len(i.response) for i in self._items)
        return TrainBatch(
            prompt_ids=tuple(map(str, range(len(parts)))),
            tokens=np.concatenate(parts).astype(np.int32),
            offsets=np.concatenate([[0], np.cumsum([len(p) for p in parts])]),
            prompt_lengths=np.array([len(i.prompt.token_ids) for i in self._items]),
            advantages=np.random.default_rng(2).standard_normal(len(parts)).astype(np.float32),
            engine_log_probs=np.full(responses, -6.0, np.float32),
        )


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
                filled.append(item.with_response(torch.cat([item.response, torch.zeros(missing).long()])))
                real += [True] * len(item.response) + [False] * missing
            packed = pack(filled, self.policy.merge_size)
            yield (
                micro,
                dataclasses.replace(
                    packed,
                    response_index=packed.response_index[real],
                    targets=packed.targets[real],
                    response_lengths=torch.tensor([len(i.response) for i in items]),
                ).to(self.device),
            )


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


def throughput(args: argparse.Namespace, device: torch.device) -> list[tuple[str, ...]]:
    budget = int(BUDGET * args.scale)
    config = Config()
    config.algorithm.kl.coef = 0.0
    config.actor.micro_batch_tokens, config.actor.updates_per_step = budget, 1
    policy = make_policy(args.model, device, "varlen")
    masked = make_policy(args.model, device, "sdpa")
    masked.load_state_dict(policy.state_dict())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    of_step = draw_lengths(args.step, 1, args.scale)
    prompts = Prompts(policy, *(x[: args.sequences] for x in of_step), args.scale)
    batch = prompts.batch()
    lengths = batch.lengths
    limit = int((PROMPT[1] + RESPONSE_LIMIT) * args.scale)

    def updater(kind: type[PolicyUpdater], model: PolicyModel) -> Any:
        return kind(config, model, None, optimizer, prompts, 0, device)  # type: ignore[arg-type]

    packing, padding, to_longest, to_limit = (
        updater(k, policy) for k in (PolicyUpdater, PaddedUpdater, PaddedUpdater, PaddedUpdater)
    )
    longest = sum(int(x.max()) for x in of_step)
    to_longest.fill_to, to_limit.fill_to = longest, limit
    plan = packing.plan(batch, 0).updates[0]
    shuffled = np.random.default_rng(3).permutation(len(lengths))
    by_length = np.argsort(-lengths, kind="stable")
    sides: dict[str, tuple[Any, UpdatePlan]] = {
        "packed": (packing, plan),
        "padded to the longest of the micro-batch": (padding, padded_passes(shuffled, lengths, budget)),
        "the same, sorted by length": (padding, padded_passes(by_length, lengths, budget)),
        "padded to the longest prompt and response of the step": (
            to_longest,
            padded_passes(shuffled, lengths, budget, longest),
        ),
        "padded to the limits of prompt and response": (
            to_limit,
            padded_passes(shuffled, lengths, budget, limit),
        ),
    }
    if device.type == "cpu":
        sides["packed, with a dense mask (sdpa of transformers)"] = updater(PolicyUpdater, masked), plan

    def run(side: Any, plan: UpdatePlan) -> tuple[float, float]:
        """Seconds, and seconds of CPU time."""
        side.policy.zero_grad()
        state = side.begin(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        started, cpu = time.perf_counter(), time.process_time()
        side.backward(state, plan)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, time.process_time() - cpu

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):
        for name, side in sides.items():
            measured = run(*side)
            if repeat:  # the first warms up
                times[name].append(measured)
            print(f"{repeat} {name}: {measured[0]:.2f} s", file=sys.stderr, flush=True)
    wall, cpu = ({k: statistics.median(t[i] for t in v) for k, v in times.items()} for i in (0, 1))
    rows = []
    for name, (side, side_plan) in sides.items():
        micros = side_plan.ranks[0]
        if side in (packing,) or "mask" in name:
            computed = int(lengths.sum())
        else:
            computed = sum(len(m.sequences) * max(side.fill_to, *lengths[list(m.sequences)]) for m in micros)
        rows.append(
            (
                name,
                str(len(micros)),
                f"{lengths.sum() / computed:.2f}",
                f"{wall[name]:.2f}",
                f"{lengths.sum() / wall[name]:.0f}",
                f"{wall[name] / wall['packed']:.2f}",
                f"{cpu[name] / cpu['packed']:.2f}" if device.type == "cpu" else "",
            )
        )
    return rows


def balance_rows(ranks: int, count: int) -> list[tuple[str, ...]]:
    """What ranks wait for each other, planned by tokens (as it was) and by cost, in the 3B shape."""
    cost = CostModel(model_config("3b"))
    rows = []
    for n in (1, 8):
        prompt, response = draw_lengths(count // n, n, 1.0)
        lengths = np.repeat(prompt, n) + response
        images = cost.images(4 * np.maximum(prompt - 100, 0))
        index = np.repeat(np.arange(count // n), n)
        work = SequenceWork(lengths, cost.text(lengths, response), images[index], index, index)
        planner = Planner(work, ranks=ranks, token_budget=BUDGET)
        started = time.perf_counter()
        after = [[list(m.sequences) for m in p] for p in planner.everything()]
        seconds = time.perf_counter() - started
        shuffled = np.random.default_rng(4).permutation(count).tolist()
        before = by_tokens(shuffled, lengths.tolist(), ranks, BUDGET)
        reference = sum(map(planner.cost, (m for p in after for m in p))) / ranks
        for name, plan in (("tokens (before)", before), ("cost", after)):
            totals = [sum(map(planner.cost, passes)) for passes in plan]
            waited = sum(max(map(planner.cost, passes)) for passes in zip(*plan, strict=True))
            encoded = sum(len({index[s] for s in m}) for passes in plan for m in passes)
            rows.append(
                (
                    str(n),
                    name,
                    str(len(plan[0])),
                    f"{max(totals) / np.mean(totals):.3f}",
                    f"{waited / np.mean(totals):.3f}",
                    f"{waited / reference:.3f}",
                    f"{encoded / (count // n):.2f}",
                    f"{1e3 * seconds:.0f}" if name == "cost" else "",
                )
            )
    return rows


def by_tokens(sequences: list[int], lengths: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """The plan before there was a cost model: ranks balanced in tokens, then first fit, longest first."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for s in sorted(sequences, key=lambda s: -lengths[s]):
        lightest = totals.index(min(totals))
        shares[lightest].append(s)
        totals[lightest] += lengths[s]
    filled = []
    for share in shares:
        bins: list[list[int]] = []
        for s in share:
            room = (b for b in bins if sum(lengths[x] for x in b) + lengths[s] <= budget)
            if (chosen := next(room, None)) is None:
                bins.append([s])
            else:
                chosen.append(s)
        filled.append(bins)
    count = max(map(len, filled))
    for bins in filled:
        while len(bins) < count:
            fullest = max(bins, key=len)
            half = len(fullest) // 2
            bins.append(fullest[half:])
            del fullest[half:]
    return filled


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ("---",) * len(columns), *rows)]


def main(write: Callable[[str], object] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--scale", type=float, default=0.25, help="of all lengths and the token budget")
    parser.add_argument("--sequences", type=int, default=64, help="that are trained on, of the step's")
    parser.add_argument("--step", type=int, default=512, help="sequences whose longest decides the width")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=8, help="of the balance table")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    load = os.getloadavg()[0]
    speed = throughput(args, device)
    balance = balance_rows(args.ranks, 512)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores, no GPU"
    command = " ".join(["python", "scripts/bench/packing.py", *sys.argv[1:]])
    lines = [
        f"`PYTHONPATH=. {command}`, {datetime.date.today()}, {machine}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {args.threads} threads; load average {load:.1f} before, "
        f"{os.getloadavg()[0]:.1f} after.",
        "",
        f"Update (forward and backward) of {args.sequences} of the {args.step} sequences of a step, "
        f"{args.model} model, lengths times "
        f"{args.scale:g}, {int(BUDGET * args.scale)} tokens a micro-batch; medians of {args.repeats}, the "
        "sides in turn. Tokens are those of prompts and responses, without padding.",
        "",
        *table(
            ("update", "micro-batches", "share of real tokens", "s", "tokens/s", "time to packed",
             "CPU time to packed"),
            speed,
        ),
        "",
        f"Balance of 512 sequences at full length on {args.ranks} ranks, {BUDGET} tokens a micro-batch, cost "
        "by the formula of `mssr/models/cost.py` in the 3B shape. Ranks wait for the dearest in every pass.",
        "",
        *table(
            ("responses a prompt", "balanced by", "passes", "dearest rank to mean",
             "time with waiting to mean", "to the mean of the plan by cost", "times an image is encoded",
             "planning, ms"),
            balance,
        ),
        "",
    ]  # fmt: skip
    write("\n".join(lines))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
