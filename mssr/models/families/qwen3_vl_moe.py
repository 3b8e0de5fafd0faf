"""Qwen3-VL-MoE: decoder layers have experts, of which a router chooses some for each token."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mssr.errors import UserError, first_line
from mssr.models.families.qwen3_vl import Qwen3VL
from mssr.models.shapes import TextShape, take

if TYPE_CHECKING:
    import torch

    from mssr.models.tiny import TinySize


class Qwen3VLMoe(Qwen3VL):
    """``Qwen3VLMoeForConditionalGeneration``"""

    model_type = "qwen3_vl_moe"
    shared_out = (*Qwen3VL.shared_out, "moe_intermediate_size")

    def text_shape(self, text: Mapping[str, Any]) -> TextShape:
        if not text.get("norm_topk_prob", True):
            raise UserError("model.path: norm_topk_prob=false in its config.json, which transformers ignores")
        step, mlp_only = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or ()
        dense = [i for i in range(text["num_hidden_layers"]) if i in mlp_only or (i + 1) % step]
        # The one is the name in published files, the other in those that transformers writes.
        experts = text.get("num_experts", text.get("num_local_experts"))
        return take(TextShape, text, qk_norm=True, num_experts=experts, dense_layers=len(dense))

    def check_files(self, tree: Mapping[str, Any], directory: Path) -> None:
        from safetensors import SafetensorError, safe_open

        for file in directory.glob("*.safetensors"):
            try:
                with safe_open(file, "np") as tensors:
                    experts = [n for n in tensors.keys() if n.endswith(".gate_up_proj")]  # noqa: SIM118
                    inputs = {tensors.get_slice(name).get_shape()[1] for name in experts}
            except SafetensorError as error:
                raise UserError(f"model.path: {file} cannot be read ({first_line(error)})") from error
            if inputs - {tree["text_config"]["hidden_size"]}:
                raise UserError(
                    f"model.path: {directory} was saved by transformers, with its experts the other way "
                    "round than published, which vLLM cannot load; open it with transformers and write it by "
                    "mssr.models.families.family_of(model.config).save(model, directory)"
                )

    def adapt(self, model: Any, packed: bool) -> None:
        super().adapt(model, packed)
        for block in _sparse_blocks(self.language_model(model)):
            block.gate.forward = functools.partial(_route, block.gate)
            if packed:
                block.experts.forward = functools.partial(_with_a_row_for_each, block.experts)

    def save(self, model: Any, directory: Path) -> None:
        # transformers turns experts round where their shape is another than the model's, and here it is not.
        state = {name: self.engine_weight(name, weight) for name, weight in model.state_dict().items()}
        model.save_pretrained(directory, state_dict=state, save_original_format=False)

    def measure(self, language_model: Any) -> dict[str, torch.Tensor]:
        import torch

        blocks = _sparse_blocks(language_model)
        return {"policy/router_balance": torch.stack([block.gate.balance for block in blocks])}

    def engine_weight(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        # Of published files, in which experts multiply from the right.
        return weight.transpose(1, 2) if ".experts." in name else weight

    def before_load(self, engine_model: Any) -> None:
        super().before_load(engine_model)
        for module in engine_model.modules():
            method: Any = getattr(module, "quant_method", None)
            if hasattr(method, "moe_kernel") and next(module.parameters()).device.type == "cpu":
                # With a kernel vLLM takes experts for packed already, and computes with them as they came.
                method.moe_kernel = None

    def tiny_config(self, ids: Mapping[str, int], size: TinySize) -> Any:
        from transformers import Qwen3VLMoeConfig

        text = size.text(ids, interleaved=True) | {"head_dim": size.hidden // size.heads}
        # No matrix of an expert is square, nor both together: its transpose would fit as well.
        experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": size.hidden * 3 // 4}
        # transformers' class does not know the last, and vLLM wants it.
        text |= experts | {"mlp_only_layers": [1], "norm_topk_prob": True}
        return Qwen3VLMoeConfig(**size.options(ids, text, self.tiny_vision(size)))


def _sparse_blocks(language_model: Any) -> Iterator[Any]:
    return (layer.mlp for layer in language_model.layers if hasattr(layer.mlp, "gate"))


def _route(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """As transformers' own, but that logits are float32 at least, whatever the dtype of the pass: rounded to
    bfloat16, many would be equal. Keeps ``router.balance``, see docs/algorithms.md.

    Args:
        hidden: (S, D).

    Returns:
        (S, E) logits, and (S, k) weights and numbers of the chosen experts.
    """
    import torch
    from torch.nn import functional as F

    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden.to(dtype), router.weight.to(dtype))
    probabilities = logits.softmax(-1)
    weights, chosen = probabilities.topk(router.top_k)
    with torch.no_grad():
        # Whole numbers, whose sum does not depend on their order.
        counts = torch.zeros_like(probabilities[0])
        counts.scatter_add_(0, chosen.flatten(), torch.ones_like(weights.flatten()))
        router.balance = len(counts) * (counts / chosen.numel() * probabilities.mean(0)).sum()
    return logits, (weights / weights.sum(-1, keepdim=True)).to(hidden.dtype), chosen


def _with_a_row_for_each(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """As transformers' own, but that every expert also gets a row of zeros, which changes nothing. On some
    GPUs one without a row has as its gradient what was in memory before (pytorch/pytorch#172439).

    Args:
        hidden: (S, D).
        chosen: (S, k), as ``weights``.
    """
    import torch
    from torch.nn import functional as F

    k = chosen.shape[1]
    rows = -(-experts.num_experts // k)
    all_of_them = torch.arange(rows * k, device=chosen.device).view(rows, k) % experts.num_experts
    hidden, weights = (F.pad(tensor, (0, 0, 0, rows)) for tensor in (hidden, weights))
    return type(experts).forward(experts, hidden, torch.cat([chosen, all_of_them]), weights)[:-rows]
