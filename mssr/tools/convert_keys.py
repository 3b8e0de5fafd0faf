"""EasyR1's and verl's config keys, every one of them: read as what, without effect here, or not possible.

The tables are convert_keys.txt beside this file; `mssr.tools.convert` reads configs by them, and
docs/convert.md is written from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mssr.config import easyr1_keys
from mssr.config.options import in_yaml

NO_LIMIT = 1_000_000
"""A number that no run reaches; as an interval of steps: before the first and after the last only."""


@dataclass(frozen=True, slots=True)
class Key:
    """What becomes of a key; and of the keys in it, unless they are listed."""

    to: str = ""
    """Option of ours that it sets, or one of FACTS, of which options are computed; "" for neither."""
    default: Any = None
    """What it is where it is absent, which is written too."""
    only: tuple[Any, ...] | None = None
    """Values that mean the same here, or "=KEY": the value of that key. Others are not possible."""
    note: str = ""
    """Why it has no effect; or what to use in place of a value that is not possible."""
    trains: bool = True
    """Whether such a value changes what is learnt, and not only memory, files or validation."""


FACTS = {
    "val": "data.val",
    "filter": "data.max_prompt_length",
    "truncation": "data.max_prompt_length",
    "patch": "data.min_pixels, data.max_pixels",
    "prompts": "rollout.rollouts_per_step, actor.updates_per_step",
    "rollout.n": "rollout.n, rollout.rollouts_per_step",
    "rollout.tensor_parallel": "rollout.tensor_parallel, rollout.workers",
    "estimator": "algorithm.name",
    "by_std": "algorithm.name",
    **dict.fromkeys(("kl_off", "kl_in_loss", "kl_in_reward"), "algorithm.kl.coef, algorithm.kl.placement"),
    **dict.fromkeys(("kl_coef", "kl_loss_coef"), "algorithm.kl.coef"),
    **dict.fromkeys(("kl_penalty", "kl_loss_type"), "algorithm.kl.estimator"),
    **dict.fromkeys(("kl_adaptive", "kl_target"), "algorithm.kl.target"),
    **dict.fromkeys(("filter_key", "filter_low", "filter_high"), "sampler.dynamic"),
    "mini": "actor.updates_per_step",
    **dict.fromkeys(("micro", "micro_dynamic", "micro_tokens"), "actor.micro_batch_tokens"),
    "lora_exclude": "actor.lora.targets",
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "actor.warmup_steps"),
    **dict.fromkeys(("optimizer", "dtype"), "actor.master_dtype, actor.rounding"),
    **dict.fromkeys(("offload_all", "offload_optimizer"), "actor.offload"),
    "offload_reference": "actor.offload_reference",
    **dict.fromkeys(("val_options", "val_n", "val_temperature"), "data.val"),
    **dict.fromkeys(("reward_file", "reward_function"), "reward.name"),
    "overlong": "reward.overlong_buffer, reward.overlong_penalty",
    **dict.fromkeys(("epochs", "max_steps"), "trainer.steps, trainer.epochs"),
    **dict.fromkeys(("nodes", "gpus"), "actor.num_ranks, rollout.workers"),
}
"""What sets other options than the one of that name: the options that are computed of it."""

_KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
_USE_KL = "set algorithm.kl.estimator to k1, k2 or k3"
VALUES: Mapping[str, tuple[Mapping[Any, Any], str]] = {
    "estimator": (
        {n: n for n in ("grpo", "rloo", "mssr", "mvsr", "spo")}
        | {"grpo_vectorized": "grpo", "rloo_vectorized": "rloo", "reinforce_plus_plus": "reinforce_pp"}
        | {"reinforce_plus_plus_baseline": "reinforce_pp_baseline"},
        "no critic and no greedy baseline here: set algorithm.name to mssr, or to grpo, rloo or the like",
    ),
    "kl_penalty": (_KL, _USE_KL),
    "kl_loss_type": (_KL, _USE_KL),
    "kl_adaptive": ({"fixed": False, "adaptive": True}, "set algorithm.kl.target"),
    "algorithm.correction.weight": (
        {None: "none", "token": "token", "sequence": "sequence"},
        "set algorithm.correction.weight to token or sequence",
    ),
    "algorithm.loss.name": (
        {n: n for n in ("gspo", "cispo", "sapo")}
        | {"default": "ppo", "vanilla": "ppo", "gspo_token": "gspo"},
        "set algorithm.loss.name to ppo, gspo, cispo, sapo or a loss of your own",
    ),
    "algorithm.loss.aggregation": (
        {"token": "token_mean", "token-mean": "token_mean", "seq": "sequence_mean"}
        | {"seq-mean-token-mean": "sequence_mean", "seq-mean-token-sum-norm": "constant_length"}
        | {"seq-mean-token-sum": "constant_length of 1"},
        "set algorithm.loss.aggregation",
    ),
    "actor.lr_schedule": ({"constant": "constant", "cosine": "cosine"}, "set actor.lr_schedule"),
    "optimizer": (
        {"adamw": "adamw", "AdamW": "adamw", "adam": "adamw", "adamw_bf16": "adamw_bf16"},
        "set actor.optimizer, to adamw or adamw_8bit",
    ),
    "trainer.resume": (
        {True: "auto", False: "never", "auto": "auto", "disable": "never"},
        "checkpoints of theirs are not read; merge one into a Hugging Face directory and set model.path",
    ),
}
"""Their values -> ours, of what takes some only; and what to use in place of others."""
SWAPPED: Mapping[str, Mapping[Any, Any]] = {
    "seed": {None: 0},
    "data.min_pixels": {None: 3136},
    "data.max_pixels": {None: 12845056},
    "trainer.val_max_prompts": {-1: None},
    "actor.shard_size": {-1: None, 0: None},
    "sampler.max_draws": {-1: NO_LIMIT, 0: NO_LIMIT},
    "trainer.keep_checkpoints": {None: NO_LIMIT, -1: NO_LIMIT, 0: NO_LIMIT},
}
"""Their values -> ours, of what takes others as they are."""


def _table(column: int) -> dict[str, Key]:
    """Every key of a system by its whole name, from a column of convert_keys.txt."""
    base = ("worker", "actor_rollout_ref")[column]
    short = {"a": f"{base}.actor", "ro": f"{base}.rollout", "m": f"{base}.model"}
    table = {}
    text = Path(__file__).with_suffix(".txt").read_text()
    for line in filter(None, (line.partition("#")[0] for line in text.splitlines())):
        about, *columns = (part.strip() for part in line.split("|"))
        for group in filter(None, columns[column].split("; ")):
            names, equals, written = group.partition(" = ")
            value: Any = yaml.safe_load(written) if equals else None
            for name in names.split():
                start, dot, rest = name.partition(".")
                whole = short.get(start, start) + dot + rest
                if " " not in about:
                    table[whole] = Key(about, value, note=VALUES.get(about, ({}, ""))[1])
                else:
                    only = tuple(value) if equals else None
                    table[whole] = Key(only=only, note=about.lstrip("?"), trains=not about.startswith("?"))
    return table


_EASYR1 = {f"data.{key}": Key(note=reason) for key, reason in easyr1_keys.WITHOUT_EFFECT.items()}
for _key, (_ours, _default) in easyr1_keys.RENAMED.items():
    _EASYR1[f"data.{_key}"] = Key("val" if _ours == "data.val" else _ours, _default)
SYSTEMS = {"EasyR1": _EASYR1 | _table(0), "verl": _table(1)}


def reference() -> str:
    """The tables of docs/convert.md, from here: ``python -m mssr.tools.convert_keys``."""
    lines = [MARK]
    for system, table in SYSTEMS.items():
        lines += ["", f"## {system}", "", "| key | by default | here |", "| --- | --- | --- |"]
        for key, about in table.items():
            use = f"; {'else' if about.only or about.to else ''} {about.note}".replace(";  ", "; ")
            if about.to:
                options = ", ".join(f"`{o}`" for o in FACTS.get(about.to, about.to).split(", "))
                values = VALUES.get(about.to, ({}, ""))[0]
                known = ", ".join(
                    f"`{in_yaml(a)}`" + (f" as `{in_yaml(b)}`" if a != b else "") for a, b in values.items()
                )
                row = f"`{in_yaml(about.default)}` | {options}" + (f": {known}{use}" if known else "")
            elif about.only:
                row = f" | as here: {', '.join(f'`{in_yaml(v)}`' for v in about.only)}{use}"
            else:
                row = f" | without effect: {about.note}"
            lines.append(f"| `{key}` | {row} |")
    return "\n".join(lines) + "\n"


MARK = "<!-- From here on written by `python -m mssr.tools.convert_keys`. -->"

if __name__ == "__main__":
    print(reference(), end="")
