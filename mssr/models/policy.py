"""A Qwen2.5-VL as reinforcement learning needs it: packed in, log-probs and entropies out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mssr.models.attention import NAME
from mssr.models.bounded_cache import BoundedCache
from mssr.models.encoded import EncodedPrompt
from mssr.models.head import Head, PartLoss, token_log_probs_and_entropy, token_loss
from mssr.models.packing import PackedBatch
from mssr.models.vision import Grid, vision_positions


class PolicyModel(nn.Module):
    """Wraps a transformers Qwen2.5-VL; the vision placeholder tokens have probability 0.

    Args:
        model: `Qwen2_5_VLForConditionalGeneration`.
        temperature: the sampling temperature, so that log-probs are those of what was sampled.
        head_chunk: as many logits exist at the same time as so many tokens have.
        features: of images by their keys, (merged patches, D) on the device, where the vision tower is frozen
            and whole on every rank; None if it is trained or sharded.
    """

    def __init__(
        self,
        model: Any,
        temperature: float = 1.0,
        head_chunk: int = 256,
        features: BoundedCache[bytes, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.head_chunk = head_chunk
        self.features = features
        self.banned_ids = vision_placeholder_ids(model.config)

    @property
    def merge_size(self) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    def rope_positions(self, prompt: EncodedPrompt) -> torch.Tensor:
        """(3, P) int64 mrope rows of a prompt."""
        positions, _ = self.model.model.get_rope_index(
            prompt.token_ids[None],
            mm_token_type_ids=prompt.token_types[None],
            image_grid_thw=prompt.image_grid_thw,
        )
        return positions[:, 0]

    def forward(
        self, batch: PackedBatch, touch_vision: bool = False, loss: PartLoss | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Log-probs and entropies of the response tokens, or a loss over them.

        Args:
            batch: packed sequences on the model's device.
            touch_vision: run the vision tower on a blank image, with no effect on the result, when
                the batch has none. Ranks that share a sharded tower must all run it or none.
            loss: one in which every token stands for itself, see `token_loss`. It is evaluated
                in here because a sharded weight of the head is whole only in here.

        Returns:
            (N,) float32 log-probs and (N,) float32 exact entropies, in nats. With a loss its () sum
            comes first, and it alone has a gradient.
        """
        core = self.model.model
        embeds = core.language_model.embed_tokens(batch.input_ids)
        if batch.pixels is not None:
            assert batch.normalizer is not None
            if self.features is None:
                features = self._image_features(batch.normalizer(batch.pixels), batch.image_grids)
            else:
                features = self._known_features(batch, self.features)
            features = features.to(embeds.dtype)[batch.feature_index]
            embeds = embeds.index_copy(1, batch.image_index, features[None])
        elif touch_vision and self.features is None:
            embeds = embeds + 0.0 * self._image_features(*self._blank_image()).sum().to(embeds.dtype)
        text = self.model.config.text_config
        # Where no layer wants a mask, transformers need not look, on the device, whether the batch is packed.
        no_masks = dict.fromkeys(text.layer_types) if text._attn_implementation == NAME else None
        hidden = core.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            attention_mask=no_masks,
            use_cache=False,
            # Where the sequences are, for attention that needs no mask.
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.max_length,
            max_length_k=batch.max_length,
        ).last_hidden_state
        tokens = hidden[0, batch.response_index], self.model.lm_head.weight, batch.targets
        head = Head(self.temperature, self.banned_ids, self.head_chunk)
        return token_log_probs_and_entropy(*tokens, head) if loss is None else token_loss(*tokens, loss, head)

    def _image_features(self, pixel_values: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """(merged patches, D)."""
        visual = self.model.model.visual
        positions = vision_positions(visual, grids, pixel_values.device)
        pixel_values = pixel_values.to(visual.patch_embed.proj.weight.dtype)
        return visual(pixel_values, grid_thw=torch.tensor(grids), **positions).pooler_output

    @torch.no_grad()
    def _known_features(self, batch: PackedBatch, cache: BoundedCache[bytes, torch.Tensor]) -> torch.Tensor:
        """(merged patches, D), the tower run on those images only whose features are not kept."""
        assert batch.pixels is not None and batch.normalizer is not None
        grids, keys = batch.image_grids, batch.image_keys
        found = {key: kept for key in keys if (kept := cache.get(key)) is not None}
        pixels = torch.split(batch.pixels, [math.prod(grid) for grid in grids])
        for k, key in enumerate(keys):
            if key not in found:
                # One by one: what is kept must not depend on what else was in the pass.
                found[key] = self._image_features(batch.normalizer(pixels[k]), grids[k : k + 1])
                cache.put(key, found[key], found[key].nbytes)
        return torch.cat([found[key] for key in keys])

    def _blank_image(self) -> tuple[torch.Tensor, list[Grid]]:
        vision, device = self.model.config.vision_config, self.model.lm_head.weight.device
        m = self.merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return torch.zeros(m * m, values, device=device), [(1, m, m)]


def vision_placeholder_ids(config: Any) -> list[int]:
    """Tokens that stand for pixels. A policy that samples one breaks every later forward pass."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return sorted({int(i) for n in names if (i := getattr(config, n, None)) is not None})
