"""Tokens per second, MFU and peak memory of the policy update by phase, in the real shapes of Qwen2.5-VL.

    python scripts/bench/gpu_update.py --size 3b --out scripts/bench/results/gpu_update.md
    python scripts/bench/gpu_update.py --size 7b --lora 64
    python scripts/bench/gpu_update.py --size tiny --sequences 12 --per-update 2 --scale 0.1

Further arguments are config keys: ``actor.micro_batch_tokens=32768 algorithm.kl.coef=0``.

Rows with JPEG images go through the real data path; `PolicyWorker`, one rank with random weights, makes the
updates. ``--sequences`` of Vision-R1's lengths (see `workload`) are trained on once, ``--per-update`` in each
update, so the medians are over 512 / 64 = 8 updates, after one to warm up. Advantages are random.

Full training holds 16 bytes a parameter and a float32 reference 4 more: the 7B one (8.3e9 parameters) fits in
139 GiB only with ``algorithm.kl.coef=0``, that is 124 GiB before activations, if at all.

MFU is model operations over seconds and peak operations per second of the device, for bfloat16 dense (known
by its name, `mssr/models/gpus.py`, or ``--peak-tflops``). Model operations of a forward pass F are those of
`mssr/models/cost.py`:

    F = matrices + attention + vision
    matrices  = sum(L) * 2 * layers * (2*d*h*e + 2*d*g*e + 3*d*f) + sum(T) * 2*d*V    responses only
    attention = sum(L^2) * 2 * layers * h*e                                           causal, so half
    vision    = patch embedding, blocks with windows as they are, merger, for every image once

with L tokens of a sequence, T of them of the response. Training costs 3 F; with LoRA 2 * matrices
+ 3 * attention + vision, for frozen weights need no gradient of their own and a frozen tower none at all; the
adapters are left out. What activation checkpointing computes again is not counted, and of a frozen tower only
the passes that run it, for its features are kept.

It needs torch and transformers with what they need, and jinja2, numpy, pillow, psutil, pyarrow, pyyaml,
qwen-vl-utils, safetensors and torchvision; ``--lora`` peft; neither ray, vllm nor datasets.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import operator
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from phases import Phases
from report import arguments, publish, watch
from report import table as markdown
from workload import SHAPES, VOCABULARY, draw_lengths, write_model, write_rows

from mssr.actor.worker import PolicyWorker
from mssr.config import Config
from mssr.data.prompt_source import PromptSource
from mssr.models import gpus
from mssr.rollout.transports import StoreSender
from mssr.types import TrainBatch

SYNCS = 5
"""Exports of the weights that are measured."""


def make_config(args: argparse.Namespace, directory: Path, prompts: np.ndarray) -> Config:
    """A config of one rank, whose model and rows, prompts of so many tokens, are written to a directory."""
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    write_model(directory / "model", args.size, torch.device(args.device), dtype)
    if cuda:
        torch.cuda.empty_cache()
    config = Config()
    config.model.path, config.data.id_column = str(directory / "model"), "id"
    config.data.train = str(write_rows(directory, prompts, args.scale))
    # Images are written in the size that they are to have.
    config.data.min_pixels, config.data.instruction = 56 * 56, ""
    config.data.cache_dir, config.trainer.run_dir = str(directory / "cache"), str(directory / "run")
    config.cluster.launcher, config.cluster.device, config.rollout.engine = "local", args.device, "hf"
    config.cluster.threads_per_actor = config.cluster.threads_per_rollout = args.threads
    config.actor.updates_per_step, config.trainer.val_every, config.trainer.save_every = 1, 0, 0
    config.actor.activation_checkpointing = args.size != "tiny"
    config.actor.lora.rank = args.lora
    for option in args.options:
        set_option(config, option)
    return config


def set_option(config: Config, option: str) -> None:
    """``key=value`` without the checks of `load_config`, which needs omegaconf."""
    key, _, value = option.partition("=")
    section, _, name = key.rpartition(".")
    target = operator.attrgetter(section)(config) if section else config
    if not hasattr(target, name):
        sys.exit(f"gpu_update: there is no option {key}")
    setattr(target, name, yaml.safe_load(value))


def make_batches(config: Config, per_update: int, vocabulary: int, responses: np.ndarray) -> list[TrainBatch]:
    """Batches of all prompts. Responses are random bytes, which are the tokenizer's first 256 tokens."""
    rng = np.random.default_rng(2)
    source, batches = PromptSource(config), []
    for start in range(0, len(responses), per_update):
        ids = [str(k) for k in range(start, start + per_update)]
        prompts = [source.encoder.encode(source.row(i)).token_ids.numpy() for i in ids]
        lengths = responses[start : start + per_update]
        prompt_lengths = np.array([len(p) for p in prompts])
        parts = [x for p, t in zip(prompts, lengths, strict=True) for x in (p, rng.integers(0, 256, t))]
        batches.append(
            TrainBatch(
                prompt_ids=tuple(ids),
                tokens=np.concatenate(parts).astype(np.int32),
                offsets=np.concatenate([[0], np.cumsum(prompt_lengths + lengths)]),
                prompt_lengths=prompt_lengths,
                advantages=rng.standard_normal(len(ids)).astype(np.float32),
                engine_log_probs=np.full(int(lengths.sum()), -np.log(vocabulary), np.float32),
                kl_coef=config.algorithm.kl.coef,
            )
        )
    return batches


@dataclasses.dataclass
class Update:
    """One measured update."""

    tokens: int
    operations: dict[str, float]
    """Model operations by phase."""
    seconds: dict[str, float]
    waits: int
    """How often the host waited for the GPU in forward and backward, as far as torch says so."""


@contextlib.contextmanager
def noting_waits(found: list[str]) -> Iterator[None]:
    """Waits inside are added to a list; nothing on a CPU."""
    if not torch.cuda.is_available():
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found += [str(w.message) for w in caught if "synchronizing" in str(w.message)]


def measure(args: argparse.Namespace, config: Config, responses: np.ndarray) -> tuple[list[Update], Phases]:
    """Every batch once, after the last one to warm up."""
    rendezvous = Path(str(config.trainer.run_dir)) / "rendezvous"
    rendezvous.parent.mkdir(parents=True)
    worker = PolicyWorker(config, 0, f"file://{rendezvous}", args.device)
    updater, phases = worker.updater, Phases(worker.device)
    watch(updater, "_before_update", lambda: phases("reference"))
    waits: list[str] = []
    watch(updater, "backward", lambda: noting_waits(waits))
    watch(updater, "backward", lambda: phases("forward and backward"))
    watch(updater, "_probe_kl", lambda: phases("KL probe"))
    watch(updater.optimizer, "step", lambda: phases("optimizer"))
    watch(updater.prompts, "items", lambda: phases.on_host("prompts"))
    visual = worker.policy.model.model.visual
    frozen_tower = not any(p.requires_grad for p in visual.parameters())
    encoded = vision_operations(worker, phases)
    batches = make_batches(config, args.per_update, VOCABULARY[args.size], responses)
    updates: list[Update] = []
    for number, batch in enumerate([batches[-1], *batches]):
        waits.clear()
        with phases("step"):
            metrics = worker.update(batch, number)
        of_prompts = phases.seconds.pop("prompts")
        # After the step, which is to meet its prompts for the first time.
        with phases("old log-probs"):
            worker.log_probs(batch, reference=False)
        assert not metrics["policy/skipped_updates"]
        if number <= SYNCS:
            with phases("sync"):
                worker.sender.send(StoreSender(np.copy, {}), check=False)
        seconds, phases.seconds = phases.seconds | {"prompts": of_prompts}, {}
        seconds["update"] = seconds["step"] - seconds["reference"] - seconds["KL probe"]
        seconds["the rest of it"] = seconds["update"] - seconds["forward and backward"] - seconds["optimizer"]
        whole = updater.cost_model.operations(batch, range(len(batch)))
        by_phase = {k: dataclasses.replace(whole, vision=encoded.pop(k, 0.0)) for k in COMPUTING}
        operations = {k: o.forward for k, o in by_phase.items()}
        operations["update"] = operations["forward and backward"] = by_phase["forward and backward"].training(
            bool(args.lora), frozen_tower
        )
        if number:
            updates.append(Update(int(batch.lengths.sum()), operations, seconds, len(waits)))
        else:
            phases.peaks.clear()
        print(f"{number}: {json.dumps({k: round(v, 3) for k, v in seconds.items()})}", file=sys.stderr)
    worker.close()
    if not config.needs_reference:
        for update in updates:
            update.seconds.pop("reference")
    phases.peaks["update"] = max(phases.peaks[k] for k in ("forward and backward", "optimizer"))
    return updates, phases


def vision_operations(worker: PolicyWorker, phases: Phases) -> dict[str, float]:
    """Filled with the operations of forward passes of vision towers, by the phase in which they were.

    The features of a frozen tower are kept from one pass to the next, so not every pass runs it.
    """
    cost = worker.updater.cost_model
    found: dict[str, float] = {}

    def count(module: Any, args: Any, kwargs: Any) -> None:
        patches = kwargs["grid_thw"].prod(-1).cpu().numpy()
        for name in phases.running:
            found[name] = found.get(name, 0.0) + float(cost.images_forward(patches).sum())

    # One and the same where it is frozen.
    models = [model for model in (worker.policy, worker.reference) if model is not None]
    for tower in {m for model in models for name, m in model.named_modules() if name.endswith("visual")}:
        tower.register_forward_pre_hook(count, with_kwargs=True)
    return found


COMPUTING = ("old log-probs", "reference", "forward and backward")
"""Phases that run the model."""
ROWS = {
    "old log-probs": "old log-probs",
    "reference": "reference log-probs",
    "forward and backward": "forward and backward",
    "optimizer": "optimizer",
    "the rest of it": "clipping, plan, metrics",
    "update": "**update**: these three",
    "KL probe": "KL probe",
    "step": "step: reference, update, probe",
    "prompts": "of it the host's time for prompts",
    "sync": "export of the weights to the host",
}
"""Phase -> its name in the table."""


def table(updates: list[Update], phases: Phases, peak: float | None) -> list[str]:
    rows = []
    for key, name in ROWS.items():
        done = [u for u in updates if key in u.seconds]
        if not done:
            continue
        rate = mfu = None
        if key in done[0].operations:
            rate = statistics.median(u.tokens / u.seconds[key] for u in done)
            if peak:
                mfu = statistics.median(u.operations[key] / u.seconds[key] / peak for u in done)
        seconds = statistics.median(u.seconds[key] for u in done)
        cells = (seconds, ".2f"), (rate, ".0f"), (mfu, ".1%"), (phases.peaks.get(key), ".1f")
        rows.append((name, *("" if value is None else format(value, form) for value, form in cells)))
    return markdown(("phase", "s, median", "tokens/s", "MFU", "peak GiB"), rows)


def benchmark(args: argparse.Namespace) -> list[str]:
    loaded, device = set(sys.modules), torch.cuda.get_device_name() if args.device == "cuda" else ""
    kind = gpus.find(device)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else kind.bf16_flops if kind else None
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="mssr-gpu-") as scratch:
        prompts, responses = draw_lengths(args.sequences, 1, args.scale)
        config = make_config(args, Path(scratch), prompts)
        updates, phases = measure(args, config, responses)
        lines = table(updates, phases, peak)
    assert not {"ray", "vllm"} & (set(sys.modules) - loaded)
    formula = "2 matrices + 3 attention + vision" if args.lora else "3 F"
    actor = config.actor
    return [
        f"{args.sequences} sequences of Vision-R1's lengths (times {args.scale:g}), {args.per_update} an "
        f"update, {actor.micro_batch_tokens} tokens a micro-batch, activation checkpointing "
        f"{'on' if actor.activation_checkpointing else 'off'}. Tokens are those of prompts and responses.",
        "",
        f"MFU: model operations ({formula}, forward F; causal attention, the head on responses, the vision "
        "tower with its windows; nothing that is computed again; see the script) over seconds and "
        + (f"{peak / 1e12:g}e12 operations a second." if peak else "a peak that is not known here."),
        "",
        *lines,
        "",
        f"Head: chunks of {actor.head_chunk(args.device)} tokens. How often the host waited for the GPU in "
        f"forward and backward: {statistics.median(u.waits for u in updates) if device else 'no GPU'}.",
        "",
    ]


def main(command_line: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--size", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters of this rank; 0: all")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--per-update", type=int, default=64, help="sequences of an update; divides them")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--peak-tflops", type=float, help="of the device, in bfloat16")
    parser.add_argument("options", nargs="*", help="key=value of the config")
    args = parser.parse_args(command_line)
    if args.sequences % args.per_update:
        parser.error("--per-update does not divide --sequences")
    title = f"{args.size}, " + (f"LoRA, rank {args.lora}" if args.lora else "full training")
    publish(args, lambda: benchmark(args), "torch transformers", append=True, title=title)


if __name__ == "__main__":
    main()
