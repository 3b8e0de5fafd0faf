"""One batch through verl: advantages, losses, KL, aggregation, rollout correction, controller, entropy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from batches import CONSTANT_LENGTH, Arrays, Padded, draw, one, with_prefixes
from verl import __version__
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits_naive
from verl.workers.config import ActorConfig

VERSION = f"verl {__version__}"
KL_IN_REWARD = 0.05

LOSSES: dict[str, tuple[str, dict[str, float]]] = {
    "ppo": ("vanilla", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 3.0}),
    "ppo_narrow": ("vanilla", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.05, "clip_ratio_c": 1.25}),
    "gspo": ("gspo", {"clip_ratio_low": 0.05, "clip_ratio_high": 0.08}),
    "gspo_paper": ("gspo", {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}),
    "cispo": ("cispo", {"clip_ratio_low": 10.0, "clip_ratio_high": 0.2}),
    "cispo_two_sided": ("cispo", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
    "sapo": ("sapo", {"tau_pos": 1.0, "tau_neg": 1.05}),
    "sapo_sharp": ("sapo", {"tau_pos": 2.0, "tau_neg": 3.5}),
}
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
CORRECTIONS: dict[str, dict[str, Any]] = {
    "token": {"rollout_is": "token", "rollout_is_threshold": 2.0},
    "sequence": {"rollout_is": "sequence", "rollout_is_threshold": 2.0},
    "icepop_token": {"rollout_is": "token", "rollout_is_threshold": "0.5_5.0"},
    "icepop_sequence": {"rollout_is": "sequence", "rollout_is_threshold": "0.5_5.0"},
    # verl bounds -log(rho), so rho itself in [1/upper, 1/lower]: here rho in [0.5, 5].
    "mask_token": {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.2_2.0"},
    "mask_sequence": {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.2_2.0"},
    "mask_geometric": {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "0.8_1.25"},
}
CORRECTIONS["both"] = CORRECTIONS["mask_geometric"] | {"rollout_is": "token", "rollout_is_threshold": 1.5}


def advantages(p: Padded, token_rewards: torch.Tensor) -> Arrays:
    gamma = AlgoConfig(gamma=1.0)
    common = {"token_level_rewards": token_rewards, "response_mask": p.mask}
    grouped = common | {"index": p.uids}
    grids = {
        "grpo": core_algos.compute_grpo_outcome_advantage(**grouped),
        "grpo_vectorized": core_algos.compute_grpo_vectorized_outcome_advantage(**grouped),
        "dr_grpo": core_algos.compute_grpo_outcome_advantage(**grouped, norm_adv_by_std_in_grpo=False),
        "rloo": core_algos.compute_rloo_outcome_advantage(**grouped),
        "rloo_vectorized": core_algos.compute_rloo_vectorized_outcome_advantage(**grouped),
        "reinforce_pp": core_algos.compute_reinforce_plus_plus_outcome_advantage(**common, config=gamma),
        "reinforce_pp_baseline": core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(**grouped),
    }
    return {name: p.flat(grid) for name, (grid, _) in grids.items()}


def losses(p: Padded) -> Arrays:
    out = {}
    for name, (function, options) in LOSSES.items():
        for mode in AGGREGATIONS:
            config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **options)
            config.global_batch_info.update(loss_scale_factor=CONSTANT_LENGTH)
            log_probs = p["log_probs"].requires_grad_()
            loss, _ = core_algos.get_policy_loss_fn(function)(
                old_log_prob=p["old_log_probs"],
                log_prob=log_probs,
                advantages=p["advantages"],
                response_mask=p.mask,
                loss_agg_mode=mode,
                config=config,
            )
            (grad,) = torch.autograd.grad(loss, log_probs)
            out |= {f"{name}/{mode}/loss": one(loss), f"{name}/{mode}/grad": p.flat(grad)}
    return out


def kl_penalties(p: Padded) -> Arrays:
    out = {}
    for kind in ("kl", "mse", "low_var_kl"):
        log_probs = p["log_probs"].requires_grad_()
        kl = core_algos.kl_penalty(log_probs, p["reference_log_probs"], kind)
        (grad,) = torch.autograd.grad(kl.sum(), log_probs)
        out |= {f"{kind}/value": p.flat(kl), f"{kind}/grad": p.flat(grad)}
    return out


def aggregations(p: Padded) -> Arrays:
    out = {}
    for mode in (*AGGREGATIONS, "token-sum", "seq-mean-token-sum"):
        grid = p["advantages"].requires_grad_()  # any numbers will do
        loss = core_algos.agg_loss(grid, p.mask, mode, loss_scale_factor=CONSTANT_LENGTH)
        (grad,) = torch.autograd.grad(loss, grid)
        out |= {f"{mode}/loss": one(loss), f"{mode}/grad": p.flat(grad)}
    return out


def corrections(p: Padded) -> Arrays:
    out = {}
    for name, options in CORRECTIONS.items():
        weights, mask, metrics = compute_rollout_correction_and_rejection_mask(
            p["old_log_probs"], p["engine_log_probs"], p.mask, **options
        )
        factor = mask if weights is None else weights.batch["rollout_is_weights"] * mask
        out[name] = p.flat(factor)
    return out | {"mismatch_k3": one(metrics["rollout_corr/k3_kl"])}


def head(rng: np.random.Generator) -> Arrays:
    """Log-probs and entropies of 12 tokens over 11 words, and gradients by the final hidden states.

    Computed in float64, because logsumexp(z) - sum p*z of a peaked distribution loses five of the seven
    digits of float32.
    """
    hidden, weight = rng.standard_normal((12, 4)), 2 * rng.standard_normal((11, 4))
    inputs = {
        "hidden": hidden.astype(np.float32),
        "weight": weight.astype(np.float32),
        "targets": rng.integers(0, 11, 12),
    }
    states = torch.from_numpy(inputs["hidden"]).double().requires_grad_()
    logits = states @ torch.from_numpy(inputs["weight"]).double().T
    log_probs = logprobs_from_logits_naive(logits, torch.from_numpy(inputs["targets"]))
    entropy = entropy_from_logits(logits)
    out = {"log_probs": log_probs.detach().float().numpy(), "entropy": entropy.detach().float().numpy()}
    for name, values in (("log_probs", log_probs), ("entropy", entropy)):
        (grad,) = torch.autograd.grad(values.sum(), states, retain_graph=True)
        out[f"grad_{name}"] = grad.float().numpy()
    named = {f"in/head/{key}": array for key, array in inputs.items()}
    named |= {f"out/head/{key}": array for key, array in out.items()}
    return {key: array[None] for key, array in named.items()}


def controller(rng: np.random.Generator, steps: int = 12) -> Arrays:
    """The coefficients after each of `steps` observations; setting = (coef, target, horizon)."""
    setting = np.array([rng.uniform(0.001, 0.1), rng.uniform(0.01, 0.2), rng.choice([2000, 10000])])
    kl = setting[1] * rng.uniform(0.5, 1.5, steps)
    rollouts = rng.integers(1, 2000, steps)
    oracle = core_algos.AdaptiveKLController(*setting)
    coefs = np.empty(steps)
    for step in range(steps):
        oracle.update(kl[step], int(rollouts[step]))
        coefs[step] = oracle.value
    inputs = {"in/controller/setting": setting, "in/controller/kl": kl, "in/controller/rollouts": rollouts}
    return {key: array[None] for key, array in (inputs | {"out/controller/coefs": coefs}).items()}


def batch(rng: np.random.Generator, number: int) -> Arrays:
    """Inputs and outputs of one batch, by name: groups of several sizes, shuffled."""
    inputs = draw(rng, number, rng.integers(2, 6, rng.integers(3, 5)), shuffle=True)
    p = Padded(inputs)
    out = {f"advantages/{k}": v for k, v in advantages(p, p.outcome_rewards()).items()}
    for kind in ("kl", "low_var_kl"):
        kl = core_algos.kl_penalty(p["old_log_probs"], p["reference_log_probs"], kind)
        penalties = KL_IN_REWARD * kl * p.mask
        inputs[f"penalties_{kind}"] = p.flat(penalties)
        # In float64: where the rewards of a group are equal only penalties differ, and GRPO divides
        # the rounding of the scores by their small standard deviation.
        with_kl = advantages(p, p.outcome_rewards().double() - penalties.double())
        out |= {f"advantages_{kind}/{k}": v for k, v in with_kl.items() if "vectorized" not in k}
    parts = {"loss": losses, "kl": kl_penalties, "aggregation": aggregations, "correction": corrections}
    for part, compute in parts.items():
        out |= {f"{part}/{key}": array for key, array in compute(p).items()}
    return with_prefixes(inputs, out) | head(rng) | controller(rng)
