"""What an update computes, in floating point operations of the model: the numerator of its MFU."""

from __future__ import annotations

import torch

from mssr.actor.planning import StepPlan
from mssr.config import Config
from mssr.models.cost import CostModel
from mssr.models.gpus import find
from mssr.types import TrainBatch


def work_metrics(
    config: Config, cost: CostModel, batch: TrainBatch, plan: StepPlan, device: torch.device
) -> dict[str, float]:
    """``perf/update_tera_operations``, of all ranks together; ``perf/gpu_peak_tflops``, of a device whose
    kind is known."""
    metrics = {"perf/update_tera_operations": model_operations(config, cost, batch, plan) / 1e12}
    kind = find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if kind is not None and kind.bf16_flops is not None:
        metrics["perf/gpu_peak_tflops"] = kind.bf16_flops / 1e12
    return metrics


def model_operations(config: Config, cost: CostModel, batch: TrainBatch, plan: StepPlan) -> float:
    """Of the passes that `PolicyUpdater.step` makes: forward and backward of what is trained on; forward of
    log-probs that the batch does not bring along, of the text-only anchor, visual credit and the KL probe.

    It depends neither on ranks nor on micro-batches: a prompt's images count once for each pass over the
    sequences of an update. A frozen tower, recomputation and adapters do not count.
    """
    lora, needs_old = config.actor.lora, batch.old_log_probs is None
    needs_reference = config.needs_reference and not config.kl_in_reward and batch.reference_log_probs is None
    visual = config.algorithm.shaping.visual != "none"
    total = 0.0
    for number, update in enumerate(plan.updates):
        work = cost.operations(batch, update.sequences, config.trains_vision)
        # The first one's own forward pass gives the old log-probs, see `mssr.actor.update`.
        own_pass = number == 0 and not lora.dropout
        scored = int(visual or (needs_old and not own_pass)) + int(needs_reference)
        total += work.training(frozen_weights=lora.rank > 0) + scored * work.forward
        if config.algorithm.loss.text_anchor_coef or visual:
            total += cost.operations(batch, update.sequences, text_only=True).forward
    probed = [s for passes in plan.probe for micro in passes if micro.weight for s in micro.sequences]
    probe = cost.operations(batch, probed, config.trains_vision)
    return total + (1 + int(config.holds_out and needs_old)) * probe.forward
