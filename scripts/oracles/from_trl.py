"""One batch through TRL: two methods of GRPOTrainer, called with a stand-in for the trainer."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from batches import CONSTANT_LENGTH, Arrays, Padded, draw, one, with_prefixes
from trl import GRPOTrainer, __version__

VERSION = f"TRL {__version__}"

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "grpo_kl": {"beta": 0.04},
    "grpo_delta": {"delta": 1.4},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08},
    "gspo_paper": {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    "corrected": {"use_vllm": True},
}
CORRECTIONS = {
    "token": ("token_truncate", None, 2.0),
    "sequence": ("sequence_truncate", None, 2.0),
    "icepop_token": ("token_mask", 0.5, 5.0),
    "icepop_sequence": ("sequence_mask", 0.5, 5.0),
}


def trainer(p: Padded, log_probs: torch.Tensor | None = None, **options: Any) -> SimpleNamespace:
    """What the two methods of GRPOTrainer read of `self`: one process, no model, log-probs given."""
    config: dict[str, Any] = {
        "loss_type": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon": 0.2,
        "epsilon_high": 0.3,
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "use_bias_correction_kl": False,
        "use_vllm": False,
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing_kwargs": None,
        "per_device_train_batch_size": len(p.lengths),
    } | options
    counts = p.lengths.tolist()
    completions = [[1] * count for count in counts]
    sampled = [row[:count].tolist() for row, count in zip(p["engine_log_probs"], counts, strict=True)]
    logs: dict[str, Any] = {key: [] for key in ("prompt", "completion", "advantages")}
    off = ("mask_truncated_completions", "aux_loss_enabled", "_entropy_bonus_enabled")
    absent = ("environment_factories", "environments", "tools", "pad_to_multiple_of", "ref_model")
    accelerator = SimpleNamespace(num_processes=1, process_index=0, device="cpu")
    accelerator.gather = accelerator.gather_for_metrics = accelerator.reduce = lambda value, **_: value
    return SimpleNamespace(
        **config,
        **dict.fromkeys(off, False),
        **dict.fromkeys(absent),
        args=SimpleNamespace(**config),
        epsilon_low=config["epsilon"],
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=accelerator,
        _generate=lambda prompts: (completions, completions, None, completions, sampled, {}, None, None),
        _calculate_rewards=lambda *_: p.rewards[:, None].clone(),
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(p.mask), None),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["reward"],
        num_generations=int((p.uids == p.uids[0]).sum()),
        multi_objective_aggregation="sum_then_normalize",
        max_completion_length=CONSTANT_LENGTH,
        current_gradient_accumulation_steps=1,
        num_iterations=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        vllm_importance_sampling_correction=True,
        _metrics={"train": defaultdict(list)},
        _logs=logs | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
    )


def scored(p: Padded, **options: Any) -> dict[str, torch.Tensor]:
    """Advantages and, with use_vllm, the correction of what the engine sampled."""
    stub = trainer(p, p["old_log_probs"], **options)
    return GRPOTrainer._generate_and_score_completions(stub, [{"prompt": ""} for _ in p.lengths])


def corrections(p: Padded) -> dict[str, torch.Tensor]:
    """The factors by name: (S, T), or (S, 1) for those of whole sequences."""
    factors = {}
    for name, (mode, low, high) in CORRECTIONS.items():
        options = {"mode": mode, "clip_min": low, "clip_max": high}
        named = {f"vllm_importance_sampling_{key}": value for key, value in options.items()}
        factors[name] = scored(p, use_vllm=True, **named)["importance_sampling_ratio"]
    return factors


def losses(p: Padded, factor: torch.Tensor) -> Arrays:
    out = {}
    for name, options in LOSSES.items():
        log_probs = p["log_probs"].requires_grad_()
        inputs = {
            "prompt_ids": torch.ones(len(p.lengths), 1, dtype=torch.int64),
            "prompt_mask": torch.ones(len(p.lengths), 1),
            "completion_ids": p.mask.long(),
            "completion_mask": p.mask,
            "advantages": p["advantages"],
            "old_per_token_logps": p["old_log_probs"],
            "ref_per_token_logps": p["reference_log_probs"],
            "importance_sampling_ratio": factor,
            "num_items_in_batch": p.mask.sum(),
        }
        loss = GRPOTrainer._compute_loss(trainer(p, log_probs, **options), None, inputs)
        (grad,) = torch.autograd.grad(loss, log_probs)
        out |= {f"{name}/loss": one(loss), f"{name}/grad": p.flat(grad)}
    return out


def batch(rng: np.random.Generator, number: int) -> Arrays:
    """Inputs and outputs of one batch, by name: groups of one size, one after the other."""
    size = int(rng.choice([2, 4, 8]))
    inputs = draw(rng, number, np.full(16 // size, size), shuffle=False)
    p = Padded(inputs)
    factors = corrections(p)
    out = {f"correction/{name}": p.flat(factor) for name, factor in factors.items()}
    for scale in ("group", "batch", "none"):
        out[f"advantages/{scale}"] = scored(p, scale_rewards=scale)["advantages"].numpy()
    out |= {f"loss/{name}": array for name, array in losses(p, factors["token"]).items()}
    return with_prefixes(inputs, out)
