"""Our options from what a config of EasyR1 or verl says: the arithmetic of `mssr convert`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mssr import algorithms
from mssr.config import Config
from mssr.config.options import describe
from mssr.tools.convert_keys import NO_LIMIT

BUILT_IN: dict[str, dict[str, Any]] = {
    "hiyouga/geometry3k": {"name": "math", "format": "weighted", "format_weight": 0.1},
    "lighteval/MATH": {"name": "math", "format": "none"},
    "DigitalLearningGmbH/MATH-lighteval": {"name": "math", "format": "none"},
    "HuggingFaceH4/MATH-500": {"name": "math", "format": "none"},
}
"""verl's rewards by data_source that a rule here means, too; equality is that of docs/rewards.md."""
DIRECTORIES = {"geo3k": "hiyouga/geometry3k", "geo3k_multiturn_w_tool": "hiyouga/geometry3k"}
"""Where verl's examples/data_preprocess writes rows of a data_source."""


class Options:
    """Our options from facts, which are what keys set (Key.to).

    What is not possible is told by calling ``lost(what, what to use)``.
    """

    def __init__(self, facts: Mapping[str, Any], system: str, lost: Callable[..., None]) -> None:
        self.f, self.verl, self.lost = facts, system == "verl", lost
        self.reward_of = ""
        """Which rows a rule was chosen for; empty for a reward that the config names."""
        self.o = {key: value for key, value in facts.items() if key in describe(Config)}

    def options(self) -> dict[str, Any]:
        """By dotted key; those that nothing would read are left out."""
        for step in (self._data, self._batches, self._method, self._kl, self._loss, self._actor):
            step()
        self._trainer()
        self._reward()
        return self.o

    def _drop(self, *keys: str) -> None:
        for key in keys:
            self.o.pop(key, None)

    def _data(self) -> None:
        f, o = self.f, self.o
        if self.verl:
            o["data.answer_column"] = "reward_model.ground_truth"
            bounds = (65536, 16777216) if f["patch"] == 16 else (3136, 12845056)  # Qwen3-VL's, Qwen2.5-VL's
            o["data.min_pixels"], o["data.max_pixels"] = bounds
            if f["truncation"] != "error" and not f["filter"]:
                self.lost(f"data.truncation={f['truncation']}", "longer prompts are left out, not cut")
        if not o.get("data.prompt_template"):
            o["data.instruction"] = ""  # the bare question, as there
        for key, value in (("data.train", o["data.train"]), ("data.val", f["val"])):
            files = value if isinstance(value, list) else [value] if value else []
            files = [str(Path(name).expanduser()) if name[0] == "~" else name for name in files]
            o[key] = files if len(files) > 1 else files[0] if files else None
        chosen = dict(f.get("val_options") or {})
        n = chosen.pop("n", f.get("val_n", 1))
        temperature = chosen.pop("temperature", f.get("val_temperature", o["rollout.temperature"]))
        if chosen.pop("top_p", 1.0) != 1.0 or chosen:
            with_ = f["val_options"]
            self.lost(f"validation with {with_}", "it samples by temperature, of all tokens", trains=False)
        if o["data.val"] and temperature != 0:  # one greedy response is as good as several
            o["data.val"] = {"val": {"path": o["data.val"], "n": n, "temperature": temperature}}

    def _batches(self) -> None:
        f, o = self.f, self.o
        prompts, mini, n = f["prompts"], f["mini"], o["rollout.n"]
        o["rollout.rollouts_per_step"] = prompts * n
        if prompts % mini:
            self.lost(f"{prompts} prompts a step in updates of {mini}", "set actor.updates_per_step")
        o["actor.updates_per_step"] = max(1, prompts // mini)
        ranks, each = f["gpus"] * f["nodes"], o["rollout.tensor_parallel"]
        o["actor.num_ranks"], o["rollout.workers"] = ranks, max(1, ranks // each)
        if ranks % each:
            self.lost(f"{ranks} GPUs for engines of {each}", "set rollout.tensor_parallel")
        if (shard := o["actor.shard_size"]) and shard >= ranks:
            o["actor.shard_size"] = None
        longest = o["data.max_prompt_length"] + o["rollout.max_response_length"]
        micro = f.get("micro_tokens", 16384)
        if not self.verl or (not f["micro_dynamic"] and f["micro"]):
            micro = f["micro"] * longest
        o["actor.micro_batch_tokens"] = max(micro, longest)

    def _method(self) -> None:
        f, o = self.f, self.o
        name = f["estimator"]
        if name == "grpo" and f.get("by_std") is False:
            name = "dr_grpo"
        if name:
            o["algorithm.name"] = name
            least = algorithms.get(name).min_n
            if o["rollout.n"] < least:
                use = f"set rollout.n to {least} or more, or algorithm.name to mssr, which needs one"
                self.lost(f"{name} with {o['rollout.n']} response", use)
        if not o["sampler.dynamic"]:
            self._drop("sampler.max_draws")
        elif not self.verl or f["filter_key"] not in ("reward", "score", "seq_reward", "seq_final_reward"):
            by = f"{f['filter_key']}" if self.verl else f"a mean {f['filter_key']} in ({f['filter_low']}, "
            by += "" if self.verl else f"{f['filter_high']})"
            self.lost(f"filter by {by}", "prompts whose rewards are all equal are left out and others drawn")
        if o.get("algorithm.correction.weight") in (None, "none"):
            self._drop("algorithm.correction.max_weight")

    def _kl(self) -> None:
        f, o = self.f, self.o
        in_loss = bool(f["kl_in_loss"]) and not f.get("kl_off")
        in_reward = bool(f["kl_in_reward"]) if self.verl else not (f["kl_off"] or f["kl_in_loss"])
        if in_loss and in_reward:
            self.lost("KL in the loss and in the reward", "algorithm.kl.placement is one of them: loss")
            in_reward = False
        coef = f.get("kl_loss_coef" if in_loss and self.verl else "kl_coef") if in_loss or in_reward else 0.0
        o["algorithm.kl.coef"] = coef
        if not coef:
            return self._drop("algorithm.kl.horizon")
        o["algorithm.kl.placement"] = "loss" if in_loss else "reward"
        o["algorithm.kl.estimator"] = f["kl_loss_type" if in_loss and self.verl else "kl_penalty"] or "k3"
        if in_reward and f["kl_adaptive"]:  # that in the loss is fixed in both
            o["algorithm.kl.target"] = f["kl_target"]
        else:
            self._drop("algorithm.kl.horizon")
        return None

    def _loss(self) -> None:
        o = self.o
        name = o["algorithm.loss.name"] or "ppo"
        if o["algorithm.loss.name"] is None:
            self._drop("algorithm.loss.name")
        for option in ("clip_low", "clip_high", "dual_clip", "tau_positive", "tau_negative"):
            if option not in algorithms.policy_losses.loss_options(name):
                self._drop(f"algorithm.loss.{option}")
        if o.get("algorithm.loss.clip_low") == 0:
            o["algorithm.loss.clip_low"] = 1e-9  # which must be above 0; in float32 the bound is the same
        aggregation = o["algorithm.loss.aggregation"]
        if self.verl and name == "sapo":
            aggregation = "sequence_mean"  # whatever verl's loss_agg_mode
        length = o.pop("algorithm.loss.constant_length", None) or o["rollout.max_response_length"]
        if aggregation and aggregation.startswith("constant_length"):
            o["algorithm.loss.constant_length"] = 1 if aggregation.endswith(" 1") else length
        o["algorithm.loss.aggregation"] = aggregation.partition(" ")[0] if aggregation else None

    def _actor(self) -> None:
        f, o = self.f, self.o
        low = {"bf16": "bfloat16", "fp32": "float32"}.get(f["dtype"] or "fp32", f["dtype"])
        o["actor.master_dtype"] = "float32"
        if low == "bfloat16" and f["optimizer"] == "adamw_bf16":
            o["actor.master_dtype"], o["actor.rounding"] = "bfloat16", "kahan"
        elif (low, f["optimizer"]) != ("float32", "adamw"):
            use = "set actor.master_dtype=bfloat16 and actor.rounding; it is float32 now"
            self.lost(f"optimizer {f['optimizer']} of {low} parameters", use)
        o["actor.offload"] = "all" if f["offload_all"] else "optimizer" if f["offload_optimizer"] else "none"
        lora = o["actor.lora.rank"]
        if f["offload_reference"] and o["algorithm.kl.coef"] and not f["offload_all"] and not lora:
            o["actor.offload_reference"] = True
        if not lora:
            self._drop("actor.lora.alpha", "actor.lora.targets")
        else:
            targets = o["actor.lora.targets"]
            names = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else list(targets)
            o["actor.lora.targets"] = [] if names == ["all-linear"] else names
            if not any(word in str(f["lora_exclude"]) for word in ("visual", "vision")):
                self.lost("adapters of the vision tower", "they are of the language model only here")

    def _trainer(self) -> None:
        f, o = self.f, self.o
        steps = f["max_steps"]
        o["trainer.steps" if steps else "trainer.epochs"] = steps or f["epochs"]
        warmup = f["warmup_steps"]
        if (warmup is None or warmup < 0 or (self.verl and warmup == 0)) and (ratio := f["warmup_ratio"]):
            warmup = int(ratio * steps) if steps else None
            if not steps:
                use = "set actor.warmup_steps, or give a number of steps in place of epochs after FILE"
                self.lost(f"warm-up over {ratio} of the steps", use)
        o["actor.warmup_steps"] = max(warmup or 0, 0)
        for key in ("trainer.val_every", "trainer.save_every"):
            if o[key] <= 0:  # EasyR1 validates and saves after the last step in any case
                o[key] = 0 if self.verl else NO_LIMIT
        loggers = o["trainer.loggers"]
        loggers = [loggers] if isinstance(loggers, str) else loggers
        o["trainer.loggers"] = [name for name in loggers if name in ("wandb", "tensorboard")]

    def _reward(self) -> None:
        f, o = self.f, self.o
        file, function = f["reward_file"], f.get("reward_function")
        if file and self.verl:
            o["reward.name"] = f"{file}:{function or 'compute_score'}"
        elif file:
            o["reward.name"] = file if ":" in file else f"{file}:main"
        elif self.verl and (names := _data_sources(o["data.train"])) and names <= BUILT_IN.keys():
            rules = [BUILT_IN[name] for name in sorted(names)]
            o |= {f"reward.{key}": value for key, value in rules[0].items()}
            self.reward_of = f"data_source={', '.join(sorted(names))} of data.train_files"
            if any(rule != rules[0] for rule in rules):
                self.lost(f"rewards by data_source {sorted(names)}", "set reward.name to a file of yours")
        else:
            self.lost("the reward", "set reward.name; docs/convert.md says what verl's by data_source are")
        if (overlong := f.get("overlong") or {}).get("enable"):
            o["reward.overlong_buffer"] = overlong.get("len", 0)
            o["reward.overlong_penalty"] = overlong.get("penalty_factor", 1.0)
        if not file:
            self._drop("reward.options")


def _data_sources(files: Any) -> set[str]:
    """data_source of verl's rows, of files that are here, else by their directory; "" where it is unknown."""
    import pyarrow.parquet

    names: set[str] = set()
    for file in map(Path, [files] if isinstance(files, str) else files or []):
        try:
            names |= set(pyarrow.parquet.read_table(file, columns=["data_source"])[0].to_pylist())
        except (OSError, pyarrow.ArrowException):
            names.add(DIRECTORIES.get(file.parent.name, ""))
    return names
