"""Time of the advantages of one large step, mssr beside verl, as a Markdown table.

    PYTHONPATH=. python scripts/bench/advantages.py --out scripts/bench/results/advantages.md

In an environment with verl (scripts/oracles/README.md) its functions run in the same process, on the same
scores. mssr, which needs NumPy and torch here, has one advantage for each response; verl returns a padded
grid with a copy for each token. The column "and copied to tokens" is mssr's time with such copies, unpadded.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import statistics
from collections.abc import Callable

import numpy as np
import torch
from report import arguments, publish, table, timed

from mssr.algorithms import create

GROUP = 8
METHODS = {
    "grpo": ("grpo", "grpo_vectorized"),
    "dr_grpo": (),
    "rloo": ("rloo", "rloo_vectorized"),
    "lite_ppo": (),
    "reinforce_pp": ("reinforce_plus_plus",),
    "reinforce_pp_baseline": ("reinforce_plus_plus_baseline",),
    "mssr": (),
    "spo": (),
}
COLUMNS = ("method", "mssr, ms", "and copied to tokens, ms", "verl, ms", "largest difference")


def milliseconds(call: Callable[[], object], repeats: int, digits: int) -> str:
    """Median and, in brackets, fastest of so many calls after a first one."""
    times = [1e3 * timed(call)[0] for _ in range(repeats + 1)][1:]
    return f"{statistics.median(times):.{digits}f} ({min(times):.{digits}f})"


def verl_functions() -> dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """verl's estimators by name; empty without verl."""
    if not importlib.util.find_spec("verl"):
        return {}
    from verl.trainer.config import AlgoConfig
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    names = itertools.chain.from_iterable(METHODS.values())
    gamma = AlgoConfig(gamma=1.0)
    return {name: functools.partial(get_adv_estimator_fn(name), config=gamma) for name in names}


def rows(batch: int, tokens: int, repeats: int) -> list[tuple[str, ...]]:
    rng = np.random.default_rng(0)
    rewards = rng.integers(0, 2, batch).astype(np.float32)
    lengths = rng.integers(1, tokens + 1, batch)
    groups = [f"prompt-{i // GROUP}" for i in range(batch)]
    # Each call has other prompts, as each step of an epoch has: a method may remember the last ones.
    steps = [[f"prompt-{step * batch + i}" for i in range(batch)] for step in range(2 * repeats + 4)]
    index = np.array(groups, dtype=object)
    oracles = verl_functions()
    mask = (torch.arange(tokens) < torch.from_numpy(lengths)[:, None]).float()
    token_rewards = torch.zeros(batch, tokens)
    token_rewards[torch.arange(batch), torch.from_numpy(lengths) - 1] = torch.from_numpy(rewards)
    padded = {"token_level_rewards": token_rewards, "response_mask": mask, "index": index}
    found = []
    for name, theirs in METHODS.items():
        method = create(name)
        batches = [groups] if method.baseline is None else steps
        if method.baseline is not None:  # in the midst of a training: every prompt has been seen
            for ids in steps:
                method.observe(ids, rng.integers(0, 2, batch), np.zeros(batch) if name == "spo" else 0.0)
        following = itertools.cycle(batches)

        def advantages(method=method, following=following) -> np.ndarray:
            return method.advantages(next(following), rewards, lengths)[0]

        own = milliseconds(advantages, repeats, 2)
        copied = milliseconds(lambda f=advantages: np.repeat(f(), lengths), repeats, 1)
        verl, difference = [], []
        for key in filter(oracles.get, theirs):
            flat = oracles[key](**padded)[0][mask.bool()].numpy()
            difference.append(float(np.abs(flat - np.repeat(advantages(), lengths)).max()))
            kind = " vectorised" if key.endswith("vectorized") else ""
            verl.append(milliseconds(functools.partial(oracles[key], **padded), repeats, 0) + kind)
        largest = f"{max(difference):.0e}" if difference else ""
        found.append((name, own, copied, ", ".join(verl), largest))
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=2048, help=f"responses, a multiple of {GROUP}")
    parser.add_argument("--tokens", type=int, default=4096, help="longest response")
    parser.add_argument("--repeats", type=int, default=9, help="calls of each function")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def measure() -> list[str]:
        beside = "verl is not installed here: mssr only."
        if importlib.util.find_spec("verl"):
            beside = "verl's functions ran in the same process on the same scores, padded as it has them."
        return [
            f"Advantages of {args.batch} responses of 1 to {args.tokens} tokens (groups of {GROUP}; single"
            f" responses, of other prompts each call, in mssr and spo), {args.threads} threads, median"
            f" (fastest) of {args.repeats} calls. {beside}",
            "",
            *table(COLUMNS, rows(args.batch, args.tokens, args.repeats)),
        ]

    publish(args, measure, "verl torch numpy")


if __name__ == "__main__":
    main()
