"""Qwen3.5: of four layers three carry a state along by the gated delta rule (2412.06464), one attends."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mssr.errors import UserError
from mssr.models.families.base import Grid
from mssr.models.families.qwen2_vl import Qwen2VL
from mssr.models.families.qwen3_vl import Qwen3VL
from mssr.models.shapes import StateLayers, TextShape, VisionShape, take

if TYPE_CHECKING:
    import torch

    from mssr.models.packing import PackedBatch
    from mssr.models.tiny import TinySize


class Qwen35(Qwen2VL):
    """``Qwen3_5ForConditionalGeneration``"""

    model_type = "qwen3_5"
    shared_out = (*Qwen2VL.shared_out, "linear_num_key_heads", "linear_num_value_heads")
    experimental = "on CPU its engine knows bfloat16 only, and on a GPU it has not run yet"

    def text_shape(self, text: Mapping[str, Any]) -> TextShape:
        d, heads = text["hidden_size"], text["linear_num_value_heads"]
        k, v = text["linear_key_head_dim"], text["linear_value_head_dim"]
        convolved = 2 * text["linear_num_key_heads"] * k + heads * v
        inputs = {"in_proj_qkv": convolved, "in_proj_z": heads * v, "in_proj_b": heads, "in_proj_a": heads}
        linear = {name: (d, width) for name, width in inputs.items()} | {"out_proj": (heads * v, d)}
        kernels = text["linear_conv_kernel_dim"] * convolved
        rule = heads * (2 * 64 * k + 64 * v + 3 * k * v)  # in chunks of 64 tokens
        count = list(text["layer_types"]).count("linear_attention")
        states = StateLayers(count, linear, kernels + 2 * heads + v, kernels + rule)
        return take(TextShape, text, qk_norm=True, gated_queries=True, states=states)

    def vision_shape(self, vision: Mapping[str, Any]) -> VisionShape:
        return Qwen3VL().vision_shape(dict(vision) | {"deepstack_visual_indexes": ()})

    def adapt(self, model: Any, packed: bool) -> None:
        super().adapt(model, packed)
        for layer in self.language_model(model).layers if packed else ():
            if (delta := getattr(layer, "linear_attn", None)) is not None:
                delta.forward = functools.partial(_by_sequence, delta.forward)

    def attention_inputs(self, config: Any, batch: PackedBatch, varlen: bool) -> dict[str, Any]:
        # The text's positions restart with every sequence; this is its number, as causal_conv1d takes it.
        number = (batch.position_ids[0] == 0).cumsum(-1).int() - 1
        return super().attention_inputs(config, batch, varlen) | {"seq_idx": number}

    def tower_positions(self, tower: Any, grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
        return Qwen3VL().tower_positions(tower, grids, device)

    def engine_options(self, device: str, dtype: torch.dtype) -> dict[str, Any]:
        if device == "cpu" and str(dtype) != "torch.bfloat16":
            raise UserError(
                "model.dtype: on a CPU vLLM computes Qwen3.5 in bfloat16 only; set model.dtype=bfloat16, or "
                "rollout.engine=hf"
            )
        # With it, states are kept at the ends of blocks, for which vLLM has to cut prompts to pieces.
        return {"enable_prefix_caching": False}

    def tiny_config(self, ids: Mapping[str, int], size: TinySize) -> Any:
        from transformers import Qwen3_5Config

        text = size.text(ids, interleaved=True) | {"head_dim": 64, "mamba_ssm_dtype": "float32"}
        text["rope_parameters"] |= {"mrope_section": [3, 3, 2], "partial_rotary_factor": 0.25}  # of 32 pairs
        # With 1e-6, the norm after random heads, which say little, makes ten times as much of rounding.
        text |= {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "rms_norm_eps": 1e-5}
        return Qwen3_5Config(**size.options(ids, text, size.vision() | {"num_position_embeddings": 64}))

    def tiny_processor(self, tokenizer: Any, pixels: Mapping[str, int]) -> Any:
        return Qwen3VL().tiny_processor(tokenizer, pixels)


def _by_sequence(
    forward: Callable[..., torch.Tensor],
    hidden_states: torch.Tensor,
    cu_seq_lens_q: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """(1, S, D) of a layer with a state, which must not go from a sequence to the next one.

    Args:
        forward: of the layer. What transformers computes in torch knows of no sequences, in the convolution
            as in the delta rule, so it gets one at a time; native kernels get all, and where they are.
        cu_seq_lens_q: (sequences + 1,) where each starts; None if it is only one.
        seq_idx: (1, S) int32 the number of each token's sequence.
    """
    import torch

    if cu_seq_lens_q is None:
        return forward(hidden_states, **kwargs)
    if _kernels_on(hidden_states.device.type):  # untried
        return forward(hidden_states, cu_seq_lens_q=cu_seq_lens_q.long(), seq_idx=seq_idx, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    return torch.cat([forward(part, **kwargs) for part in hidden_states.split(lengths, dim=1)], dim=1)


@functools.cache
def _kernels_on(device: str) -> bool:
    """Whether transformers has kernels that know of sequences, for the convolution and for the delta rule."""
    try:
        importlib.import_module("causal_conv1d").causal_conv1d_fn  # noqa: B018
        importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule  # noqa: B018
    except Exception:  # whatever keeps transformers from them, too
        return False
    return device == "cuda"
