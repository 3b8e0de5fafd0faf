"""Time and memory of log-prob, entropy and their gradients: mssr's head beside others.

    python scripts/bench/fused_head.py --hidden 2048 --time-tokens 1024 --verl DIR --liger DIR
    python scripts/bench/fused_head.py --hidden 3584 --time-tokens 512 --verl DIR --liger DIR

One measurement is a forward and backward pass. Memory: at the full shape, each version in a process of its
own, after a small pass that loads the libraries. Peak extra memory is what was held at the peak beyond hidden
states, weight and targets: on a CPU the largest resident set (Linux), on a GPU the peak of torch's allocator.
It includes the gradients, which are also given by themselves. Time: all versions in turn in one process; with
``--time-tokens`` on fewer tokens, for the time is a multiple of theirs. Gradients are compared, at a small
shape, with those in float64.

- straightforward: all logits, log_softmax, entropy, autograd
- two passes: `token_log_probs_and_entropy`, logits computed again in the backward pass
- gradient in forward: `token_loss`, in chunks as a run has them; chunks of 256: the same in a CPU's, on a GPU
- verl: the torch version of its fused head, a file that is read from ``--verl``, a directory with the package
  (``pip install --no-deps --target DIR verl``)
- verl, kernel: its Triton kernel, on a GPU where all of verl is installed
- Liger: its GRPO loss, on one-token sequences (which makes it this loss, without entropy), from ``--liger``.
  Uncompiled on a CPU, compiled on a GPU. It cannot take an entropy loss.
"""

from __future__ import annotations

import argparse
import functools
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import GIB, arguments, forget_peak, in_new_process, in_turn, publish, resident, table, timed

from mssr.config import Config
from mssr.models.head import Head, token_log_probs_and_entropy, token_loss

T = torch.Tensor
Inputs = tuple[T, T, T, T, float]
"""hidden, weight, targets, advantages, coefficient of the entropy"""


def loss_of(log_probs: T, entropy: T, advantages: T, coef: float) -> T:
    loss = -(log_probs * advantages).sum()
    return loss - coef * entropy.sum() if coef else loss


def straightforward(hidden: T, weight: T, targets: T, advantages: T, coef: float) -> T:
    logits = hidden @ weight.T
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    with torch.set_grad_enabled(coef != 0):  # else it is a metric
        entropy = -(log_p.exp() * log_p).sum(-1)
    return loss_of(log_probs, entropy, advantages, coef)


def two_pass(hidden: T, weight: T, targets: T, advantages: T, coef: float) -> T:
    head = Head(chunk=Config().actor.head_chunk(hidden.device.type))
    return loss_of(*token_log_probs_and_entropy(hidden, weight, targets, head), advantages, coef)


def in_forward(hidden: T, weight: T, targets: T, advantages: T, coef: float, chunk: int = 0) -> T:
    def objective(log_probs: T, entropy: T, part: slice) -> T:
        return loss_of(log_probs, entropy, advantages[part], coef)

    head = Head(chunk=chunk or Config().actor.head_chunk(hidden.device.type))
    return token_loss(hidden, weight, targets, objective, head)[0]


def verl(hidden: T, weight: T, targets: T, advantages: T, coef: float) -> T:
    return loss_of(*verl_head()(chunk_size=256)(hidden, weight, targets), advantages, coef)


@functools.cache
def verl_head() -> Any:
    """Of the one file, without the package, whose import needs much else."""
    name = "verl/utils/experimental/torch_functional.py"
    path = next(file for p in sys.path if (file := Path(p) / name).is_file())
    return runpy.run_path(str(path))["FusedLinearForPPO"]


def verl_kernel(hidden: T, weight: T, targets: T, advantages: T, coef: float) -> T:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return loss_of(*linear_cross_entropy(hidden, weight, targets, 1.0, "none"), advantages, coef)


def liger(hidden: T, weight: T, targets: T, advantages: T, coef: float) -> T:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options = {"compiled": hidden.is_cuda, "chunk_size": 256, "loss_type": "bnpo"}
    function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, **options)
    mask = torch.ones_like(targets)[:, None]
    loss, _ = function(hidden[:, None], weight, targets[:, None], mask, advantages)
    # Its ratio is 1, so its value is the mean of the advantages; the gradient is that of the log-probs.
    return loss * len(hidden)


VERSIONS: dict[str, Callable[..., T]] = {
    "straightforward": straightforward,
    "mssr, two passes": two_pass,
    "mssr, gradient in forward": in_forward,
    "mssr, chunks of 256": functools.partial(in_forward, chunk=256),
    "verl": verl,
    "verl, kernel": verl_kernel,
    "Liger": liger,
}


def run(name: str, inputs: Inputs) -> None:
    """Forward and backward; gradients of an earlier pass are dropped first."""
    inputs[0].grad = inputs[1].grad = None
    VERSIONS[name](*inputs).backward()


def make_inputs(args: argparse.Namespace, tokens: int, vocabulary: int) -> Inputs:
    generator = torch.Generator(args.device).manual_seed(0)
    options = {"device": args.device, "dtype": getattr(torch, args.dtype), "generator": generator}
    hidden = torch.randn(tokens, args.hidden, **options).requires_grad_()
    # Rows repeat, in other sizes: random numbers for all of them take longer than the measurement.
    rows = torch.randn(1024, args.hidden, **options).mul_(args.hidden**-0.5)
    weight = rows.repeat(-(-vocabulary // 1024), 1)[:vocabulary].clone()
    weight *= torch.rand(vocabulary, 1, **options) + 0.5
    weight.requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), device=args.device, generator=generator)
    advantages = torch.randn(tokens, device=args.device, generator=generator)
    return hidden, weight, targets, advantages, args.entropy_coef


def memory(args: argparse.Namespace) -> dict[str, float]:
    """Of one version, in a process of its own: GiB, and the seconds of this one pass."""
    name, cuda = args.measure, args.device == "cuda"
    run(name, make_inputs(args, 64, 1024))  # libraries and thread pools
    inputs = make_inputs(args, args.tokens, args.vocabulary)
    if cuda:
        run(name, inputs)  # kernels of this shape are chosen and loaded
        inputs[0].grad = inputs[1].grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_peak()
        before = resident()
    seconds, _ = timed(lambda: run(name, inputs), cuda)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in inputs[:2])  # type: ignore[union-attr]
    return {"once": seconds, "peak": (peak - before) / GIB, "gradients": gradients / GIB}


def errors(args: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """By version, the largest error of a gradient at a small shape, relative to the largest gradient."""
    shape = argparse.Namespace(**vars(args) | {"hidden": 64})
    inputs = make_inputs(shape, 300, 1000)
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs[:2])
    run("straightforward", (hidden, weight, *inputs[2:]))
    result = {}
    for name in names:
        run(name, inputs)
        pairs = (inputs[0].grad, hidden.grad), (inputs[1].grad, weight.grad)
        result[name] = max(float((x - e).abs().max() / e.abs().max()) for x, e in pairs)  # type: ignore
    return result


def available(name: str, device: str, entropy_coef: float) -> str:
    """Why a version cannot run here; empty if it can."""
    if name == "Liger" and entropy_coef:
        return "Liger: takes no entropy loss"
    if name == "verl, kernel" and device != "cuda":
        return "verl's kernel needs a GPU"
    if name == "mssr, chunks of 256" and device != "cuda":
        return "Chunks are of 256 tokens"
    try:
        if name == "verl":
            verl_head()
        elif name == "verl, kernel":
            import verl.utils.kernel.linear_cross_entropy  # noqa: F401
        elif name == "Liger":
            import liger_kernel.chunked_loss  # noqa: F401
    except (ImportError, StopIteration) as error:
        return f"{name}: not installed ({error})".replace(" ()", "")
    return ""


COLUMNS = ("version", "s (fastest)", "CPU s", "time ratio", "CPU ratio", "s, once, all tokens",
           "peak extra GiB", "of it gradients", "memory ratio", "without gradients",
           "error of gradients")  # fmt: skip


def row(name: str, m: dict[str, float], base: dict[str, float]) -> tuple[str, ...]:
    besides = (m["peak"] - m["gradients"]) / (base["peak"] - base["gradients"])
    return (
        name,
        f"{m['seconds']:.2f} ({m['least_seconds']:.2f})",
        f"{m['cpu']:.2f}",
        f"{m['seconds'] / base['seconds']:.2f}",
        f"{m['cpu'] / base['cpu']:.2f}",
        f"{m['once']:.1f}",
        f"{m['peak']:.2f}",
        f"{m['gradients']:.2f}",
        f"{m['peak'] / base['peak']:.1%}",
        f"{besides:.1%}",
        f"{m['error']:.0e}",
    )


def compare(args: argparse.Namespace) -> list[str]:
    why = {name: available(name, args.device, args.entropy_coef) for name in VERSIONS}
    names = [name for name in VERSIONS if not why[name]]
    inputs = make_inputs(args, args.time_tokens or args.tokens, args.vocabulary)
    sides = {name: functools.partial(run, name, inputs) for name in names}
    times, wrong, found = in_turn(sides, args.repeats, inputs[0].is_cuda), errors(args, names), {}
    for name in names:
        found[name] = in_new_process(*sys.argv[1:], "--measure", name) | {"error": wrong[name]}
        found[name]["seconds"], found[name]["cpu"] = np.median(times[name], axis=0)
        found[name]["least_seconds"] = times[name][:, 0].min()
        print(f"memory, {name}: {found[name]['peak']:.2f} GiB", file=sys.stderr, flush=True)
    return [
        f"V = {args.vocabulary}, D = {args.hidden}, {args.tokens} tokens, {args.dtype}, {args.threads}"
        f" threads, forward and backward. Times on {args.time_tokens or args.tokens} tokens, medians of"
        f" {args.repeats} rounds, in which each version has its turn. Ratios are to straightforward. "
        + ". ".join(filter(None, why.values())),
        "",
        *table(COLUMNS, [row(name, m, found["straightforward"]) for name, m in found.items()]),
        "",
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--time-tokens", type=int, help="for the time; all if not given")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--entropy-coef", type=float, default=0.0, help="of the loss; 0: only a metric")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verl", type=Path, help="directory that holds the package verl")
    parser.add_argument("--liger", type=Path, help="directory that holds the package liger_kernel")
    parser.add_argument("--measure", choices=tuple(VERSIONS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path += [str(path) for path in (args.verl, args.liger) if path]
    if args.measure:
        print(json.dumps(memory(args)))
    else:
        publish(args, lambda: compare(args), "torch", append=True)


if __name__ == "__main__":
    main()
